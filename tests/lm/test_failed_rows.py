"""A verifier that raises, hangs or says NaN costs its own rows: counted, shown, and never a reward of zero."""

import math
import time
from typing import Any

import pytest
import torch

from kullback.lm import verifiers
from kullback.lm.engine import Engine
from tests.lm.small import gradient, make, make_moment

METHODS = {  # what is graded by "accuracy", which alone can be unknown
    "grpo": {"rewards": None, "redraws": 0, "penalty": 0.0, "horizon": "token", "correction": None},
    "ppo": {"rewards": None},
    "trace": {"rewards": None, "kl": 0.0},
    "dph_rl": {"rewards": None, "coefficient": 0.0},
    "f_dpg": {"score": "posterior(accuracy, beta=0.5)"},
}


class Moody:
    """Grades by length; every third call fails in one of three ways."""

    def __init__(self, how: str) -> None:
        self.how, self.calls = how, 0

    def __call__(self, problem: Any, completion: str) -> dict[str, float]:
        self.calls += 1
        if self.calls % 3 == 0:
            if self.how == "raises":
                raise RuntimeError("no")
            if self.how == "hangs":
                time.sleep(60)
            return {"accuracy": math.nan}
        return {"accuracy": float(len(completion) % 2)}


@pytest.mark.parametrize("how", ["raises", "hangs", "nan"])
@pytest.mark.parametrize("name", METHODS)
def test_a_failing_verifier_costs_its_own_rows(name: str, how: str) -> None:
    method = make(name, **METHODS[name])
    at = make_moment(method)
    verify = Moody(how)
    at.task.verifier = verifiers.in_time(verify, 0.05) if how == "hangs" else verify
    at.task.errors = 0
    engine = Engine(method, at)
    loss, whole = gradient(engine)
    step = engine.step_batch
    assert step is not None
    unknown = step.rollout.rewards["accuracy"].isnan()
    assert 0 < int(unknown.sum()) < len(unknown)
    assert at.task.errors == int(unknown.sum())
    mask = step["explore" if name == "dph_rl" else "trained"]
    assert not mask[unknown].any()
    assert mask[~unknown].any()
    assert math.isfinite(loss)
    assert whole.isfinite().all()
    assert float(whole.abs().max()) > 0
    shown = engine.metrics()
    known = step.rollout.rewards["accuracy"][~unknown]
    assert shown["rollout/accuracy"] == pytest.approx(float(known.double().mean()))  # not a mean with zeros
    if name != "f_dpg":
        assert shown["rollout/unknown"] == pytest.approx(float(unknown.float().mean()))


@pytest.mark.parametrize("name", ["ppo", "f_dpg", "trace"])
def test_a_failed_row_has_no_gradient_of_its_own(name: str) -> None:
    """The loss of the unknown rows' tokens: whatever the student says of them, it does not move."""
    method = make(name, **METHODS[name])
    at = make_moment(method)
    at.task.verifier = Moody("raises")
    engine = Engine(method, at)
    (micro,) = engine.prepare(0)
    unknown = micro.rollout.rewards["accuracy"].isnan()
    rows = micro.rows(unknown.nonzero()[:, 0].tolist())
    loss = engine.loss(rows)
    if loss.requires_grad:
        found = torch.autograd.grad(loss, list(at.model("student").parameters()), allow_unused=True)
        assert all(g is None or float(g.abs().max()) == 0 for g in found)


@pytest.mark.parametrize(("on", "counts"), [("right", 1.0), ("wrong", 0.0)])
def test_a_penalty_on_wrong_answers_does_not_take_an_unknown_one_for_wrong(on: str, counts: float) -> None:
    changes = METHODS["grpo"] | {"penalty": 0.1, "reference": "initial", "form": "loss", "penalty_on": on}
    method = make("grpo", **changes)
    at = make_moment(method)
    at.task.verifier = Moody("raises")
    step = Engine(method, at).draw()
    accuracy = step.rollout.rewards["accuracy"]
    assert set(accuracy[step["penalty"].any(1)].tolist()) == {counts}
    assert accuracy.isnan().any()
