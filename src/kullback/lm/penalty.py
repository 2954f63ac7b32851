"""A divergence that keeps the student near to a reference, beside a reward: the forms it may take, and for which rows.

    coefficient * E_{y ~ model} sum_t weight_t D( reference(. | y_<t), model(. | y_<t) )

The reference, the weights and all that goes through the advantage are detached.
"""

from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence import divergence
from kullback.lm.advantages import Horizon, divergence_cost, later
from kullback.lm.batch import Batch
from kullback.lm.signals import Route, match, refuse_estimator
from kullback.lm.weights import leave_one_out
from kullback.run.terms import Term

On = Literal["all", "right", "wrong", "undecided"]

ROUTES: dict[str, Route] = {"loss": "squared", "ratio": "ratio", "exact": "pathwise"}


@final
@dataclass(frozen=True)
class Penalty:
    """
    Args:
        coefficient: of the divergence.
        divergence: a name `kb.divergence` parses; the reference is its target.
        form: "loss", a surrogate of sampled tokens; "ratio", their values times the live ratio; "exact", over the
            vocabulary; "reward", minus their link, inside the clipped ratio. All have the gradient of the divergence.
        horizon: "token" takes prefixes as they are; "sequence" also charges a token for the divergence at the
            prefixes it leads to; "whole" (form=reward) is the divergence between whole completions.
        on: rows that it counts: "all", or those "right" or "wrong"; "undecided" weighs each token by the reference's
            entropy, in nats.
        corrected: weigh form=loss by the ratio to the old policy.

    Raises:
        ValueError: the parts do not go together; the name of an estimator, with what it is a gradient of.
    """

    coefficient: float
    divergence: str = "reverse_kl"
    form: str = "loss"
    horizon: Horizon = "token"
    on: On = "all"
    corrected: bool = True

    def __post_init__(self) -> None:
        refuse_estimator(self.form, "signal.form")
        if self.form not in (*ROUTES, "reward"):
            raise ValueError(f"signal.form={self.form!r} is not known: write {', '.join(ROUTES)} or reward")
        if self.horizon == "whole" and self.form != "reward":
            raise ValueError(f"signal.horizon='whole' has signal.form='reward' only, not {self.form!r}")
        if self.horizon == "whole" and self.on == "undecided":
            raise ValueError("weight.penalty_on='undecided' weighs tokens, signal.horizon='whole' knows only rows")

    @property
    def is_term(self) -> bool:
        """Whether the objective has a term for it; form=reward goes through the advantage alone."""
        return self.coefficient > 0 and self.form != "reward"

    @property
    def charges(self) -> bool:
        """Whether it reaches the student through the advantage, or its horizon's share of it does."""
        return self.coefficient > 0 and (self.form == "reward" or self.horizon == "sequence")

    @property
    def scores(self) -> tuple[str, ...]:
        if not self.coefficient > 0:
            return ()
        sampled = ("log_prob:student", "log_prob:reference") if self.form == "reward" else ()
        along = (f"{self.divergence}:reference,student",) if self.horizon == "sequence" else ()
        return (*sampled, *along, *(("entropy:reference",) if self.on == "undecided" else ()))

    def counts(self, step: Batch) -> Float[Tensor, "row completion"]:
        """How much the penalty counts at each token."""
        if self.on == "undecided":
            return step["entropy:reference"]
        accuracy = step.rollout.rewards["accuracy"]  # nan, neither right nor wrong, where the verifier failed
        right = accuracy == 1
        rows = {"all": torch.ones_like(right), "right": right, "wrong": accuracy < 1}[self.on]
        return rows[:, None] * step["scored"].float()

    def charge(
        self, step: Batch, counts: Float[Tensor, "row completion"], *, baseline: bool
    ) -> Float[Tensor, "row completion"]:
        """What the advantage loses: all of the penalty as a reward, else only what comes after a token.

        Args:
            baseline: compare with the other rows of the group, which changes no expectation.
        """
        scored, whole = step["scored"], self.horizon == "whole"
        values = step[f"{self.divergence}:reference,student"] if self.horizon == "sequence" else None
        if self.form == "reward":
            cost = divergence_cost(
                divergence(self.divergence),
                step["log_prob:reference"],
                step["log_prob:student"],
                scored,
                horizon=self.horizon,
                values=values,
                weight=1.0 if whole else counts,
            )
            cost = cost * counts if whole else cost
        else:
            assert values is not None
            cost = later(values * counts * scored)
        if baseline:
            cost = cost - leave_one_out(cost, step.rollout.group)
        return self.coefficient * cost * scored

    def shown(self, step: Batch) -> dict[str, Tensor]:
        """What no term shows: the sampled value of a penalty that is a reward."""
        if self.form != "reward":
            return {}
        value = divergence(self.divergence).sampled(step["log_prob:reference"], step["log_prob:student"])
        return {"rollout/penalty": torch.where(step["scored"], value, torch.nan)}

    def term(self, batch: Batch, *, scale: float = 1.0, **options: Any) -> Term:
        """The term of the forms that have one; options are those of `match`."""
        return match(
            self.divergence,
            batch,
            target="reference",
            route=ROUTES[self.form],
            corrected=self.corrected,
            name="penalty",
            coefficient=self.coefficient * scale,
            **options,
        )

    def in_words(self) -> str:
        """What it does to the advantage."""
        if not self.charges:
            return ""
        link = f"; then - {self.coefficient:g} times the link of {self.divergence} to the reference"
        along = f"; then - {self.coefficient:g} times the later {self.divergence} to the reference"
        return (link if self.form == "reward" else "") + (along if self.horizon == "sequence" else "")


def refuse_penalty(penalty: float, reference: Any) -> None:
    """
    Raises:
        ValueError: the coefficient is negative, or there is nothing to be near to.
    """
    if penalty < 0:
        raise ValueError(f"signal.penalty={penalty:g} must be at least 0")
    if penalty > 0 and reference is None:
        raise ValueError(f"signal.penalty={penalty:g} needs a model to be near to: set target.reference=initial")
