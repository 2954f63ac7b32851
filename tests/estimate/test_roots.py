"""Roots of functions whose roots are known."""

import math

import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st

from kullback.estimate import expand, find_root


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_many_roots_at_once_agree_with_scipy():
    goals = torch.linspace(-20, 20, 41, dtype=torch.float64)
    found = find_root(lambda x: x**3 + x - goals, torch.full_like(goals, -50), torch.full_like(goals, 50))
    expected = [scipy.optimize.brentq(lambda x, g=g: x**3 + x - g, -50, 50, xtol=1e-15) for g in goals.tolist()]
    torch.testing.assert_close(found, tensor(*expected), rtol=1e-14, atol=1e-15)


@given(st.floats(-200, 0), st.booleans())
def test_a_root_keeps_its_digits_however_small(exponent, falling):
    """exp(-200) in a bracket of width 1 is still found to 1e-13 of itself."""
    root = math.exp(exponent)
    sign = -1 if falling else 1
    found = find_root(lambda x: sign * (x.log() - exponent), tensor(1e-300), tensor(2.0))
    assert found.item() == pytest.approx(root, rel=1e-13)


def test_a_smooth_function_is_asked_far_less_often_than_by_bisection():
    """Which would need log2(100 / 2^-52) = 59 values."""
    asked = []
    find_root(lambda x: asked.append(x) or x**3 + x - 7, tensor(-50.0), tensor(50.0))
    assert len(asked) < 25


def test_ends_jumps_and_infinities():
    assert find_root(lambda x: x, tensor(0.0), tensor(3.0)).item() == 0
    assert find_root(lambda x: x - 3, tensor(0.0), tensor(3.0)).item() == 3
    assert find_root(lambda x: torch.sign(x - 0.3), tensor(0.0), tensor(1.0)).item() == pytest.approx(0.3, rel=1e-14)
    poles = find_root(lambda x: 1 / (1 - x) - 4, tensor(0.0), tensor(1.0))  # infinite at its upper end
    assert poles.item() == pytest.approx(0.75, rel=1e-14)


def test_a_bracket_without_a_root_is_refused():
    with pytest.raises(ValueError, match=r"low=1, high=2.*widen"):
        find_root(lambda x: x, tensor(1.0), tensor(2.0))
    with pytest.raises(ValueError, match="NaN"):
        find_root(lambda x: x.log(), tensor(-1.0), tensor(2.0))


def test_expand_stops_at_the_first_power():
    assert expand(lambda x: x - tensor(10.0, 0.5), tensor(1.0, 1.0), factor=3.0).tolist() == [27, 1]
