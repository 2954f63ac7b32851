"""chi-PO: DPO whose penalty adds a chi-squared divergence, so that it does not trust what the data do not cover.

    min over theta   E_{(x, y_w, y_l)}  -log sigma( clip_{2 R}( coefficient [ phi(z_w) - phi(z_l) ] ) )
    z = model(y | x) / reference(y | x),    phi(z) = z ** alpha + gamma log z

With alpha = gamma = 1 it is f-DPO of chi2_kl = 1/2 sum (model - reference)^2 / reference + KL(model || reference): the
optimum's ratio grows like R / coefficient where DPO's grows like exp(R / coefficient). The logarithm is what makes phi
fall to -inf; without it (gamma = 0) there is no closed form. The clip is on the difference of the two responses.

Paper -> here:  pi_ref -> reference,  beta -> coefficient,  R_max -> max_reward.
Source: arXiv 2407.13399, algorithm 1; the generalised link is quoted from its experiments by public implementations.
Differs from the paper: none known; phi is exp(clamp(alpha log z)) + gamma log z, as there, with the clamp at 20 nats.
"""

from dataclasses import dataclass
from typing import final

from kullback.divergence import FDivergence, divergence
from kullback.lm import Batch, answer
from kullback.lm.preferences import PairMethod, preference, refuse_coefficient
from kullback.run.terms import Term


@final
@dataclass(frozen=True, kw_only=True)
class ChiPO(PairMethod):
    """Preference optimisation under a mixed chi-squared and KL penalty.

    Args:
        coefficient: the paper's beta; not on DPO's scale: near the reference the pull is (alpha ** 2 + gamma) times
            DPO's.
        max_reward: R, the range of the true reward: the margin is cut at twice it. None does not cut.
        alpha: power of the ratio in the link.
        gamma: weight of its logarithm.
    """

    coefficient: float = answer("signal", 0.05)
    max_reward: float | None = answer("signal", 1.0)
    alpha: float = answer("signal", 1.0)
    gamma: float = answer("signal", 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_coefficient(self.coefficient)
        if self.max_reward is not None and not self.max_reward > 0:
            raise ValueError(f"signal.max_reward={self.max_reward:g} must be positive; None does not cut")
        if not self.alpha > 0:
            raise ValueError(f"signal.alpha={self.alpha:g} must be positive; without the power it is method: dpo")
        if not self.gamma > 0:
            raise ValueError(
                f"signal.gamma={self.gamma:g} must be positive: without its logarithm phi stops at 0 where the model's "
                "probability goes to 0, and pairs have no closed form"
            )

    def signal(self, batch: Batch) -> list[Term]:
        return [
            preference(
                batch,
                mixed_chi2(self.alpha, self.gamma),
                self.coefficient,
                clip=self.max_reward,
                limit=20.0 / self.alpha,
                pull=self.gamma,
            )
        ]


def mixed_chi2(alpha: float = 1.0, gamma: float = 1.0) -> FDivergence:
    """The divergence whose link at -log z is z ** alpha + gamma log z, up to a constant.

    >>> print(mixed_chi2())
    chi2_kl
    """
    if alpha == gamma == 1:
        return divergence("chi2_kl")
    return alpha * divergence(f"alpha({-alpha!r})") + gamma * divergence("reverse_kl")
