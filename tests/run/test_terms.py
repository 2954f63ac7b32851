"""Averages of terms, against sums written out by hand."""

import pytest
import torch

from kullback.run.controllers import parse_schedule
from kullback.run.seeds import derive, generator
from kullback.run.tally import Tally
from kullback.run.terms import Term, denominator, numerator

VALUE = torch.tensor([[1.0, 2.0, 4.0], [8.0, torch.nan, torch.nan]])
COLUMNS = {
    "scored": torch.tensor([[True, True, True], [True, False, False]]),
    "rows": torch.tensor([True, True]),
    "w": torch.tensor([[1.0, 0.0, 3.0], [2.0, torch.nan, torch.nan]]),
}


@pytest.mark.parametrize(
    ("mean", "weight", "expected"),
    [
        ("token", None, 15 / 4),
        ("row", None, (7 / 3 + 8) / 2),
        ("row_sum", None, 15 / 2),
        ("token", "w", (1 + 12 + 16) / 4),
        ("row", "w", (13 / 3 + 16) / 2),
        ("row_sum", "w", (13 + 16) / 2),
        ("weight", "w", (1 + 12 + 16) / 6),
    ],
)
def test_means(mean: str, weight: str | None, expected: float) -> None:
    term = Term("t", VALUE, weight=weight, mean=mean)  # type: ignore[arg-type]
    assert float(numerator(term, COLUMNS) / denominator(COLUMNS, *term.key)) == pytest.approx(expected)


def test_masked_nan_has_no_gradient() -> None:
    value = VALUE.clone().requires_grad_()
    numerator(Term("t", value, weight="w", mean="row"), COLUMNS).backward()
    assert value.grad is not None
    torch.testing.assert_close(value.grad, torch.tensor([[1 / 3, 0, 1], [2.0, 0, 0]]))


def test_a_term_per_row() -> None:
    term = Term("t", torch.tensor([1.0, 5.0]), over="rows", mean="token")
    assert float(numerator(term, COLUMNS) / denominator(COLUMNS, *term.key)) == 3.0


@pytest.mark.parametrize(
    ("value", "over", "mean", "weight", "words"),
    [
        (VALUE, "scored", "token", None, "mean over scored tokens of the step"),
        (VALUE, "scored", "row", "w", "mean over rows of each row's mean over scored tokens of the step, each times w"),
        (VALUE, "scored", "weight", "w", "mean over scored tokens of the step, weighted by w"),
        (VALUE[:, 0], "pairs", "row_sum", None, "mean over pairs of the step"),
        (VALUE[:, 0], "pairs", "weight", "w", "mean over pairs of the step, weighted by w"),
    ],
)
def test_a_term_says_what_it_is_averaged_over(value, over, mean, weight, words) -> None:  # type: ignore[no-untyped-def]
    assert Term("t", value, over=over, mean=mean, weight=weight).averaged == words


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"term 't': value has shape \(2,\), but over='scored' has \(2, 3\)"):
        numerator(Term("t", torch.zeros(2), mean="token"), COLUMNS)


def test_seeds_are_equal_for_equal_purposes_only() -> None:
    assert derive(0, "a", 1) == derive(0, "a", 1)
    assert len({derive(0, "a", 1), derive(0, "a", "1"), derive(1, "a", 1), derive(0, "a", 11), derive(0, "a1")}) == 5
    assert torch.rand(3, generator=generator(5, "x")).tolist() == torch.rand(3, generator=generator(5, "x")).tolist()


def test_schedules() -> None:
    ramp = parse_schedule("signal.temperature", "linear(2.0 -> 1.0, steps=10, hold=5)")
    assert [ramp.update({}, step, {})[1]["signal.temperature"] for step in (0, 5, 10, 15, 99)] == [
        2.0,
        2.0,
        1.5,
        1.0,
        1.0,
    ]
    cosine = parse_schedule("x.y", "cosine(0 -> 1, steps=2)")
    assert cosine.update({}, 1, {})[1]["x.y"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="is not understood; write"):
        parse_schedule("x.y", "exponential(1 -> 2)")
    with pytest.raises(ValueError, match="must be at least"):
        parse_schedule("x.y", "linear(1 -> 2, steps=0)")


def test_tally_divides_sums_by_counts() -> None:
    tally = Tally()
    tally.add("a", 3.0, 2)
    tally.add("a", 5.0, 2)
    tally.add("n", 7, 1)
    tally.add("never", 0.0, 0)
    assert tally.take(sums=("n",)) == {"a": 2.0, "n": 7.0}
    assert tally.take() == {}
