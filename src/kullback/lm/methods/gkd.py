"""Generalised knowledge distillation: a Jensen-Shannon divergence with a knob, on a mixture of the data's and own text.

    min over theta   E_{(x, y)}  (1 / |y|) sum_t  JSD_beta( target(. | x, y_<t),  model(. | x, y_<t) )
    JSD_beta = beta KL(target || m) + (1 - beta) KL(model || m),    m = beta target + (1 - beta) model

y is the student's with probability lambda, the data set's otherwise; no gradient flows through its choice.

Paper -> here:  p_T -> target,  p_S -> model,  lambda -> student_fraction,  beta -> beta.
Source: Agarwal et al., arXiv 2306.13649, equation 1 and Algorithm 1.
Differs from the paper: (1) beta = 0 and 1, where JSD_beta vanishes, are forward and reverse KL as in its experiments;
with `unit` the scale follows continuously up to them, without it the paper's scale jumps there.
"""

from dataclasses import dataclass
from typing import final

from kullback.lm import Batch, Distillation, answer, match, sources
from kullback.run.terms import Mean, Term


@final
@dataclass(frozen=True, kw_only=True)
class GKD(Distillation):
    """Generalised JSD to a teacher on mixed text.

    Args:
        beta: 0 is forward KL, 1 is reverse KL.
        student_fraction: share of prompts the student answers.
        unit: scale to unit curvature, so that a learning rate means the same for every beta.
        temperature: softens both distributions inside the divergence.
    """

    beta: float = answer("signal", 0.5)
    student_fraction: float = answer("source", 0.5)
    unit: bool = answer("signal", False)
    temperature: float = answer("signal", 1.0)
    aggregate: Mean = answer("weight", "row")

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"signal.beta={self.beta:g} must be between 0 (forward KL) and 1 (reverse KL)")

    @property
    def divergence(self) -> str:
        """In kullback's words."""
        if self.beta in (0, 1):
            return "forward_kl" if self.beta == 0 else "reverse_kl"
        return f"unit(jsd({self.beta!r}))" if self.unit else f"jsd({self.beta!r})"

    def source(self) -> sources.Source:
        return sources.mix((self.student_fraction, sources.student()), (1 - self.student_fraction, sources.dataset()))

    def signal(self, batch: Batch) -> list[Term]:
        return [match(self.divergence, batch, temperature=self.temperature)]
