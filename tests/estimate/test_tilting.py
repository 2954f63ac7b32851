"""The tilting core against autograd, scipy and closed forms; the same law under shifts and scales."""

import math

import numpy
import pytest
import scipy.optimize
import scipy.special
import torch
from hypothesis import given
from hypothesis import strategies as st

from kullback.estimate import (
    beta_for_kl,
    beta_for_mean,
    cumulants,
    expectation,
    legendre,
    log_partition,
    tilt,
    tilted_kl,
    variance,
)


def make(seed, outcomes=7, batch=()):
    draw = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(*batch, outcomes, generator=draw, dtype=torch.float64)
    return logits.log_softmax(-1), torch.randn(*batch, outcomes, generator=draw, dtype=torch.float64)


PROBLEMS = st.integers(0, 10**6).map(make)
TILTS = st.floats(-8, 8)


@given(PROBLEMS, TILTS)
def test_log_partition_and_tilt_are_scipy_s(problem, t):
    log_p, r = problem
    log_z = scipy.special.logsumexp((t * r).numpy(), b=log_p.exp().numpy())
    assert log_partition(log_p, r, t).item() == pytest.approx(log_z, rel=1e-12, abs=1e-12)
    expected = torch.from_numpy(numpy.asarray(log_p + t * r - log_z))
    torch.testing.assert_close(tilt(log_p, r, t), expected, rtol=1e-12, atol=1e-12)


@given(PROBLEMS, TILTS, st.floats(-100, 100), st.floats(0.1, 10))
def test_a_constant_changes_nothing_and_a_scale_only_beta(problem, t, shift, scale):
    log_p, r = problem
    torch.testing.assert_close(tilt(log_p, r + shift, t), tilt(log_p, r, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(tilt(log_p, scale * r, t / scale), tilt(log_p, r, t), rtol=1e-9, atol=1e-9)
    kl = tilted_kl(log_p, r, t)
    if float(kl) > 1e-3 and t > 0:
        beta = beta_for_kl(log_p, r, kl)
        assert beta.item() == pytest.approx(t, rel=1e-6)
        assert beta_for_kl(log_p, scale * r + shift, kl).item() == pytest.approx(t / scale, rel=1e-6)


@given(PROBLEMS, TILTS)
def test_cumulants_are_derivatives_of_log_z(problem, t):
    log_p, r = problem
    at = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    derivative, found = log_partition(log_p, r, at), []
    for _ in range(4):
        (derivative,) = torch.autograd.grad(derivative, at, create_graph=True)
        found.append(derivative.detach())
    torch.testing.assert_close(cumulants(log_p, r, t), torch.stack(found), rtol=1e-8, atol=1e-8)


@given(PROBLEMS, TILTS)
def test_kl_of_a_tilt_and_its_slope(problem, t):
    """KL = t E r - log Z, by scipy's rel_entr, and its derivative is t Var."""
    log_p, r = problem
    at = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    kl = tilted_kl(log_p, r, at)
    tilted = tilt(log_p, r, t)
    assert kl.item() == pytest.approx(
        scipy.special.rel_entr(tilted.exp().numpy(), log_p.exp().numpy()).sum(), rel=1e-9, abs=1e-13
    )
    assert kl.item() == pytest.approx((t * expectation(tilted, r) - log_partition(log_p, r, t)).item(), abs=1e-11)
    (slope,) = torch.autograd.grad(kl, at)
    assert slope.item() == pytest.approx((t * variance(tilted, r)).item(), rel=1e-9, abs=1e-12)


def test_everything_is_differentiable():
    log_p, r = (x.requires_grad_() for x in make(0, batch=(2,)))
    t = torch.tensor([0.7, -1.3], dtype=torch.float64, requires_grad=True)
    for function in (log_partition, tilt, tilted_kl):
        assert torch.autograd.gradcheck(lambda s, r, t, f=function: f(s.log_softmax(-1), r, t), (log_p, r, t))


def test_nothing_cancels_at_small_tilts_and_nothing_overflows_at_large_ones():
    log_p, r = make(3)
    for t in (1e-9, 1e-7):
        assert tilted_kl(log_p, r, t).item() == pytest.approx(0.5 * t**2 * variance(log_p, r).item(), rel=1e-5)
    best = -log_p[r.argmax()].item()
    for t in (1e4, 1e200, math.inf):
        assert tilted_kl(log_p, r, t).item() == pytest.approx(best, rel=1e-12)
        assert tilt(log_p, 300 * r, t).exp().max() == 1


def test_infinite_tilts_keep_the_odds_of_ties():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0], dtype=torch.float64)
    r = torch.tensor([2.0, 2.0, 0.0, 1.0, 9.0], dtype=torch.float64)  # the best of all never happens
    expected = torch.tensor([1 / 3, 2 / 3, 0, 0, 0], dtype=torch.float64)
    for t in (1e5, math.inf):
        torch.testing.assert_close(tilt(p.log(), r, t).exp(), expected)
    torch.testing.assert_close(tilt(p.log(), r, -math.inf).exp(), torch.tensor([0, 0, 1.0, 0, 0], dtype=torch.float64))


@given(st.integers(0, 10**6), st.floats(1e-6, 0.999))
def test_a_budget_is_spent(seed, share):
    log_p, r = make(seed, batch=(3,))
    most = -log_p.gather(-1, r.argmax(-1, keepdim=True))[..., 0]
    beta = beta_for_kl(log_p, r, share * most)
    torch.testing.assert_close(tilted_kl(log_p, r, beta), share * most, rtol=1e-9, atol=1e-15)


def test_budgets_at_the_ends():
    log_p, r = make(1)
    most = -log_p[r.argmax()].item()
    assert beta_for_kl(log_p, r, 0.0) == 0
    assert 0 <= beta_for_kl(log_p, r, 1e-33) < 1e-15  # what rounding leaves of no KL at all
    assert beta_for_kl(log_p, r, 1.0001 * most) == math.inf
    assert beta_for_kl(log_p, torch.ones(7, dtype=torch.float64), 0.3) == 0  # nothing to buy
    with pytest.raises(ValueError, match="kl=-1: a budget is not negative"):
        beta_for_kl(log_p, r, -1.0)


@given(st.integers(0, 10**6), st.floats(0.001, 0.999))
def test_a_mean_is_met_and_the_rate_is_the_supremum(seed, share):
    log_p, r = make(seed)
    a = r.min() + share * (r.max() - r.min())
    rate = legendre(log_p, r, a)
    assert expectation(tilt(log_p, r, rate.t), r).item() == pytest.approx(a.item(), rel=1e-9, abs=1e-9)
    assert beta_for_mean(log_p, r, a) == rate.t
    least = scipy.optimize.minimize_scalar(lambda t: log_partition(log_p, r, t).item() - t * a.item())
    assert rate.value.item() == pytest.approx(-least.fun, rel=1e-6, abs=1e-8)


def test_rates_at_and_beyond_the_ends():
    log_p, r = make(2)
    assert legendre(log_p, r, expectation(log_p, r)).value.item() == pytest.approx(0, abs=1e-15)
    top, bottom = legendre(log_p, r, r.max()), legendre(log_p, r, r.min())
    assert (top.t, bottom.t) == (math.inf, -math.inf)
    assert top.value.item() == pytest.approx(-log_p[r.argmax()].item())
    assert bottom.value.item() == pytest.approx(-log_p[r.argmin()].item())
    assert legendre(log_p, r, r.max() + 1).value == math.inf
    assert legendre(log_p, r, r.min() - 1).t == -math.inf
    with pytest.raises(ValueError, match="mean=99: no tilt has it"):
        beta_for_mean(log_p, r, 99.0)


def test_the_rate_s_slope_is_t():
    log_p, r = make(5)
    a, h = expectation(log_p, r) + 0.4, 1e-5
    slope = (legendre(log_p, r, a + h).value - legendre(log_p, r, a - h).value) / (2 * h)
    assert slope.item() == pytest.approx(legendre(log_p, r, a).t.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("log_p", "reward", "says"),
    [
        ([0.5, 0.5], [0.0, 1.0], "log_p: its probabilities sum to 3.29744, not 1"),
        ([math.log(0.5)] * 2, [0.0, math.inf], "reward=inf: rewards must be finite"),
        ([math.log(0.5)] * 2, [0.0, math.nan], "reward=nan"),
        ([math.log(0.5)] * 2, [0.0, 1.0, 2.0], "reward has 3 outcomes, log_p 2"),
        ([math.nan, 0.0], [0.0, 1.0], "log_p: its probabilities sum to nan"),
    ],
)
def test_bad_input_is_named(log_p, reward, says):
    with pytest.raises(ValueError, match=says):
        beta_for_kl(torch.tensor(log_p, dtype=torch.float64), torch.tensor(reward, dtype=torch.float64), 0.1)


def test_no_such_cumulant():
    with pytest.raises(ValueError, match="order=5"):
        cumulants(*make(0), order=5)
