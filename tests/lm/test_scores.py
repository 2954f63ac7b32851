"""Scores: the same numbers as by themselves, each forward pass made once, and kept only where nothing changes."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch

from kullback.lm import forwards as reading
from kullback.lm.cache import ScoreCache
from kullback.lm.engine import Engine
from kullback.lm.forwards import Forwards, read
from kullback.lm.rollout import Rollout, concatenate
from kullback.lm.scores import Scores
from kullback.lm.targets import frozen
from kullback.run.state import load_state, save_state
from tests.lm.small import gradient, make, make_moment, random_model

PAIR = ("log_prob:teacher", "entropy:teacher", "forward_kl:teacher,student", "jsd(0.3):teacher,student")


@pytest.fixture(autouse=True)
def one_row_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what a forward pass is given tells how many rows it reads."""
    monkeypatch.setattr(reading, "reads_lines", lambda model: False)


def counting(at: Any, name: str) -> list[int]:
    """From here on, the rows of each forward pass of a player."""
    rows: list[int] = []
    at.model(name).model.register_forward_hook(
        lambda module, args, kwargs, out: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return rows


class Asks:
    """A method as it is, with other scores and passes."""

    def __new__(cls, name: str, scores: tuple[str, ...], passes: int = 1, **changes: Any) -> Any:
        base = make(name, **changes)
        kind = type(
            "Asking",
            (type(base),),
            {"scores": property(lambda self: scores), "passes": property(lambda self: passes)},
        )
        return kind(**{field.name: getattr(base, field.name) for field in dataclasses.fields(base)})


@pytest.mark.parametrize("pieces", [1, 4])
def test_the_teacher_reads_each_row_once_a_step(pieces: int) -> None:
    """Two scores of the teacher, two of the pair, and the target of the loss: one pass per distinct row."""
    method = Asks("word_kd", PAIR)
    at = make_moment(method)
    engine = Engine(method, at, micro_batches=pieces)
    rows = counting(at, "teacher")
    loss, found = gradient(engine)
    assert rows == [8]

    plain = make("word_kd")
    live = make_moment(plain)
    seen = counting(live, "teacher")
    expected_loss, expected = gradient(Engine(plain, live, micro_batches=pieces))
    assert sum(seen) == 8
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_student_is_scored_in_one_pass() -> None:
    method = Asks("word_kd", ("log_prob:student", "entropy:student", "reverse_kl:teacher,student"))
    at = make_moment(method)
    engine = Engine(method, at)
    rows = counting(at, "student")
    engine.draw()
    assert rows == [8]


def test_a_second_pass_over_a_draw_asks_the_teacher_nothing() -> None:
    method = Asks("word_kd", (), passes=3)
    at = make_moment(method)
    engine = Engine(method, at, micro_batches=2)
    rows = counting(at, "teacher")
    for update in range(3):
        gradient(engine, update)
    assert sum(rows) == 8
    gradient(engine, 3)  # another draw
    assert sum(rows) == 16


@pytest.mark.parametrize("scores", [("log_prob:teacher",), PAIR, ("entropy:student", "log_prob:student")])
def test_each_score_is_the_one_measured_alone(scores: tuple[str, ...]) -> None:
    method = make("gkd")
    at = make_moment(method)
    engine = Engine(method, at)
    rollout = engine.draw().rollout
    together = engine.scores.measure(scores, rollout, engine.targets)
    for name in scores:
        kind, _, who = name.partition(":")
        if kind not in ("log_prob", "entropy"):
            continue
        (seen,) = [read(at.model(who), rollout)]
        alone = seen.log_probs() if kind == "log_prob" else seen.entropy()
        torch.testing.assert_close(together[name], alone.detach(), rtol=1e-5, atol=1e-5)


def doubled(rollout: Rollout) -> Rollout:
    return concatenate([rollout, rollout.rows([2, 0])])


def test_equal_rows_are_read_once_and_score_alike() -> None:
    method = Asks("word_kd", PAIR)
    at = make_moment(method)
    engine = Engine(method, at)
    rollout = engine.draw().rollout
    rows = counting(at, "student")
    found = engine.scores.measure(PAIR, doubled(rollout), engine.targets)
    assert rows == [8]
    for grid in found.values():
        assert torch.equal(grid[8:], grid[[2, 0]])
    once = engine.scores.measure(PAIR, rollout, engine.targets)
    for name in PAIR:
        torch.testing.assert_close(found[name][:8], once[name])


def test_equal_rows_are_read_once_in_the_loss() -> None:
    """Rows that differ only in their padding are equal; rows of which other tokens count are not."""
    at = make_moment(make("word_kd"))
    rollout = Engine(at.method, at).draw().rollout
    again = doubled(rollout)
    padding = again.origin == 0
    again.completions[8:][padding[8:]] = 7
    rows = counting(at, "teacher")
    seen = frozen("teacher").predict(again, at)
    assert rows == [8]
    torch.testing.assert_close(seen.log_probs(), read(at.model("teacher"), again).log_probs(), rtol=1e-5, atol=1e-5)

    again.origin[9, 0] = 4  # a tool's: read, not scored
    rows.clear()
    fewer = frozen("teacher").predict(again, at)
    assert rows == [9]
    torch.testing.assert_close(fewer.log_probs(), read(at.model("teacher"), again).log_probs(), rtol=1e-5, atol=1e-5)


def test_fixed_text_is_scored_once_in_a_run() -> None:
    """A second epoch reads the teacher from memory, with the values of a fresh pass; the student is read anew."""
    method = Asks("sft", ("log_prob:teacher", "log_prob:student"))
    at = make_moment(method)
    at.task.train = at.task.train[:8]  # an epoch is a step
    engine = Engine(method, at)
    first, rows = engine.draw(), counting(at, "teacher")
    with torch.no_grad():
        for parameter in at.model("student").parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    at.step = 1
    second = engine.draw()
    assert rows == []
    order = {note["problem_id"]: i for i, note in enumerate(first.rollout.notes)}
    place = [order[note["problem_id"]] for note in second.rollout.notes]
    kept, fresh = second["log_prob:teacher"], read(at.model("teacher"), second.rollout).log_probs()
    assert torch.equal(kept, first["log_prob:teacher"][place])
    torch.testing.assert_close(kept, fresh, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        second["log_prob:student"], read(at.model("student"), second.rollout).log_probs().detach(), rtol=1e-5, atol=1e-5
    )
    assert float((second["log_prob:student"] - first["log_prob:student"][place]).abs().max()) > 1e-3


def test_nothing_is_kept_of_a_player_that_is_trained_or_was_changed() -> None:
    method = Asks("sft", ("log_prob:reference",))
    at = make_moment(method)
    at.task.train = at.task.train[:8]
    at.players["reference"] = random_model(5)  # its weights take gradients
    engine = Engine(method, at)
    engine.draw()
    rows = counting(at, "reference")
    engine.draw()
    assert rows == [8]

    at.model("reference").requires_grad_(False)
    rows.clear()
    before = engine.draw()["log_prob:reference"]
    engine.draw()
    assert rows == [8]
    with torch.no_grad():
        next(at.model("reference").parameters()).mul_(1.5)  # as a copy of weights does
    after = engine.draw()["log_prob:reference"]
    assert rows == [8, 8]
    assert float((before - after).abs().max()) > 1e-3


def test_the_student_s_own_text_is_not_kept() -> None:
    method = make("minillm")
    engine = Engine(method, make_moment(method))
    engine.draw()
    assert engine.scores.kept.state() == {}


def test_a_checkpoint_brings_the_kept_scores_back(tmp_path: Any) -> None:
    method = Asks("sft", ("log_prob:teacher",))
    at = make_moment(method)
    at.task.train = at.task.train[:8]
    engine = Engine(method, at)
    first = engine.draw()
    save_state(engine.state(), tmp_path)
    again = make_moment(method)
    again.task.train = again.task.train[:8]
    resumed = Engine(method, again)
    resumed.restore(load_state(tmp_path))
    rows = counting(again, "teacher")
    assert torch.equal(resumed.draw()["log_prob:teacher"], first["log_prob:teacher"])
    assert rows == []


def test_a_full_memory_keeps_what_it_has() -> None:
    cache = ScoreCache(most=5)
    for number, length in enumerate((3, 4, 2)):
        cache.add("log_prob:teacher", str(number), torch.full((length,), float(number)))
    assert set(cache.of("log_prob:teacher", (1,))) == {"0", "2"}
    assert cache.of("log_prob:teacher", (2,)) == {}  # other weights
    cache.add("log_prob:teacher", "3", torch.zeros(5))
    assert set(cache.of("log_prob:teacher", (2,))) == {"3"}


def test_hidden_states_stay_only_of_frozen_players_that_are_asked_again() -> None:
    at = make_moment(make("word_kd"))
    rollout = Engine(at.method, at).draw().rollout
    forwards, asked = Forwards(), Counter[str]()
    for name in ("student", "teacher"):
        at.model(name).model.register_forward_hook(lambda *_, name=name: asked.update([name]))
    forwards.begin(keep=("student", "teacher"))
    for _ in range(2):
        for name in ("student", "teacher"):
            forwards.predict(name, at.model(name), rollout, rollout.prompts)
    assert asked == {"student": 2, "teacher": 1}
    forwards.begin(keep=())
    for _ in range(2):
        forwards.predict("teacher", at.model("teacher"), rollout, rollout.prompts)
    assert asked["teacher"] == 3


def test_a_head_that_is_a_module_is_read_once_too() -> None:
    at = make_moment(make("word_kd"))
    rollout = doubled(Engine(at.method, at).draw().rollout)
    teacher = at.model("teacher")
    head = torch.nn.Sequential(teacher.get_output_embeddings()).requires_grad_(False)
    teacher.set_output_embeddings(head)
    rows = counting(at, "teacher")
    seen = at.forwards.predict("teacher", teacher, rollout, rollout.prompts)
    assert rows == [8]
    assert seen.kind == "logits"
    torch.testing.assert_close(seen.log_probs(), read(teacher, rollout).log_probs(), rtol=1e-5, atol=1e-5)


def test_a_score_of_a_truncated_target_is_refused() -> None:
    method = make("word_kd", top_k=4)
    at = make_moment(method)
    scores = Scores(at, lambda _: {})
    rollout = Engine(method, at).draw().rollout
    with pytest.raises(ValueError, match="has 'top_k' predictions; this score needs the whole vocabulary"):
        scores.measure(["entropy:teacher"], rollout, method.targets())
