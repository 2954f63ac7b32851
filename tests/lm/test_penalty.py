"""What a penalty takes from the advantage, token by token, next to loops over the rows."""

import dataclasses
from typing import Any

import pytest
import torch

import kullback as kb
from kullback.lm import Batch
from kullback.lm.batch import base_columns
from kullback.lm.penalty import Penalty
from kullback.lm.rollout import Origin, build_rollout

LENGTHS, GROUP, RIGHT = [3, 2, 3, 1, 2], [0, 0, 0, 1, 1], [1.0, 0.0, 1.0, 0.0, 1.0]


def step_of(which: str) -> Batch:
    draw = torch.Generator().manual_seed(2)
    rollout = build_rollout([[1]] * 5, [[4] * n for n in LENGTHS], [[int(Origin.STUDENT)] * n for n in LENGTHS],
                            group=GROUP)  # fmt: skip
    rollout = dataclasses.replace(rollout, rewards={"accuracy": torch.tensor(RIGHT, dtype=torch.float64)})
    names = ("log_prob:student", "log_prob:reference", f"{which}:reference,student", "entropy:reference")
    random = {name: torch.rand(5, 3, generator=draw, dtype=torch.float64) for name in names}
    random = {name: -values if name.startswith("log") else values for name, values in random.items()}
    return Batch(rollout, base_columns(rollout) | random)


@pytest.mark.parametrize("on", ["all", "right", "wrong", "undecided"])
@pytest.mark.parametrize(
    ("form", "horizon"),
    [("reward", "token"), ("reward", "sequence"), ("reward", "whole"), ("loss", "sequence"), ("exact", "sequence")],
)
@pytest.mark.parametrize("baseline", [False, True])
def test_a_token_is_charged_for_itself_and_for_what_it_leads_to(
    on: Any, form: str, horizon: Any, baseline: bool
) -> None:
    which, coefficient = "forward_kl", 0.3
    if horizon == "whole" and on == "undecided":
        with pytest.raises(ValueError, match="knows only rows"):
            Penalty(coefficient, which, form, horizon, on)
        return
    penalty, step, D = Penalty(coefficient, which, form, horizon, on), step_of(which), kb.divergence(which)
    ours, theirs = step["log_prob:student"], step["log_prob:reference"]
    values, entropy = step[f"{which}:reference,student"], step["entropy:reference"]

    def counts(row: int, t: int) -> float:
        if on == "undecided":
            return float(entropy[row, t])
        return float({"all": True, "right": RIGHT[row] == 1, "wrong": RIGHT[row] == 0}[on])

    cost = torch.zeros(5, 3, dtype=torch.float64)
    for row, n in enumerate(LENGTHS):
        for t in range(n):
            gap = theirs[row, :n].sum() - ours[row, :n].sum() if horizon == "whole" else theirs[row, t] - ours[row, t]
            now = float(D.link(gap)) * counts(row, t) if form == "reward" else 0.0
            after = sum(counts(row, u) * float(values[row, u]) for u in range(t + 1, n))
            cost[row, t] = now + (after if horizon == "sequence" else 0.0)
    expected = cost.clone()
    for row, n in enumerate(LENGTHS):
        others = [i for i in range(5) if i != row and GROUP[i] == GROUP[row]]
        if baseline:
            expected[row] -= cost[others].mean(0)
        expected[row, n:] = 0.0
    assert penalty.charges
    found = penalty.charge(step, penalty.counts(step), baseline=baseline)
    torch.testing.assert_close(found, coefficient * expected)
    assert float(found.abs().max()) > 0.01


def test_a_penalty_is_a_term_a_charge_or_both() -> None:
    kinds = {("loss", "token"): (True, False), ("exact", "sequence"): (True, True), ("reward", "whole"): (False, True)}
    for (form, horizon), (term, charge) in kinds.items():
        penalty = Penalty(0.1, form=form, horizon=horizon)  # type: ignore[arg-type]
        assert (penalty.is_term, penalty.charges, bool(penalty.in_words())) == (term, charge, charge)
        none = Penalty(0.0, form=form, horizon=horizon)  # type: ignore[arg-type]
        assert (none.is_term, none.charges, none.scores) == (False, False, ())
