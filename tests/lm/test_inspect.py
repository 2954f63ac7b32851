"""What is printed before a run is the step itself: its numbers add up to the loss, its text is shown as it is."""

import dataclasses
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from kullback.lm.engine import Engine
from kullback.lm.inspect import inspect
from kullback.lm.plan import Plan
from kullback.lm.settings import TrainSettings
from kullback.lm.tasks import load_task
from kullback.lm.tiny import build_tokenizer
from tests.lm.small import CASES, ROWS, make, make_moment, random_model


def plan(name: str, data: Any = ROWS, **changes: Any) -> Plan:
    method = make(name, **changes)
    if hasattr(method, "teacher"):
        method = dataclasses.replace(method, teacher=random_model(2, hidden=24))
    train = TrainSettings(prompts_per_step=4, micro_batches=2, device="cpu")
    return Plan(method, random_model(1), load_task(data, seed=0), Path("unused"), build_tokenizer(), train)


def at_width(seen: Any, width: int) -> str:
    console = Console(width=width, record=True, file=StringIO())
    console.print(seen)
    return console.export_text()


def printed(what: Plan, rows: int = 2) -> str:
    return at_width(inspect(what, rows), 220)


def token_lines(text: str) -> list[list[str]]:
    """The cells of every line that stands for a token."""
    lines = [line.strip() for line in text.splitlines()]
    return [re.split(r"\s{2,}", line) for line in lines if re.match(r"\d+\s+['\"]", line)]


@pytest.mark.parametrize("name", CASES)
def test_all_rows_together_add_the_loss_of_the_step(name: str) -> None:
    seen = inspect(plan(name), rows=100)
    for width in (80, 220):
        text = at_width(seen, width)
        (loss,) = re.findall(r"scored tokens, loss (\S+)", text)
        parts = [float(part) for part in re.findall(r"adds\s+(\S+)\s+to\s+the\s+loss", text)]
        assert len(parts) == 4 * CASES[name].get("samples", 1) + CASES[name].get("replay", 0)
        assert sum(parts) == pytest.approx(float(loss), rel=1e-4, abs=1e-5)
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text  # nothing is cut off
        assert "denominator" in text


def test_the_loss_is_the_one_that_would_be_trained() -> None:
    what = plan("vopd")
    at = make_moment(what.method, seed=0)
    at.prompts_per_step = 4
    at.task = what.task
    engine = Engine(what.method, at)
    (micro,) = engine.prepare(0)
    assert f"loss {float(engine.loss(micro).detach()):.4f}"[:-1] in printed(what)


def test_a_line_says_what_both_models_think_of_its_token() -> None:
    what = plan("word_kd", mix=0.3)
    text = printed(what, rows=1)
    tokenizer, student, teacher = what.tokenizer, what.student, what.players["teacher"]
    prompt = re.search(r"prompt \(\d+ tokens\): '(.*)'", text).group(1)
    lines = token_lines(text)
    completion = [int(cells[2]) for cells in lines]
    ids = torch.tensor([tokenizer(prompt)["input_ids"] + completion])
    with torch.no_grad():
        m, t = (model(ids).logits[0, -len(completion) - 1 : -1].log_softmax(-1) for model in (student, teacher))
    kl = (t.exp() * (t - m)).sum(-1)
    scored = float(re.search(r"(\d+) scored tokens", text).group(1))
    for place, (token, cells) in enumerate(zip(completion, lines, strict=True)):
        number, shown, _, writer, is_scored, own, theirs, match, nll, cost, *top = cells
        assert (number, writer, is_scored) == (str(place), "dataset", "yes")
        assert shown == repr(tokenizer.decode([token]))
        nats = float(m[place, token])
        assert float(own) == pytest.approx(nats, rel=1e-2)
        assert float(nll) == pytest.approx(-nats, rel=1e-2)
        assert float(theirs) == pytest.approx(float(t[place, token]), rel=1e-2)
        assert float(match) == pytest.approx(float(kl[place]), rel=1e-2)
        assert float(cost) == pytest.approx((0.7 * float(kl[place]) - 0.3 * nats) / scored, rel=1e-2)
        best = t[place].exp().topk(3)
        expected = "  ".join(f"{tokenizer.decode([int(i)])!r} {p:.2f}" for p, i in zip(*best, strict=True))
        assert "  ".join(top) == expected


def test_tokens_that_are_only_read_have_no_numbers() -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": [*talk, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}] * 4
    lines = token_lines(printed(plan("sft", rows), rows=1))
    unscored = [cells for cells in lines if cells[4] == "no"]
    assert {cells[1] for cells in unscored} >= {"'c'", "'<|user|>'"}
    assert all(cells[3] == "tool" and len(cells) == 5 for cells in unscored)
    assert [cells[1] for cells in lines if cells[4] == "yes"] == ["'b'", "'<|end|>'", "'d'", "'<|end|>'"]


def test_text_that_looks_like_markup_is_shown_as_it_is() -> None:
    text = printed(plan("sft", [{"prompt": "[red]x[/red]", "completion": "[b]\n"}] * 4), rows=1)
    assert "'<|user|>[red]x[/red]<|end|><|assistant|>'" in text
    assert [cells[1] for cells in token_lines(text)] == ["'['", "'b'", "']'", r"'\n'", "'<|end|>'"]


def test_a_teacher_known_by_its_top_tokens_shows_the_first_of_them(tmp_path: Path) -> None:
    whole = token_lines(printed(plan("word_kd"), rows=1))
    few = token_lines(printed(plan("word_kd", top_k=5, cache=str(tmp_path / "kept")), rows=1))
    assert [cells[-3:] for cells in few] == [cells[-3:] for cells in whole]
    two = token_lines(printed(plan("word_kd", top_k=2), rows=1))
    assert [cells[-2:] for cells in two] == [cells[-3:-1] for cells in whole]


def test_what_is_wrong_is_said_first() -> None:
    with pytest.raises(ValueError, match="rows=0"):
        inspect(plan("sft"), rows=0)
    with pytest.raises(ValueError, match="samples=3 would do nothing"):
        inspect(plan("sft", samples=3))
