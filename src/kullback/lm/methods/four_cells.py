"""Four-cell distillation: who wrote the prefix, and which way the token-level KL points, chosen apart.

    min over theta   E_x sum_t E_{s_t ~ d^prefix}  lam KL(model || target)(s_t) + (1 - lam) KL(target || model)(s_t)

    prefix \\ lam     0 (forward)                            1 (reverse)
    teacher          off-policy fine-tuning, soft targets   like offline RL
    student          DAgger-like                            on-policy distillation

No gradient flows through who visits a prefix. Only teacher/forward is the gradient of a divergence between sequences,
KL(target || model); the other cells are of neither direction (card 09, checks 4 and 5).

Paper -> here:  p_T -> target,  q_theta -> model,  lambda (weight of the reverse term) -> reverse_weight,
L_0 < L_1 < ... -> lengths,  H_min -> minimum_entropy.
Source: arXiv 2605.16826, the decomposition, the KL mixture and the entropy-gated length curriculum.
Differs from the paper: (1) a token mean over the step instead of the sum over t; (2) `minimum_entropy`, `lengths` and
the time between gates are not given there and are the user's; (3) a mixture of prefixes is possible.
"""

from dataclasses import dataclass
from typing import Literal, final

from kullback.lm import Batch, Distillation, answer, match, sources
from kullback.lm.schedules import EntropyGate
from kullback.run.controllers import Controller
from kullback.run.terms import Term


@final
@dataclass(frozen=True, kw_only=True)
class FourCells(Distillation):
    """Forward and reverse KL, on the teacher's and the student's prefixes.

    Args:
        prefix: "student" (fresh), "teacher" (written once), or "dataset".
        reverse_weight: lam; 0 is forward KL, 1 is reverse KL. The mixture has unit curvature for every value.
        temperature: softens both distributions inside the divergence.
        lengths: rungs of the length curriculum, tokens; empty leaves `max_completion` alone.
        minimum_entropy: nats per token on held-out own text; while it is reached, a probe adds a rung.
    """

    prefix: Literal["student", "teacher", "dataset"] = answer("source", "student")
    reverse_weight: float = answer("signal", 1.0)
    temperature: float = answer("signal", 1.0)
    lengths: tuple[int, ...] = answer("schedule", ())
    minimum_entropy: float = answer("schedule", 0.0)

    def __post_init__(self) -> None:
        if not 0 <= self.reverse_weight <= 1:
            raise ValueError(
                f"signal.reverse_weight={self.reverse_weight:g} must be between 0 (forward KL) and 1 (reverse KL)"
            )
        if self.minimum_entropy and not self.lengths:
            raise ValueError(
                "schedule.minimum_entropy would do nothing without schedule.lengths, for example [16, 32, 64]"
            )

    @property
    def divergence(self) -> str:
        """In kullback's words."""
        lam = self.reverse_weight
        if lam in (0, 1):
            return "reverse_kl" if lam == 1 else "forward_kl"
        return f"{lam!r}*reverse_kl + {1 - lam!r}*forward_kl"

    def source(self) -> sources.Source:
        if self.prefix == "teacher":
            return sources.teacher(system=self.teacher_system)
        return sources.student() if self.prefix == "student" else sources.dataset()

    def signal(self, batch: Batch) -> list[Term]:
        return [match(self.divergence, batch, temperature=self.temperature)]

    def schedule(self) -> list[Controller]:
        return [EntropyGate(self.lengths, self.minimum_entropy)] if self.lengths else []
