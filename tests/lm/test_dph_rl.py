"""Card 04: generators, collecting, replay, and that no reference model is read."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kullback.divergence import divergence
from kullback.lm import Batch, sources
from kullback.lm.batch import base_columns
from kullback.lm.engine import Engine
from kullback.lm.predictions import LogitPredictions
from kullback.lm.replay import KEPT, OPEN, RATE, beside, collect, held
from kullback.lm.rollout import Origin, build_rollout
from kullback.lm.tasks import Problem, Task
from tests.lm.small import gradient, make, make_moment

P = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)  # the student
Q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)  # who wrote
CARD = {  # the card's generators f(v), v = student / writer
    "forward_kl": lambda v: v - 1 - v.log(),
    "2*jsd(0.5)": lambda v: v * v.log() - (v + 1) * ((v + 1) / 2).log(),
    "alpha(0.2)": lambda v: (v**0.8 - 0.8 * v - 0.2) / (0.2 * -0.8),
    "alpha(0.5)": lambda v: (v**0.5 - 0.5 * v - 0.5) / (0.5 * -0.5),
    "alpha(0.8)": lambda v: (v**0.2 - 0.2 * v - 0.8) / (0.8 * -0.2),
}
PULL = {  # its v f'(v)
    "forward_kl": lambda v: v - 1,
    "2*jsd(0.5)": lambda v: v * (2 * v / (v + 1)).log(),
    "alpha(0.2)": lambda v: (v - v**0.8) / 0.2,
    "alpha(0.5)": lambda v: (v - v**0.5) / 0.5,
    "alpha(0.8)": lambda v: (v - v**0.2) / 0.8,
}
GOLDEN = {
    "forward_kl": 0.675806,
    "2*jsd(0.5)": 0.302716,
    "alpha(0.2)": 0.626708,
    "alpha(0.5)": 0.629114,
    "alpha(0.8)": 0.650192,
    "4*squared_hellinger": 0.629114,
    "reverse_kl": 0.634897,
}


def term_of(which: str, model: torch.Tensor, writer: torch.Tensor, **options: Any) -> tuple[Any, torch.Tensor]:
    """The replay term of one row, token t having these probabilities, and its gradient wrt log model."""
    n = len(model)
    rollout = build_rollout([[0]], [[0] * n], [[int(Origin.DATASET)] * n])
    rollout = dataclasses.replace(rollout, log_probs=writer.log()[None])
    log_p = model.log().clone().requires_grad_()

    class Written(LogitPredictions):
        def token_log_probs(self) -> torch.Tensor:
            return log_p

    seen = Written(rollout.scored, torch.zeros(n, dtype=torch.long), torch.zeros(n, 1))
    batch = Batch(rollout, base_columns(rollout) | {"replay": rollout.scored}, predictions=seen)
    term = held(which, batch, **options)
    (pull,) = torch.autograd.grad(term.value.sum(), log_p, allow_unused=True)
    return term, pull


@pytest.mark.parametrize("which", GOLDEN)
def test_golden_numbers_of_the_card(which: str) -> None:
    term, _ = term_of(which, P, Q)
    assert float((Q * term.value[0].detach()).sum()) == pytest.approx(GOLDEN[which], abs=1e-6)


@given(v=st.floats(-8, 8), which=st.sampled_from(sorted(CARD)))
@settings(max_examples=60, deadline=None)
def test_value_and_weight_of_a_token_are_the_card_s(v: float, which: str) -> None:
    writer = torch.tensor([0.3], dtype=torch.float64)
    ratio = torch.tensor([math.exp(v)], dtype=torch.float64)
    term, pull = term_of(which, writer * ratio, writer)
    torch.testing.assert_close(term.value[0].detach(), CARD[which](ratio), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(pull, PULL[which](ratio), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("which", [*CARD, "squared_hellinger", "reverse_kl", "pearson_chi2", "jeffreys"])
def test_at_the_start_every_token_is_silent_and_plain_rehearsal_is_not(which: str) -> None:
    term, pull = term_of(which, Q, Q)
    assert float(term.value.detach().abs().max()) == 0
    assert float(pull.abs().max()) == 0
    _, plain = term_of("forward_kl", Q, Q, centred=False)
    assert plain.tolist() == [-1, -1, -1]


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_forward_kl_is_rehearsal_in_expectation_with_gradient_p_minus_q(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits, other = (torch.randn(6, generator=draw, dtype=torch.float64) for _ in range(2))
    p, q = logits.softmax(-1), other.softmax(-1)
    jacobian = torch.eye(6, dtype=torch.float64) - p  # of log p, rows over tokens
    for centred in (True, False):
        _, pull = term_of("forward_kl", p, q, centred=centred)
        torch.testing.assert_close((q * pull) @ jacobian, p - q, rtol=1e-10, atol=1e-12)


def test_limits_duality_and_bound() -> None:
    def value(which: str, p: torch.Tensor, q: torch.Tensor) -> float:
        return float((q * term_of(which, p, q)[0].value[0]).sum())

    assert value("alpha(0.999999)", P, Q) == pytest.approx(GOLDEN["forward_kl"], abs=1e-5)
    assert value("alpha(0.000001)", P, Q) == pytest.approx(GOLDEN["reverse_kl"], abs=1e-5)
    for a in (0.2, 0.35, 0.5):
        assert value(f"alpha({a})", P, Q) == pytest.approx(value(f"alpha({1 - a})", Q, P), abs=1e-12)
    extreme = torch.tensor([1 - 1e-9, 1e-9], dtype=torch.float64)
    assert value("2*jsd(0.5)", extreme, extreme.flip(0)) <= 2 * math.log(2)
    single = term_of("2*jsd(0.5)", torch.tensor([0.9]).double(), torch.tensor([1e-3]).double())[0]
    assert float(single.value.detach()) > 2 * math.log(2)  # a single sample is not bounded above


def test_a_lost_token_is_called_back_by_forward_kl_only_and_the_cap_silences() -> None:
    writer = torch.full((1,), 0.5, dtype=torch.float64)
    lost = writer * math.exp(-10.5)
    assert float(term_of("forward_kl", lost, writer)[1]) == pytest.approx(-1, abs=1e-4)
    for which in ("2*jsd(0.5)", "alpha(0.2)"):
        assert abs(float(term_of(which, lost, writer)[1])) < 1e-2
    for log_ratio, silent in ((-10.9, False), (-11.1, True), (2.60, False), (2.62, True)):  # the code's clamp points
        term, pull = term_of("forward_kl", writer * math.exp(log_ratio), writer, cap=10.0)
        assert (float(pull) == 0) == silent
        assert bool(term.seen["capped"][0, 0]) == silent
        assert float(term.value.detach()) <= 10


def test_extreme_ratios_stay_finite() -> None:
    writer = torch.tensor([1e-30, 1.0 - 1e-7, 1e-30], dtype=torch.float32)
    model = torch.tensor([1.0 - 1e-7, 1e-30, 1e-30], dtype=torch.float32)
    for which in CARD:
        for options in ({}, {"cap": 10.0}):
            term, pull = term_of(which, model, writer, **options)
            assert term.value.isfinite().all()
            assert pull.isfinite().all()


def test_the_row_sum_of_forward_kl_is_that_of_whole_completions() -> None:
    """All pairs of two tokens, the second depending on the first: the chain rule, by enumeration."""
    draw = torch.Generator().manual_seed(0)

    def law() -> tuple[torch.Tensor, torch.Tensor]:
        first = torch.randn(3, generator=draw, dtype=torch.float64).softmax(-1)
        return first, torch.randn(3, 3, generator=draw, dtype=torch.float64).softmax(-1)

    (p1, p2), (q1, q2) = law(), law()
    expected = {"forward_kl": 0.0, "2*jsd(0.5)": 0.0}
    for which in expected:
        for a in range(3):
            for b in range(3):
                row = term_of(which, torch.stack([p1[a], p2[a, b]]), torch.stack([q1[a], q2[a, b]]))[0].value
                expected[which] += float(q1[a] * q2[a, b] * row.detach().sum())
    p, q = (p1[:, None] * p2).flatten(), (q1[:, None] * q2).flatten()
    whole = {which: float(divergence(which).categorical(q.log(), p.log())) for which in expected}
    assert expected["forward_kl"] == pytest.approx(whole["forward_kl"], abs=1e-12)
    assert abs(expected["2*jsd(0.5)"] - whole["2*jsd(0.5)"]) > 1e-3


# Collecting


def scripted(method: Any, grades: dict[str, list[float]], **options: Any) -> Any:
    """A moment whose verifier gives each problem these grades, one after the other."""
    at = make_moment(method, **options)
    left = {name: list(values) for name, values in grades.items()}
    problems = [Problem(name, [{"role": "user", "content": f"{i}+1="}], None, "x") for i, name in enumerate(grades)]
    at.task = Task("scripted", problems, [], lambda problem, text: {"accuracy": left[problem.id].pop(0)})
    at.store, at.ledger = {}, type(at.ledger)()
    return at


def test_problems_are_split_and_one_more_answer_is_kept_if_right() -> None:
    nan = math.nan
    grades = {
        "all": [1, 1, 1, 1, 1],
        "all, then wrong": [1, 1, 1, 1, 0],
        "three": [1, 1, 0, 1, 1],
        "none": [0, 0, 0, 0, 1],
        "unknown": [1, 1, 1, nan, 1],
    }
    at = scripted(make("dph_rl", judge="accuracy"), grades)
    collect(at, attempts=4, threshold=4, answers=1)
    assert at.store[OPEN]["places"] == [2, 3, 4]
    assert list(at.store[KEPT]) == ["all"]
    assert at.ledger.mean(RATE, list(grades)).tolist() == [1, 1, 0.75, 0, 0.75]
    assert at.task.errors == 1  # the nan, counted
    assert set(at.store) == {KEPT, OPEN}  # nothing else stays in the checkpoint
    at = scripted(make("dph_rl", judge="accuracy"), grades)
    collect(at, attempts=4, threshold=3, answers=1)
    assert at.store[OPEN]["places"] == [3]


def test_stored_log_probs_are_the_initial_student_s() -> None:
    at = make_moment(make("dph_rl"))
    assert len(at.store[KEPT]) > 3
    student = at.model("student")
    for item in at.store[KEPT].values():
        for prompt, completion, log_probs in item["rows"]:
            with torch.no_grad():
                logits = student(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(log_probs), expected, rtol=1e-5, atol=1e-5)


def test_everything_mastered_is_refused_and_nothing_mastered_is_not() -> None:
    at = scripted(make("dph_rl", judge="accuracy"), {"a": [1, 1, 1], "b": [1, 1, 1]})
    with pytest.raises(ValueError, match=r"all 2 problems are mastered .* raise source\.threshold"):
        collect(at, attempts=2, threshold=2, answers=1)
    at = scripted(make("dph_rl", judge="accuracy"), {"a": [0] * 99, "b": [0, 1] * 50})
    collect(at, attempts=2, threshold=2, answers=1)
    assert at.store[KEPT] == {}
    engine = Engine(make("dph_rl", judge="accuracy", rewards=None), at)
    (micro,) = engine.prepare(0)
    assert engine.loss(micro).isfinite()
    assert not micro["replay"].any()


def test_a_grade_that_is_not_given_is_refused() -> None:
    with pytest.raises(ValueError, match=r"source\.judge='good': the verifier gives no 'good'; it gives accuracy"):
        make_moment(make("dph_rl", judge="good"))


# The step


def test_replay_is_drawn_whole_before_any_row_comes_again() -> None:
    at = make_moment(make("dph_rl"))
    count = sum(len(item["rows"]) for item in at.store[KEPT].values())
    source = beside(sources.dataset(), 1)
    orders = []
    for epoch in range(2):
        seen = []
        for at.step in range(epoch * count, (epoch + 1) * count):
            rows = source._rows(at)  # type: ignore[attr-defined]
            seen.append((rows.notes[0]["problem_id"], tuple(rows.completions[0].tolist())))
        assert sorted(seen) == sorted(
            (name, tuple(row[1])) for name, item in at.store[KEPT].items() for row in item["rows"]
        )
        orders.append(seen)
    assert orders[0] != orders[1]


def test_the_two_kinds_of_rows_do_not_mix() -> None:
    method = make("dph_rl")
    engine = Engine(method, make_moment(method))
    (micro,) = engine.prepare(0)
    assert not (micro["explore"] & micro["replay"]).any()
    replayed = micro["replay"].any(1)
    assert replayed.sum() == method.replay
    assert (micro["advantage"][replayed] == 0).all()
    mastered, open_ = set(engine.at.store[KEPT]), {engine.at.task.train[i].id for i in engine.at.store[OPEN]["places"]}
    for row, note in enumerate(micro.rollout.notes):
        assert note["problem_id"] in (mastered if replayed[row] else open_)
    student = engine.at.model("student")
    loss = engine.loss(micro)
    assert float(loss.detach()) == pytest.approx(
        -float((micro["advantage"][:, None] * micro["explore"]).sum() / micro["explore"].sum()), abs=1e-5
    )  # at the start the divergence is 0
    loss.backward()
    assert any(p.grad.abs().max() > 0 for p in student.parameters() if p.grad is not None)
    metrics = engine.metrics()
    groups = micro.rollout.group[~replayed]
    finished = micro.rollout.rewards["finished"][~replayed]
    unlike = [len(set(finished[groups == group].tolist())) > 1 for group in groups]
    assert metrics["rollout/informative"] == pytest.approx(sum(unlike) / len(unlike))  # of what was drawn, not replayed
    assert metrics["term/replay"] == pytest.approx(0, abs=1e-9)
    assert metrics["replay/ratio"] == pytest.approx(1, abs=1e-4)
    kept = ~replayed[:, None] & micro["scored"]
    assert metrics["rollout/entropy"] == pytest.approx(-float(micro.rollout.log_probs[kept].mean()), rel=1e-5)


def test_without_the_divergence_it_is_clipped_grpo_on_the_open_problems() -> None:
    method = make("dph_rl", coefficient=0.0, updates=1)
    at = make_moment(method)
    ours_loss, ours = gradient(Engine(method, at))
    grpo = make("grpo", rewards=method.rewards, samples=2, scale="group", correction=None, redraws=0, penalty=0.0,
                horizon="token", epsilon=1e-6, dual=3.0)  # fmt: skip
    other = make_moment(grpo)
    other.task = dataclasses.replace(at.task, train=[at.task.train[i] for i in at.store[OPEN]["places"]])
    loss, theirs = gradient(Engine(grpo, other))
    assert ours_loss == pytest.approx(loss, abs=1e-7)
    assert not (Engine(method, at).draw().rollout.origin == Origin.DATASET).any()
    torch.testing.assert_close(ours, theirs)
    assert float(ours.abs().max()) > 0


def test_the_gradient_is_the_sum_of_two_losses_written_out() -> None:
    method = make("dph_rl", divergence="2*jsd(0.5)", coefficient=0.7)
    at = make_moment(method)
    student = at.model("student")
    with torch.no_grad():  # away from the start, where the divergence is silent
        for i, p in enumerate(student.parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    engine = Engine(method, at, micro_batches=3)
    _, ours = gradient(engine)
    step = engine.step_batch
    assert step is not None
    student.zero_grad()
    explore, replay, tokens = 0.0, 0.0, [0, 0]
    for i, prompt in enumerate(step.rollout.prompts):
        n = int(step.rollout.lengths[i])
        ids = torch.tensor([prompt + step.rollout.completions[i, :n].tolist()])
        log_p = student(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        log_p = log_p.gather(-1, step.rollout.completions[i, :n, None])[:, 0]
        if step.rollout.notes[i]["source"] == "replay":
            v = (log_p - step.rollout.log_probs[i, :n]).exp()
            replay, tokens[1] = replay + CARD["2*jsd(0.5)"](v).sum(), tokens[1] + n
        else:
            ratio = (log_p - log_p.detach()).exp()
            explore, tokens[0] = explore - (ratio * step["advantage"][i]).sum(), tokens[0] + n
    (explore / tokens[0] + 0.7 * replay / tokens[1]).backward()  # type: ignore[union-attr]
    theirs = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_no_model_but_the_student_is_read() -> None:
    method = make("dph_rl", updates=2)
    at = make_moment(method)
    assert method.players() == {}
    assert method.targets() == {}
    calls = dict.fromkeys(at.players, 0)
    for name in at.players:

        def count(*_: Any, name: str = name) -> None:
            calls[name] += 1

        at.model(name).register_forward_hook(count)
    engine = Engine(method, at)
    for update in range(4):
        gradient(engine, update)
    assert calls["student"] > 0
    assert {name: n for name, n in calls.items() if name != "student"} == dict.fromkeys(calls.keys() - {"student"}, 0)


def test_unknown_rewards_are_left_out_and_counted() -> None:
    method = make("dph_rl", rewards=None, coefficient=0.0)
    at = make_moment(method)
    at.task.verifier = lambda problem, text: {"accuracy": math.nan if "1" in text else float(len(text) % 2)}
    engine = Engine(method, at)
    (micro,) = engine.prepare(0)
    unknown = micro.rollout.rewards["accuracy"].isnan()
    assert 0 < unknown.sum() < len(unknown)
    assert not micro["explore"][unknown].any()
    assert (micro["advantage"][unknown] == 0).all()
    assert engine.metrics()["rollout/unknown"] == pytest.approx(float(unknown.float().mean()))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"threshold": 3}, r"source\.threshold=3 counts right answers among source\.attempts=2"),
        ({"threshold": 0}, r"choose 1 to that many"),
        ({"answers": 0}, r"source\.answers=0"),
        ({"coefficient": -1.0}, r"signal\.coefficient=-1 must be at least 0"),
        ({"replay": 0}, r"source\.replay=0 leaves signal\.coefficient=0\.1 nothing to act on"),
        ({"sampling_temperature": 0.8}, r"sampling_temperature=0\.8 draws from another distribution"),
        ({"divergence": "2*jsd(0.5)", "centred": False}, r"signal\.centred=false would do nothing"),
        ({"cap": 0.0}, r"signal\.cap=0 must be above 0"),
        ({"samples": 1}, r"source\.samples=1"),
        ({"baseline": "none"}, r"divides rewards by zero"),
        ({"dual": 1.1}, r"signal\.dual=1\.1 must be above"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make("dph_rl", **changes)
