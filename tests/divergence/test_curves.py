"""The three curves: definitions, identities, both ends, every dtype."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kullback.divergence import divergence, divergences

from .table import GENERATORS, NAMED, SMOOTH, TABLE, centred

GRID = torch.linspace(-9, 9, 73, dtype=torch.float64) + 0.013
FAR = torch.tensor([-1e4, -1e3, -300, -95, -20, -1e-3, -1e-6, 0, 1e-6, 1e-3, 20, 95, 300, 1e3, 1e4])


@pytest.mark.parametrize("name", GENERATORS)
def test_value_is_the_centred_generator(name):
    """f(u) of the definition, with f'(1) = 0."""
    torch.testing.assert_close(TABLE[name].value(GRID), centred(name, GRID.exp()), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", TABLE)
def test_link_is_the_derivative_of_the_perspective(name):
    """g = d/dm [m f(t / m)] and f' = d/dt [m f(t / m)], by central differences in the masses."""
    D = TABLE[name]
    t, m, step = torch.exp(GRID * 0.6), torch.full_like(GRID, 0.7), 1e-5

    def perspective(t, m):
        return D.weighted_value(t.log(), m.log())

    by_model = (perspective(t, m * (1 + step)) - perspective(t, m * (1 - step))) / (2 * m * step)
    by_target = (perspective(t * (1 + step), m) - perspective(t * (1 - step), m)) / (2 * t * step)
    ratio = t.log() - m.log()
    scale = 1e-9 + perspective(t, m).abs() + 1
    assert ((D.link(ratio) - by_model).abs() / scale).max() < 1e-7
    assert ((D.slope(ratio) - by_target).abs() * t / scale).max() < 1e-7
    torch.testing.assert_close(D.weighted_link(t.log(), m.log()), m * D.link(ratio))
    torch.testing.assert_close(D.weighted_slope(t.log(), m.log()), t * D.slope(ratio))


@pytest.mark.parametrize("name", SMOOTH)
def test_curvature_is_minus_the_slope_of_the_link(name):
    """h = -dg / d log u, by autograd through the link and by central differences."""
    D = TABLE[name]
    x = GRID.clone().requires_grad_()
    (slope,) = torch.autograd.grad(D.link(x).sum(), x)
    torch.testing.assert_close(-slope, D.curvature(GRID), rtol=1e-6, atol=1e-9)
    step = 1e-4
    numeric = -(D.link(GRID + step) - D.link(GRID - step)) / (2 * step)
    torch.testing.assert_close(numeric, D.curvature(GRID), rtol=1e-5, atol=1e-6)
    assert D.curvature(torch.zeros((), dtype=torch.float64)).item() == pytest.approx(D.second_derivative_at_one)


@pytest.mark.parametrize("name", TABLE)
def test_gauge(name):
    """f(1) = g(1) = f'(1) = 0 exactly, f >= 0, and g falls."""
    D = TABLE[name]
    zero = torch.zeros(1, dtype=torch.float64)
    assert D.value(zero) == 0
    assert D.link(zero).abs() < 1e-15
    assert D.slope(zero).abs() < 1e-15
    assert (D.value(GRID) >= 0).all()
    assert (D.link(GRID).diff() <= 1e-12).all()


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_far_ratios_are_never_nan(name, dtype):
    """Log-ratios up to 1e4: infinite only where the dtype ends, never NaN; also as products with tiny weights."""
    D, x = TABLE[name], FAR.to(dtype)
    for curve in (D.value, D.link, D.slope, D.curvature):
        assert not curve(x).isnan().any(), curve
    weights = torch.tensor([0.0, -1.0, -90.0, -800.0, -1e4, -torch.inf], dtype=dtype)
    t, m = weights[:, None], weights[None, :]
    for curve in (D.weighted_value, D.weighted_link, D.weighted_slope, D.weighted_plain):
        assert not curve(t, m).isnan().any(), curve
    assert (D.weighted_value(t, m) >= 0).all()
    nothing = torch.full((1,), -torch.inf, dtype=dtype)
    assert D.weighted_value(nothing, nothing) == 0
    assert D.weighted_link(nothing, nothing) == 0


@pytest.mark.parametrize("name", [n for n in NAMED if n in GENERATORS])
def test_far_values_against_arbitrary_precision(name):
    """float32 and float64 agree with 60 digits wherever the truth is within their range."""
    D = TABLE[name]
    formula = {
        "forward_kl": lambda u: u * mpmath.log(u) - u + 1,
        "reverse_kl": lambda u: -mpmath.log(u) + u - 1,
        "jeffreys": lambda u: (u - 1) * mpmath.log(u),
        "squared_hellinger": lambda u: (1 - mpmath.sqrt(u)) ** 2 / 2,
        "tv": lambda u: abs(u - 1) / 2,
        "pearson_chi2": lambda u: (u - 1) ** 2,
        "neyman_chi2": lambda u: (u - 1) ** 2 / u,
        "chi2_kl": lambda u: (u - 1) ** 2 / (2 * u) - mpmath.log(u) + u - 1,
        "le_cam": lambda u: (u - 1) ** 2 / (2 * (u + 1)),
    }.get(name)
    if name.startswith("alpha"):
        a = mpmath.mpf(name[6:-1])
        formula = lambda u: (u**a - (1 - a) - a * u) / (a * (a - 1))  # noqa: E731
    elif name.startswith("jsd"):
        b = mpmath.mpf(name[4:-1])
        formula = lambda u: b * u * mpmath.log(u / (b * u + 1 - b)) - (1 - b) * mpmath.log(b * u + 1 - b)  # noqa: E731
    elif name.startswith("skew_kl"):
        a = mpmath.mpf(name[8:-1])
        formula = lambda u: u * mpmath.log(u / (a * u + 1 - a)) - (1 - a) * (u - 1)  # noqa: E731
    elif name.startswith("skew_reverse"):
        a = mpmath.mpf(name[16:-1])
        formula = lambda u: -mpmath.log(a + (1 - a) * u) + (1 - a) * (u - 1)  # noqa: E731
    with mpmath.workdps(60):
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
            biggest = torch.finfo(dtype).max
            for x in FAR.to(dtype).tolist():
                exact = formula(mpmath.e ** mpmath.mpf(x))
                got = D.value(torch.tensor(x, dtype=dtype)).item()
                if exact > biggest:
                    assert got == math.inf, (dtype, x)
                elif exact > torch.finfo(dtype).tiny:
                    # exp(x) itself is known to x * eps only
                    assert got == pytest.approx(float(exact), rel=tolerance * max(1, abs(x) / 20)), (dtype, x)


@pytest.mark.parametrize("name", TABLE)
def test_ends(name):
    """The limits that replace zero weights are the limits of the curves."""
    D = TABLE[name]
    far = torch.tensor([-700.0, 700.0], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    low, high = D.value(far)[0].item(), D.weighted_value(zero, -far)[1].item()
    for limit, near in ((D.f_at_zero, low), (D.f_slope_at_infinity, high), (D.link_at_zero, D.link(far)[0].item())):
        assert near > 15 if math.isinf(limit) else near == pytest.approx(limit, rel=1e-5), name
    near = D.link(far)[1].item()
    assert near < -15 if math.isinf(D.link_at_infinity) else near == pytest.approx(D.link_at_infinity, rel=1e-5)
    assert D.has_closed_form == math.isinf(D.link_at_infinity)
    ends = torch.tensor([-torch.inf, torch.inf])
    assert D.link(ends).tolist() == pytest.approx([D.link_at_zero, D.link_at_infinity])
    none, one = torch.tensor(-torch.inf), torch.tensor(0.0)
    assert D.weighted_value(none, one).item() == pytest.approx(D.f_at_zero)
    assert D.weighted_value(one, none).item() == pytest.approx(D.f_slope_at_infinity)
    for curve in (D.weighted_link, D.weighted_slope):
        for t, m in ((none, one), (one, none)):
            at, near = curve(t, m).item(), curve(t.clamp(min=-600).double(), m.clamp(min=-600).double()).item()
            assert at * near > 100 if math.isinf(at) else at == pytest.approx(near, rel=1e-4, abs=1e-6), curve


def test_which_members_allow_a_closed_form():
    """Card 01: refused are tv, alpha(a) with a < 0, le_cam and the skewed forward KL."""
    refused = {name for name in NAMED if not divergence(name).has_closed_form}
    assert refused == {"tv", "alpha(-0.5)", "neyman_chi2", "le_cam", "skew_kl(0.1)", "skew_kl(0.7)"}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_inverse_link(name, dtype):
    """link(inverse_link(g)) = g inside the range, +-inf outside, derivative -1 / h."""
    D = TABLE[name]
    x = torch.linspace(-6, 6, 25, dtype=dtype)
    if dtype == torch.float64:
        torch.testing.assert_close(D.inverse_link(D.link(x)), x, rtol=1e-6, atol=1e-6)
    else:  # where g saturates, float32 cannot tell its preimages apart: compare g
        torch.testing.assert_close(D.link(D.inverse_link(D.link(x))), D.link(x), rtol=1e-5, atol=1e-6)
    low, high = D.link_at_infinity, D.link_at_zero
    outside = torch.tensor([low - 1 if math.isfinite(low) else low, high + 1 if math.isfinite(high) else high])
    assert D.inverse_link(outside.to(dtype)).tolist() == [math.inf, -math.inf]
    if dtype == torch.float64:
        g = D.link(x[3:-3]).detach().requires_grad_()
        (slope,) = torch.autograd.grad(D.inverse_link(g).sum(), g)
        torch.testing.assert_close(slope, -1 / D.curvature(x[3:-3]), rtol=1e-5, atol=1e-8)


def test_inverse_link_of_chi2_kl_is_lambert_w():
    """Card 39 on centred curves (link 0 at u = 1): inverse_link(y) = -log W0(exp(y + 1)), scipy as the oracle."""
    from scipy.special import lambertw

    y = torch.linspace(-20, 30, 41, dtype=torch.float64)
    expected = -torch.as_tensor(lambertw((y + 1).exp().numpy()).real).log()
    torch.testing.assert_close(divergence("chi2_kl").inverse_link(y), expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e4, 1e4), st.floats(-1e4, 0), st.sampled_from(sorted(TABLE)))
def test_any_ratio(ratio, model, name):
    """No pair of weights gives NaN or a negative value, in either precision."""
    D = TABLE[name]
    for dtype in (torch.float32, torch.float64):
        x, m = torch.tensor([ratio], dtype=dtype), torch.tensor([model], dtype=dtype)
        for out in (D.value(x), D.weighted_value((m + x).clamp(max=0), m)):
            assert (out >= 0).all()  # also false for NaN
        for out in (D.link(x), D.curvature(x), D.weighted_link((m + x).clamp(max=0), m)):
            assert not out.isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_inputs_are_upcast(dtype):
    x = torch.tensor([-3.0, 0.5], dtype=dtype)
    for name in divergences():
        out = divergence(name).value(x)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, divergence(name).value(x.float()))


def test_small_ratios_keep_their_digits():
    """Near equality f = f''(1) log_ratio^2 / 2, to relative precision: no cancellation, no negative value."""
    x = torch.tensor([1e-3, -1e-3, 3e-4, 1e-5])
    for name in SMOOTH:
        D = TABLE[name]
        torch.testing.assert_close(D.value(x), D.second_derivative_at_one * x**2 / 2, rtol=6e-3, atol=1e-14)
