"""Proximal policy optimisation: a value head that knows what to expect, and rewards at every token.

    max over theta   E_{y ~ old}  mean_t  min( ratio_t A_t, clip(ratio_t, 1 - low, 1 + high) A_t )
    A_t = sum_k (gamma lam)^k delta_{t+k} - penalty (g_t - D_t),    delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
    r_t = -penalty D_t, and the shaped reward at the last token;    ratio_t = model(y_t) / old(y_t)

D_t is the divergence from the reference at prefix t, exact over the vocabulary; g_t its link at the token that was
written. A token answers for the later D through the sum, and for the D at its own prefix through g: together that is
the gradient of E sum_t D_t. With reverse KL and D_t replaced by its estimate k1 it is the usual reward of -log-ratio.

A, V of the draw and the returns A + V are detached. The value head reads the student's last hidden states.

Paper -> here:  pi_old -> old,  beta -> penalty,  V -> the part "critic",  epsilon -> clip,  c_1 -> value_coefficient.
Source: Schulman et al., arXiv 1707.06347; for text Ouyang et al., 2203.02155, and Zheng et al., 2307.04964.
Differs from the papers: (1) the penalty's own token is charged g - D more, so that any divergence has its gradient, and
D is exact, not sampled; (2) the value head shares the student's trunk; (3) a pass is one optimiser step over all rows.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from kullback.divergence import divergence
from kullback.lm import Batch, answer, parts
from kullback.lm.advantages import divergence_cost, generalised_advantage, whiten
from kullback.lm.penalty import refuse_penalty
from kullback.lm.players import INITIAL
from kullback.lm.rewarded import RewardMethod
from kullback.run.terms import Term


@final
@dataclass(frozen=True, kw_only=True)
class PPO(RewardMethod):
    """Clipped policy gradient with a value head, generalised advantages and a penalty per token.

    Args:
        gamma: discount per token.
        lam: 1 uses what came of a token, 0 what the value head expects; between, less noise for some bias.
        whitening: shift and scale the advantages of a step to mean 0 and deviation 1.
        reference: the model that the penalty keeps the student near to.
        penalty: coefficient of the divergence to it; 0 needs no reference.
        divergence: a name `kb.divergence` parses; the reference is its target.
        value_coefficient: of the value head's loss.
        value_clip: how far a value may move from the draw's before it stops being trained; None lets it.
        value_learning_rate: its own; None takes the student's.
        value_detach: keep the value head's gradient out of the student.
    """

    updates: int = answer("source", 4)
    reference: Any = answer("target", INITIAL)
    clip: tuple[float, float] = answer("signal", (0.2, 0.2))
    penalty: float = answer("signal", 0.05)
    divergence: str = answer("signal", "reverse_kl")
    value_coefficient: float = answer("signal", 0.5)
    value_clip: float | None = answer("signal", 0.2)
    value_learning_rate: float | None = answer("signal", None)
    value_detach: bool = answer("signal", False)
    gamma: float = answer("weight", 1.0)
    lam: float = answer("weight", 0.95)
    whitening: bool = answer("weight", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_penalty(self.penalty, self.reference)
        for name, number in (("gamma", self.gamma), ("lam", self.lam)):
            if not 0 <= number <= 1:
                raise ValueError(f"weight.{name}={number:g} must be between 0 and 1")

    @property
    def scores(self) -> tuple[str, ...]:
        penalty = ("log_prob:reference", f"{self.divergence}:reference,student") if self.penalty > 0 else ()
        return ("log_prob:student", "value:critic", *penalty)

    def players(self) -> dict[str, Any]:
        return {"reference": self.reference if self.penalty > 0 else None}

    def parts(self) -> dict[str, parts.Part]:
        return {"critic": parts.Part(parts.linear, learning_rate=self.value_learning_rate, detach=self.value_detach)}

    def weight(self, step: Batch) -> dict[str, Tensor]:
        reward, value = self.reward(step.rollout), step["value:critic"]
        trained = step["scored"] & ~reward.isnan()[:, None]
        last = trained & (trained.long().cumsum(1) == trained.sum(1, keepdim=True))
        given = torch.where(last, reward[:, None].to(value.dtype), 0.0)
        own = torch.zeros_like(value)
        columns = self.shown(step.rollout, reward)
        if self.penalty > 0:
            here = step[f"{self.divergence}:reference,student"]
            link = divergence_cost(
                divergence(self.divergence), step["log_prob:reference"], step["log_prob:student"], trained
            )
            given = given - self.penalty * torch.where(trained, here, 0.0)
            own = torch.where(trained, -self.penalty * (link - here), 0.0)
            columns["rollout/penalty"] = torch.where(trained, here, torch.nan)
        advantage = generalised_advantage(given, value, trained, gamma=self.gamma, lam=self.lam)
        columns["returns"] = torch.where(trained, advantage + value, 0.0)
        advantage = advantage + own
        columns["advantage"] = whiten(advantage, trained) if self.whitening else advantage
        return columns | {"trained": trained}

    def signal(self, batch: Batch) -> list[Term]:
        says = f"A: generalised, gamma = {self.gamma:g}, lam = {self.lam:g}, of {self.reward_in_words()} at the end"
        if self.penalty > 0:
            says += f" and - {self.penalty:g} {self.divergence} to the reference at every token"
        return [
            self.surrogate(batch, says),
            value_loss(batch, "critic", clip=self.value_clip, over="trained", coefficient=self.value_coefficient),
        ]


def value_loss(batch: Batch, part: str, *, clip: float | None, over: str, coefficient: float) -> Term:
    """max( (V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2 ) / 2, with R the column "returns".

    Source: as in the code of arXiv 1707.06347; its limit means little where returns are not of order 1.
    """
    mask = batch[over].bool()
    value = batch.parts[part]
    returns, old = (torch.where(mask, batch[name], 0.0) for name in ("returns", f"value:{part}"))
    loss = (value - returns) ** 2
    says = f"half the squared error of {part!r} to the returns"
    if clip is not None:
        loss = torch.maximum(loss, (old + (value - old).clamp(-clip, clip) - returns) ** 2)
        says += f", followed {clip:g} far from the draw's values"
    return Term(
        "value",
        loss / 2,
        over=over,
        mean=batch.aggregate,
        coefficient=coefficient,
        says=says,
        seen={"mean": value.detach()},
    )
