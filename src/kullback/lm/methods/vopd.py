"""vOPD: on-policy distillation from sampled tokens, with the exact value of the state as a control variate.

    A_t = r_t - V(s_t),    r_t = -g(u_t),    V(s_t) = E_{v ~ model}[-g(u_v)],    u = target / model
    gradient = -E[ A_t grad log model(y_t) ]  =  gradient of D(target, model) at s_t

For reverse KL g = -log u, so r_t = log target(y_t) - log model(y_t) and V = -KL(model || target): the KL is *added* to
the log-ratio. r, V and A are detached. The baseline depends on the state alone, so every choice of it leaves the
expected gradient as it is: `baseline=exact` sums over the vocabulary, a number k uses the student's k likeliest tokens,
both sides renormalised on them, and `none` is plain sampled distillation. At model = target every single gradient is 0.

Paper -> here:  pi_T, q -> target,  pi_theta, p -> model,  A_t -> advantage,  B-hat -> baseline=k,  epsilon -> clip.
Source: arXiv 2605.07865, equations 9 to 15 (as in the official code); divergences other than reverse KL are ours.
Differs from the paper: (1) any divergence; (2) no importance weight between sampler and trainer, which are one here.
"""

from dataclasses import dataclass
from typing import Literal, final

from kullback.lm import Batch, Distillation, answer, match, sources
from kullback.run.terms import Term


@final
@dataclass(frozen=True, kw_only=True)
class VOPD(Distillation):
    """Score-function distillation with a value baseline.

    Args:
        divergence: a name `kb.divergence` parses.
        baseline: "exact", "none", or how many of the student's likeliest tokens estimate it.
        clip: PPO's limit on the ratio to the policy that wrote, on both sides; it acts only from the second pass on.
        updates: optimiser steps over one draw.
    """

    divergence: str = answer("signal", "reverse_kl")
    baseline: Literal["exact", "none"] | int = answer("signal", "exact")
    clip: float = answer("signal", 0.2)
    updates: int = answer("source", 1)

    @property
    def scores(self) -> tuple[str, ...]:
        return ("log_prob:student",) if self.updates > 1 else ()

    @property
    def passes(self) -> int:
        return self.updates

    def source(self) -> sources.Source:
        return sources.student()

    def signal(self, batch: Batch) -> list[Term]:
        return [match(self.divergence, batch, route="link", baseline=self.baseline, clip=(self.clip, self.clip))]
