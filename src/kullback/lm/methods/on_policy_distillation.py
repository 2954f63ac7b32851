"""On-policy distillation: the student writes, the teacher grades every token.

    min over theta   E_{y ~ model(. | x)}  sum_t  D( target(. | x, y_<t),  model(. | x, y_<t) )

The student is corrected on the prefixes it will meet in use, not on the teacher's. y is a sample: the gradient
flows through D alone, never through the choice of y, and never into the target.

Paper -> here:  p_T -> target,  p_S -> model,  lambda -> student_fraction,  D -> divergence.
Source: Agarwal et al., arXiv 2306.13649, Algorithm 1; Thinking Machines, "On-Policy Distillation", 2025.
Differs from the paper: (1) any divergence, and any gradient route that is right for it; (2) prompts that the student
does not answer are served by the data set or by the teacher, as `otherwise` says.
"""

from dataclasses import dataclass
from typing import Literal, final

from kullback.lm import Batch, Distillation, answer, match, sources
from kullback.lm.signals import Route
from kullback.run.terms import Term


@final
@dataclass(frozen=True, kw_only=True)
class OnPolicyDistillation(Distillation):
    """Match a teacher, token by token, on the student's own completions.

    Args:
        divergence: a `kb.divergence` name. "reverse_kl" commits, "forward_kl" covers, "unit(jsd(0.1))" lies between.
        student_fraction: share of prompts the student answers.
        otherwise: who answers the others: "dataset" or "teacher".
        temperature: softens both distributions inside D. Sampling has its own, in the source.
        route: "pathwise" differentiates D over the vocabulary; "link" and "squared" need only sampled tokens.
    """

    divergence: str = answer("signal", "reverse_kl")
    student_fraction: float = answer("source", 1.0)
    otherwise: Literal["dataset", "teacher"] = answer("source", "dataset")
    temperature: float = answer("signal", 1.0)
    route: Route = answer("signal", "pathwise")

    def __post_init__(self) -> None:
        if not 0 <= self.student_fraction <= 1:
            raise ValueError(f"source.student_fraction={self.student_fraction:g} must be between 0 and 1")

    def source(self) -> sources.Source:
        others = sources.dataset() if self.otherwise == "dataset" else sources.teacher(system=self.teacher_system)
        return sources.mix((self.student_fraction, sources.student()), (1 - self.student_fraction, others))

    def signal(self, batch: Batch) -> list[Term]:
        return [match(self.divergence, batch, temperature=self.temperature, route=self.route)]
