"""DPO and f-DPO: learn from pairs, without a reward model, under any divergence with a closed form.

    min over theta   E_{(x, y_w, y_l)}  outer( coefficient [ s(g_w) - s(g_l) ] )
    g = log model(y | x) - log reference(y | x),    s(g) = link(-g) of D(reference, model)

With reverse KL s(g) = g and the logistic loss this is DPO. The gradient of a response is weighted by s'(g), the
curvature of the divergence at -g: 1 for reverse KL, e^-g for forward KL, 1 / (1 + e^g) for 2*jsd(0.5).

Paper -> here:  pi -> model,  pi_ref -> reference,  f'(u) -> s,  beta -> coefficient,  sigma -> outer=logistic.
Source: arXiv 2309.16240, equation 4; 2305.18290; 2310.12036 (ipo); 2305.10425 (hinge). Other libraries' names for these
divergences are in `kullback.divergence.peers`; TRL's ipo is `outer=ipo, length=mean`.
Differs from the papers: (1) any divergence whose link falls to -inf; (2) beyond 20 nats the score goes on as a straight
line, so nothing overflows; the metrics say how often.
"""

from dataclasses import dataclass
from typing import final

from kullback.divergence import divergence
from kullback.lm import Batch, answer
from kullback.lm.preferences import (
    OUTERS,
    Length,
    Outer,
    PairMethod,
    check_closed_form,
    preference,
    refuse_coefficient,
)
from kullback.run.terms import Term


@final
@dataclass(frozen=True, kw_only=True)
class DPO(PairMethod):
    """Direct preference optimisation with any divergence, outer loss and length rule.

    Args:
        divergence: a name `kb.divergence` parses; the reference is its target.
        coefficient: DPO's beta. Its scale depends on the divergence: 2*jsd(0.5) starts like DPO at half of it.
        outer: "logistic", "hinge", "squared_hinge" or "ipo".
        length: "sum" of a response's tokens, or "mean": its score over its length.
        smoothing: share of the labels taken to be wrong.
        clip: cuts the margin at twice this number; None does not.
        limit: log-ratio, in nats, from which the score is a straight line.
    """

    divergence: str = answer("signal", "reverse_kl")
    coefficient: float = answer("signal", 0.1)
    outer: Outer = answer("signal", "logistic")
    length: Length = answer("signal", "sum")
    smoothing: float = answer("signal", 0.0)
    clip: float | None = answer("signal", None)
    limit: float = answer("signal", 20.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_closed_form(divergence(self.divergence))
        refuse_coefficient(self.coefficient)
        if self.outer not in OUTERS:
            raise ValueError(f"signal.outer={self.outer!r} is not known: write {', '.join(OUTERS)}")
        if self.length not in ("sum", "mean"):
            raise ValueError(f"signal.length={self.length!r} is not known: write sum or mean")
        if not 0 <= self.smoothing < 0.5:
            raise ValueError(f"signal.smoothing={self.smoothing:g} must be in [0, 0.5); at one half labels say nothing")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"signal.clip={self.clip:g} must be positive; leave it out for no clip")
        if not 0 < self.limit <= 300:
            raise ValueError(f"signal.limit={self.limit:g} must be in (0, 300] nats: exp of more is no number")

    def signal(self, batch: Batch) -> list[Term]:
        return [
            preference(
                batch,
                self.divergence,
                self.coefficient,
                outer=self.outer,
                length=self.length,
                smoothing=self.smoothing,
                clip=self.clip,
                limit=self.limit,
            )
        ]
