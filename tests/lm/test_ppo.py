"""PPO: its per-token rewards descend the divergence they name, and its value head learns values."""

import dataclasses
from typing import Any

import pytest
import torch

import kullback as kb
from kullback.lm import Batch, find_method
from kullback.lm.batch import base_columns
from kullback.lm.engine import Engine
from kullback.lm.forwards import read
from kullback.lm.methods.ppo import value_loss
from kullback.lm.predictions import HiddenPredictions, LogitPredictions
from kullback.lm.rehearse import rehearse
from kullback.lm.rollout import Origin, build_rollout
from tests.lm.small import gradient, make, make_moment
from tests.lm.test_kl_forms import LENGTH, PREFIXES, ROWS, TOKENS, objective, tables, token_log_probs


@pytest.mark.parametrize("name", kb.divergences())
def test_all_completions_together_descend_reward_and_penalty(name: str) -> None:
    """lam = gamma = 1 and any values: the gradient of -E[reward] + penalty E sum_t D_t, enumerated."""
    reference, model, reward = tables()
    method = find_method("ppo")(penalty=0.7, divergence=name, lam=1.0, whitening=False, aggregate="row_sum")  # type: ignore[call-arg]
    rollout = build_rollout([[0]] * ROWS, TOKENS.tolist(), [[int(Origin.STUDENT)] * LENGTH] * ROWS)
    rollout = dataclasses.replace(rollout, rewards={"accuracy": reward.double()})
    ours, theirs = (
        LogitPredictions(rollout.scored, TOKENS.flatten(), table[PREFIXES].flatten(0, 1))
        for table in (model, reference)
    )
    guess = torch.randn(len(model), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    columns = base_columns(rollout) | {
        "log_prob:student": ours.log_probs().detach(),
        "log_prob:reference": theirs.log_probs(),
        f"{name}:reference,student": kb.divergence(name).categorical(reference[PREFIXES], model[PREFIXES]).detach(),
        "value:critic": guess[PREFIXES],  # of the state, so any value is a fair baseline
    }
    step = Batch(rollout, columns, aggregate="row_sum")
    step = dataclasses.replace(step, columns=columns | method.weight(step), predictions=ours)
    surrogate = method.signal(dataclasses.replace(step, parts={"critic": guess[PREFIXES]}))[0]
    p = token_log_probs(model).detach().sum(1).exp()
    (found,) = torch.autograd.grad((p * surrogate.value.sum(1)).sum(), model)
    torch.testing.assert_close(found, objective(name, "sequence", 0.7), rtol=1e-10, atol=1e-10)


def test_returns_are_what_came_and_advantages_are_white() -> None:
    """Without penalty and with lam = gamma = 1 a token's return is its row's reward; unknown rows are left out."""
    method = make("ppo", penalty=0.0, lam=1.0, rewards=None)
    rollout = build_rollout(
        [[0]] * 4, [[1] * n for n in (3, 1, 2, 3)], [[int(Origin.STUDENT)] * n for n in (3, 1, 2, 3)]
    )
    reward = torch.tensor([1.0, 0.0, torch.nan, 0.5])
    rollout = dataclasses.replace(rollout, rewards={"accuracy": reward})
    guess = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    found = method.weight(Batch(rollout, base_columns(rollout) | {"value:critic": guess}))
    trained = rollout.scored & torch.tensor([True, True, False, True])[:, None]
    assert torch.equal(found["trained"], trained)
    torch.testing.assert_close(found["returns"], torch.where(trained, reward.nan_to_num(9.0)[:, None], 0.0))
    raw = (reward[:, None] - guess)[trained]
    torch.testing.assert_close(found["advantage"][trained], (raw - raw.mean()) / raw.std())
    plain = dataclasses.replace(method, whitening=False).weight(
        Batch(rollout, base_columns(rollout) | {"value:critic": guess})
    )
    torch.testing.assert_close(plain["advantage"][trained], raw)


def value_batch(value: torch.Tensor, old: torch.Tensor, returns: torch.Tensor) -> Batch:
    rows, width = value.shape
    rollout = build_rollout([[0]] * rows, [[1] * width] * rows, [[int(Origin.STUDENT)] * width] * rows)
    columns = base_columns(rollout) | {"returns": returns, "value:critic": old}
    return Batch(rollout, columns, parts={"critic": value})


def test_values_are_followed_only_so_far() -> None:
    """Gradient V - R inside the limit; 0 where the value has moved past it towards the return, kept where away."""
    value = torch.tensor([[0.1, 0.5, -0.5, 0.5]], requires_grad=True)
    old, returns = torch.zeros(1, 4), torch.tensor([[1.0, 1.0, 1.0, 0.45]])
    for clip, expected in ((None, [-0.9, -0.5, -1.5, 0.05]), (0.2, [-0.9, 0.0, -1.5, 0.0])):
        term = value_loss(value_batch(value, old, returns), "critic", clip=clip, over="scored", coefficient=1.0)
        (pull,) = torch.autograd.grad(term.value.sum(), value)
        torch.testing.assert_close(pull, torch.tensor([expected]), rtol=1e-5, atol=1e-6)


def test_a_value_head_learns_a_known_value_function() -> None:
    """Returns that are linear in the states: the head finds the function."""
    method = make("ppo", penalty=0.0, rewards={"finished": 1.0}, value_clip=None)
    at = make_moment(method)
    engine = Engine(method, at)
    step = engine.draw()
    wanted = torch.nn.Linear(16, 1)
    states = read(at.model("student"), step.rollout)
    assert isinstance(states, HiddenPredictions)
    value = states.grid(wanted(states.hidden)[:, 0]).detach()
    engine.step_batch = step = dataclasses.replace(step, columns=dict(step.columns) | {"returns": value})
    optimizer, errors = torch.optim.LBFGS(at.parts["critic"].parameters(), max_iter=200), []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = engine.loss(step)
        loss.backward()
        errors.append(engine.metrics()["term/value"])
        return loss.detach()

    for _ in range(5):
        optimizer.step(closure)
    assert errors[-1] < 1e-4 * errors[0]
    after = engine.scores.measure(["value:critic"], step.rollout, {})["value:critic"]
    torch.testing.assert_close(after, value, rtol=0.02, atol=0.02)


def test_a_detached_head_does_not_move_the_student() -> None:
    """With no reward and no penalty only the value loss is left; detached, it trains the head and nothing else."""
    moved = {}
    for detach in (False, True):
        method = make("ppo", penalty=0.0, rewards={"finished": 0.0}, whitening=False, lam=0.0, gamma=1.0,
                      value_detach=detach)  # fmt: skip
        at = make_moment(method)
        engine = Engine(method, at)
        (micro,) = engine.prepare(0)
        columns = dict(micro.columns) | {"advantage": torch.zeros_like(micro["advantage"])}
        engine.loss(dataclasses.replace(micro, columns=columns)).backward()
        student = [p for name, p in at.model("student").named_parameters() if "kullback_parts" not in name]
        moved[detach] = max(float(p.grad.abs().max()) for p in student if p.grad is not None)
        assert float(at.parts["critic"].weight.grad.abs().max()) > 0
    assert moved[False] > 1e-4
    assert moved[True] == 0


def test_a_second_pass_has_ratios_and_the_draw_s_values() -> None:
    method = make("ppo", updates=2)
    engine = Engine(method, make_moment(method))
    gradient(engine)
    first = engine.metrics()
    assert first["policy/ratio"] == pytest.approx(1, abs=1e-4)
    with torch.no_grad():
        for parameter in engine.at.model("student").parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    gradient(engine, 1)
    second = engine.metrics()
    assert second["policy/old_kl"] > 1e-4
    assert second["policy/clipped"] > 0
    assert second["value/mean"] != first["value/mean"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lam": 1.5}, r"weight\.lam=1\.5 must be between 0 and 1"),
        ({"reference": None}, r"set target\.reference=initial"),
        ({"sampling_temperature": 0.5}, "draws from another distribution"),
        ({"dual": 1.0}, "must be above the ratio's own limit"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rehearse(make("ppo", **changes))
