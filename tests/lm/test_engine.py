"""The step: how it is cut, padded, packed or spread over processes must not change a gradient."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kullback.lm.engine import Engine
from kullback.lm.method import methods
from kullback.lm.rehearse import rehearse
from kullback.lm.rollout import Origin
from tests.lm.small import CASES, gradient, make, make_moment


def score(engine: Engine, name: str, rollout: Any) -> torch.Tensor:
    return engine.scores.measure([name], rollout, engine.targets)[name]


def test_every_method_is_in_the_table() -> None:
    assert set(CASES) == set(methods())
    assert len(CASES) >= 15


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("aggregate", ["token", "row", "row_sum"])
def test_the_cut_of_the_step_changes_nothing(name: str, aggregate: str) -> None:
    method = make(name, aggregate=aggregate)
    whole_loss, whole = gradient(Engine(method, make_moment(method)))
    assert float(whole.abs().max()) > 1e-4
    for pieces in (2, 4, 8, 20):
        loss, cut = gradient(Engine(method, make_moment(method), micro_batches=pieces))
        assert loss == pytest.approx(whole_loss, rel=1e-5, abs=1e-6)
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("side", ["left", "packed"])
def test_padding_and_packing_change_nothing(name: str, side: Any) -> None:
    method = make(name)
    loss_right, right = gradient(Engine(method, make_moment(method)))
    loss, other = gradient(Engine(method, make_moment(method), side=side, micro_batches=2))
    assert loss == pytest.approx(loss_right, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(other, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_what_is_masked_changes_nothing_and_what_is_scored_does(name: str) -> None:
    """Poison the padding, then a token that only stands after the last scored one, then a scored one."""
    method = make(name)
    engine = Engine(method, make_moment(method))
    (micro,) = engine.prepare(0)
    engine.at.model("student").zero_grad()
    clean = float(engine.loss(micro))

    def with_rows(completions: torch.Tensor, log_probs: torch.Tensor | None = None) -> Any:
        rollout = dataclasses.replace(micro.rollout, completions=completions)
        if log_probs is not None:
            rollout = dataclasses.replace(rollout, log_probs=log_probs)
        columns = {
            key: torch.where(micro["scored"], values, torch.nan)
            if values.is_floating_point() and values.dim() == 2
            else values
            for key, values in micro.columns.items()
        }
        return dataclasses.replace(micro, rollout=rollout, columns=columns)

    pad = micro.rollout.origin == Origin.PAD
    assert pad.any()
    poisoned = torch.where(pad, torch.randint_like(micro.rollout.completions, 5, 60), micro.rollout.completions)
    assert float(
        engine.loss(with_rows(poisoned, torch.where(pad, torch.nan, micro.rollout.log_probs)))
    ) == pytest.approx(clean, abs=1e-7)

    changed = micro.rollout.completions.clone()
    longest = int(micro.rollout.lengths.argmax())
    changed[longest, 0] = (changed[longest, 0] + 1) % 60 + 5
    assert abs(float(engine.loss(with_rows(changed))) - clean) > 1e-6


def test_rows_of_a_tool_are_read_but_not_trained() -> None:
    method = make("sft")
    engine = Engine(method, make_moment(method))
    (micro,) = engine.prepare(0)
    origin = micro.rollout.origin.clone()
    origin[:, 0] = Origin.TOOL
    rollout = dataclasses.replace(micro.rollout, origin=origin)
    columns = dict(micro.columns) | {"scored": rollout.scored}
    engine.step_batch = dataclasses.replace(micro, rollout=rollout, columns=columns)
    fewer = float(engine.loss(engine.step_batch))
    log_probs = _log_probs(engine.at.model("student"), rollout)
    keep = rollout.scored
    assert fewer == pytest.approx(-float(log_probs[keep].mean()), rel=1e-5)


def _log_probs(model: Any, rollout: Any) -> torch.Tensor:
    """The plain way: one row at a time, the model's own logits, a gather."""
    grid = torch.zeros(rollout.completions.shape)
    for i, prompt in enumerate(rollout.prompts):
        length = int(rollout.lengths[i])
        ids = torch.tensor([prompt + rollout.completions[i, :length].tolist()])
        log_p = model(input_ids=ids).logits.detach().float().log_softmax(-1)[0]
        for t in range(length):
            grid[i, t] = log_p[len(prompt) + t - 1, int(rollout.completions[i, t])]
    return grid


def test_log_probs_of_the_batch_are_those_of_rows_alone() -> None:
    method = make("gkd")
    engine = Engine(method, make_moment(method))
    rollout = engine.draw().rollout
    plain = _log_probs(engine.at.model("student"), rollout)
    torch.testing.assert_close(
        score(engine, "log_prob:student", rollout) * rollout.scored, plain * rollout.scored, rtol=1e-4, atol=1e-5
    )


def test_the_sampler_s_log_probs_are_the_model_s() -> None:
    method = make("vopd")
    engine = Engine(method, make_moment(method))
    rollout = engine.draw().rollout
    plain = _log_probs(engine.at.model("student"), rollout)
    torch.testing.assert_close(rollout.log_probs[rollout.scored], plain[rollout.scored], rtol=1e-4, atol=1e-4)


def test_scores_are_the_divergences_of_the_two_models() -> None:
    method = make("on_policy_distillation")
    engine = Engine(method, make_moment(method))
    rollout = engine.draw().rollout
    grid = score(engine, "forward_kl:teacher,student", rollout)
    i, t = (int(x[0]) for x in rollout.scored.nonzero(as_tuple=True))
    ids = torch.tensor([rollout.prompts[i] + rollout.completions[i, : t + 1].tolist()])
    theirs, ours = (
        engine.at.model(name)(input_ids=ids).logits[0, len(rollout.prompts[i]) + t - 1]
        for name in ("teacher", "student")
    )
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=theirs), torch.distributions.Categorical(logits=ours)
    )
    assert float(grid[i, t]) == pytest.approx(float(expected), rel=1e-4)


def test_teacher_s_text_is_written_once() -> None:
    method = make("sequence_kd")
    at = make_moment(method)
    at.task.train = at.task.train[:8]  # one epoch a step
    engine = Engine(method, at)
    first = _by_problem(engine.draw().rollout)
    with torch.no_grad():
        for parameter in at.model("teacher").parameters():
            parameter.zero_()
    at.step = 1
    assert _by_problem(engine.draw().rollout) == first


def _by_problem(rollout: Any) -> dict[str, list[int]]:
    return {note["problem_id"]: row.tolist() for note, row in zip(rollout.notes, rollout.completions, strict=True)}


def test_vopd_second_pass_uses_the_first_pass_s_ratio() -> None:
    """With two updates over one draw the ratio is to the policy that wrote, and the same rows come twice."""
    method = make("vopd", updates=2)
    engine = Engine(method, make_moment(method))
    first = engine.prepare(0)[0].rollout.completions
    with torch.no_grad():
        for parameter in engine.at.model("student").parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    (micro,) = engine.prepare(1)
    assert torch.equal(micro.rollout.completions, first)
    old = micro["log_prob:student"]
    new = score(engine, "log_prob:student", micro.rollout)
    assert float((old - new)[micro["scored"]].abs().max()) > 1e-3
    third = engine.prepare(2)[0].rollout.completions
    assert third.shape != first.shape or not torch.equal(third, first)


@pytest.mark.parametrize("name", CASES)
def test_rehearsal_accepts_every_method(name: str) -> None:
    for term in rehearse(make(name)):
        assert term.says


@pytest.mark.parametrize("name", ["gkd", "vopd", "minillm", "grpo", "ppo", "dph_rl"])
def test_two_processes_give_the_gradient_of_one(name: str, tmp_path: Path) -> None:
    method = make(name)
    loss, whole = gradient(Engine(method, make_moment(method)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{root / 'src'}"
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.lm.one_of_two", name, str(tmp_path)],
            env=environment | {"RANK": rank},
            cwd=root,
        )
        for rank in ("0", "1")
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    found = torch.load(tmp_path / "gradient.pt", weights_only=True)
    assert json.loads((tmp_path / "loss.json").read_text()) == pytest.approx(loss, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
