"""Group relative policy optimisation: verifiable rewards, compared among the answers to one prompt.

    max over theta   E_{x, y_1..n ~ old}  mean_t  min( ratio_t A_i, clip(ratio_t, 1 - low, 1 + high) A_i )
                     - penalty * D( reference, model )
    A_i = (r_i - b_i) / (s_i + epsilon),    ratio_t = model(y_t) / old(y_t)

r is the weighted sum of the verifier's grades; "accuracy" itself stays as it is, in the metrics and in the ledger. A
and the old policy are detached. A penalty in its reward form is added to A after the division by s: before it, s would
rescale the penalty from group to group, and its coefficient would mean nothing.

Paper -> here:  G -> samples,  epsilon_low, epsilon_high -> clip,  beta -> penalty,  pi_ref -> reference,
mu -> updates,  "std normalisation" -> scale,  "length normalisation" -> aggregate,  L_cache -> soft.
Source: Shao et al., arXiv 2402.03300; DAPO, 2503.14476; Dr. GRPO, 2503.20783; RLOO, 2402.14740; GSPO, 2507.18071.
Differs from the papers: (1) tokens are averaged over the step, as DAPO does; `aggregate=row` is GRPO's, `row_sum`,
divided by `max_completion`, Dr. GRPO's; (2) no penalty unless asked for, and then with the gradient of the divergence
it names: GRPO's own penalty is `divergence=forward_kl, form=loss`, TRL's by now `reverse_kl, form=ratio`; (3) a row
whose verifier failed is left out.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from kullback.lm import Batch, answer, sampling, sources, targets
from kullback.lm.advantages import Horizon, Level, importance, informative, sampler_gap
from kullback.lm.penalty import On, Penalty, refuse_penalty
from kullback.lm.rewarded import GroupMethod
from kullback.run.terms import Term


@final
@dataclass(frozen=True, kw_only=True)
class GRPO(GroupMethod):
    """Policy gradient on verifiable rewards, with the other answers to a prompt as the baseline.

    Args:
        pass_rate: problems solved less or more often than this, so far, are passed over.
        level: one ratio per "token" or, GSPO, per "sequence".
        negative: multiplies negative advantages; below 1 mistakes count less than successes.
        drop_equal: leave groups of equal reward out of the mean; otherwise they count, as tokens that ask for nothing.
        drop_unfinished: leave out answers that were cut at `max_completion`.
        correction: cap of the importance weight student / sampler, where the text was written at another temperature
            or by another engine; None trusts the sampler.
        correction_level: of that weight, "token" or "sequence".
        reference: the model that the penalty keeps the student near to: "initial", a path or a hub name.
        penalty: coefficient of the divergence to it.
        divergence: a name `kb.divergence` parses; the reference is its target.
        form: "loss", a surrogate of sampled tokens; "ratio", their values times the live ratio; "exact", over the
            vocabulary; "reward", minus their link, inside the clipped ratio. All have the gradient of the divergence.
        horizon: "token" takes prefixes as they are; "sequence" also charges a token for the divergence at the
            prefixes it leads to; "whole" (form=reward) is the divergence between whole completions.
        penalty_on: rows that it counts: "all", or those "right" or "wrong"; "undecided" weighs each token by the
            reference's entropy, in nats.
        penalty_ratio: weigh form=loss by the ratio to the old policy, which its gradient needs from the second update
            on; GRPO's code does not.
    """

    pass_rate: tuple[float, float] = answer("source", (0.0, 1.0))
    reference: Any = answer("target", None)
    level: Level = answer("signal", "token")
    penalty: float = answer("signal", 0.0)
    divergence: str = answer("signal", "reverse_kl")
    form: str = answer("signal", "loss")
    horizon: Horizon = answer("signal", "token")
    penalty_ratio: bool = answer("signal", True)
    negative: float = answer("weight", 1.0)
    drop_equal: bool = answer("weight", False)
    drop_unfinished: bool = answer("weight", False)
    correction: float | None = answer("weight", None)
    correction_level: Level = answer("weight", "token")
    penalty_on: On = answer("weight", "all")

    def __post_init__(self) -> None:
        near = self.near
        refuse_penalty(self.penalty, self.reference)
        super().__post_init__()
        dropping = "drop_equal" if self.drop_equal else "drop_unfinished" if self.drop_unfinished else None
        if dropping and near.charges:
            raise ValueError(
                f"weight.{dropping}=true leaves rows out by how they ended, and what the penalty adds to the advantage "
                "needs all of them: set it to false, or signal.form=loss and signal.horizon=token"
            )

    @property
    def near(self) -> Penalty:
        """What keeps the student near to the reference."""
        return Penalty(self.penalty, self.divergence, self.form, self.horizon, self.penalty_on, self.penalty_ratio)

    @property
    def corrected(self) -> bool:
        return self.correction is not None

    @property
    def scores(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*super().scores, *self.near.scores)))

    def players(self) -> dict[str, Any]:
        return {"reference": self.reference}

    def targets(self) -> dict[str, targets.Target]:
        return {"reference": targets.frozen("reference")} if self.near.is_term else {}

    def writer(self) -> sources.Source:
        return sampling.by_pass_rate(super().writer(), *self.pass_rate)

    def weight(self, step: Batch) -> dict[str, Tensor]:
        rollout, scored, near = step.rollout, step["scored"], self.near
        reward = self.reward(rollout)
        columns, dropped = self.shown(rollout, reward), reward.isnan()
        if self.drop_equal:
            dropped = dropped | ~informative(reward, rollout.group)
        if self.drop_unfinished:
            dropped = dropped | (rollout.rewards["finished"] != 1)
        advantage = self.advantage(reward, rollout)
        advantage = (advantage * torch.where(advantage < 0, self.negative, 1.0))[:, None] * scored
        if self.pass_rate != (0.0, 1.0):
            step.ledger.add("accuracy", [note["problem_id"] for note in rollout.notes], rollout.rewards["accuracy"])
        if self.penalty > 0:
            counts = columns["penalty"] = near.counts(step)
            columns |= near.shown(step)
            if near.charges:
                advantage = advantage - near.charge(step, counts, baseline=self.baseline != "none")
        if self.correction is not None:
            student, sampler = step["log_prob:student"], rollout.log_probs
            weight = importance(student, sampler, scored, cap=self.correction, level=self.correction_level)
            columns |= {"correction": weight, "rollout/correction": weight}
            columns |= {"rollout/sampler_kl": sampler_gap(student, sampler, scored)}
            if self.penalty > 0:
                columns["penalty"] = columns["penalty"] * weight
        return columns | {"advantage": advantage, "trained": scored & ~dropped[:, None]}

    def signal(self, batch: Batch) -> list[Term]:
        per, weight = self.per_row(batch), "correction" if self.corrected else None
        says = self.advantage_in_words() + self.near.in_words()
        terms = [self.surrogate(batch, says, level=self.level, weight=weight, coefficient=per)]
        if self.near.is_term:
            counts = None if self.penalty_on == "all" and not self.corrected else "penalty"
            terms.append(self.near.term(batch, weight=counts, scale=per))
        return terms
