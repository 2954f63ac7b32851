"""Rows of like width go together: nothing is lost, nothing is padded for nothing, and nothing changes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kullback.lm import forwards
from kullback.lm.engine import Engine
from kullback.lm.forwards import like_widths, read
from tests.lm.small import make, make_moment

WIDTHS = st.lists(st.integers(1, 300), min_size=1, max_size=20)


def padded(widths: list[int], pieces: list[list[int]]) -> int:
    return sum(len(piece) * max(widths[i] for i in piece) for piece in pieces)


@given(widths=WIDTHS, cost=st.floats(0, 200), most=st.none() | st.integers(1, 1000))
def test_every_row_is_in_one_piece_and_pieces_pay(widths: list[int], cost: float, most: int | None) -> None:
    pieces = like_widths(widths, cost, most)
    assert sorted(i for piece in pieces for i in piece) == list(range(len(widths)))
    whole = padded(widths, [list(range(len(widths)))])
    if most is None:
        assert padded(widths, pieces) + cost * (len(pieces) - 1) <= whole + 1e-6
    else:
        assert padded(widths, pieces) <= whole
        assert all(len(piece) == 1 or padded(widths, [piece]) <= most for piece in pieces)


@given(widths=WIDTHS)
def test_pieces_that_cost_nothing_leave_no_padding(widths: list[int]) -> None:
    assert padded(widths, like_widths(widths, 0)) == sum(widths)
    assert like_widths(widths, float("inf")) == [list(range(len(widths)))]


@pytest.mark.parametrize("cost", [0.0, 5.0, 1e9])
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_the_pieces_change_neither_values_nor_gradients(
    cost: float, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = make_moment(make("word_kd"), dtype=torch.float64)
    model = at.model(name).requires_grad_(True)
    rollout = Engine(at.method, at).draw().rollout
    found = []
    for this in (float("inf"), cost):
        monkeypatch.setattr(forwards, "call_cost", lambda model, this=this: this)
        model.zero_grad()
        seen = read(model, rollout)
        seen.log_probs().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((seen.tokens, seen.log_probs().detach(), gradient))
    for plain, cut in zip(*found, strict=True):
        torch.testing.assert_close(cut, plain)
