"""Divergences between a target and a model: what they are, and how they are evaluated.

    D(target, model) = sum_x model(x) f(target(x) / model(x)),    f convex, f(1) = 0

`divergence("jsd(0.1)")` gives an `FDivergence`; `divergences()` lists the family. This package imports nothing else of
kullback's.
"""

from kullback.divergence import peers
from kullback.divergence.curves import FDivergence
from kullback.divergence.family import Member, divergences, register, unregister
from kullback.divergence.parse import divergence
from kullback.divergence.topk import Tail, TopK

divergence.peers = peers  # type: ignore[attr-defined]  # kullback.divergence is this function, seen from outside

__all__ = ["FDivergence", "Member", "Tail", "TopK", "divergence", "divergences", "peers", "register", "unregister"]
