"""Random draws that depend on what they are for, never on what was drawn before.

Every draw of a run comes from `generator(seed, "rollout", step)` and its like. There is no state to save, so a run that
is killed and resumed draws what it would have drawn, and a batch cut in other pieces draws the same numbers.
"""

import hashlib

import torch


def derive(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose: equal for equal arguments, unrelated for others."""
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: int | str) -> torch.Generator:
    """A CPU generator for one purpose, for example `generator(0, "rollout", step)`."""
    return torch.Generator().manual_seed(derive(seed, *purpose))
