"""Names, parameters, algebra, text form, unit scale and limits between members."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kullback.divergence import FDivergence, divergence, divergences, register, unregister
from kullback.divergence.family import aliases

from .table import COMPOSITE, NAMED, OWN, SMOOTH, TABLE

GRID = torch.linspace(-7, 7, 57, dtype=torch.float64)


def same(a, b, rtol=1e-9, atol=1e-12):
    for curve in ("value", "link", "slope", "curvature"):
        torch.testing.assert_close(getattr(a, curve)(GRID), getattr(b, curve)(GRID), rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", NAMED + COMPOSITE)
def test_text_round_trip(name):
    D = divergence(name)
    again = divergence(str(D))
    assert again == D
    assert hash(again) == hash(D)
    assert str(again) == str(D)
    assert divergence(D) is D
    assert divergence(str(D.reversed)) == D.reversed
    assert divergence(str(D.skew(0.25))) == D.skew(0.25)
    assert divergence(str(0.3 * D + divergence("tv"))) == 0.3 * D + divergence("tv")
    if D.smooth:
        assert divergence(str(D.unit)) == D.unit
        assert D.unit.unit == D.unit


def test_text_forms():
    """The examples of the design, spacing, nesting and aliases."""
    assert divergence("hellinger") == divergence("squared_hellinger")
    assert divergence(" 0.7 * forward_kl+0.3*reverse_kl ") == divergence("0.7*forward_kl + 0.3*reverse_kl")
    assert divergence("0.5*(forward_kl + reverse_kl)") == divergence("0.5*forward_kl + 0.5*reverse_kl")
    assert divergence("forward_kl*2 + forward_kl") == divergence("3*forward_kl")
    assert divergence("reversed(forward_kl)") == divergence("reverse_kl")
    assert divergence("reversed(reversed(chi2_kl))") == divergence("chi2_kl")
    assert divergence("JSD(1e-1)") == divergence("jsd(0.1)")
    assert divergence("jsd") == divergence("jsd(0.5)")
    assert divergence("alpha(-1)").reversed == divergence("alpha(2)")
    assert divergence("unit(0.5*jsd(0.1))") == divergence("unit(jsd(0.1))")
    assert str(2 * divergence("jsd(0.5)") / 2) == "jsd(0.5)"
    assert divergence("skew(forward_kl, 0)") == divergence("forward_kl")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("jsd(1.5)", "beta must be in (0, 1); did you mean jsd(0.5)?"),
        ("jsd(0)", "unit(jsd(0)), its limit on unit scale, which is forward_kl"),
        ("jsd(1)", "unit(jsd(1)), its limit on unit scale, which is reverse_kl"),
        ("skew_kl(1)", "unit(skew_kl(1))"),
        ("skew_kl(-0.1)", "a must be in [0, 1)"),
        ("skew(forward_kl, 1)", "must be in [0, 1)"),
        ("foward_kl", "did you mean forward_kl"),
        ("helinger", "hellinger"),
        ("kl", "forward_kl is KL(target || model)"),
        ("js", "2*jsd(0.5)"),
        ("chi2", "pearson_chi2 divides by the model"),
        ("forward_kl(2)", "takes no parameter"),
        ("jsd(0.1, 0.2)", "takes one parameter, beta"),
        ("forward_kl - reverse_kl", "a difference is not a divergence"),
        ("-1*forward_kl", "must be positive"),
        ("0*forward_kl", "must be positive"),
        ("forward_kl reverse_kl", 'unexpected "reverse_kl"'),
        ("unit(tv)", "no unit scale"),
        ("0.5", 'expected "*"'),
        ("", 'expected a name, found "the end"'),
        ("jsd(", "expected a number"),
        ("__import__('os')", "unknown name"),
        ("jsd(1e999)", "finite"),
    ],
)
def test_bad_text_says_what_to_do(text, says):
    with pytest.raises(ValueError) as error:
        divergence(text)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="fjsdkl_()*+-.,0123 unit(skew", max_size=25))
def test_the_parser_only_raises_value_errors(text):
    try:
        D = divergence(text)
    except ValueError:
        return
    assert divergence(str(D)) == D


@pytest.mark.parametrize("name", TABLE)
def test_reversed_swaps_the_arguments(name):
    D, generator = TABLE[name], torch.Generator().manual_seed(0)
    t, m = (torch.randn(20, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(D.reversed.categorical(t, m), D.categorical(m, t), rtol=1e-8, atol=1e-10)
    same(D.reversed.reversed, D)


@pytest.mark.parametrize("name", TABLE)
def test_algebra(name):
    """+, * and skew act on the value; scale on f''(1)."""
    D, tv = TABLE[name], divergence("tv")
    generator = torch.Generator().manual_seed(1)
    t, m = (torch.randn(20, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    both = 0.3 * D + 2 * tv
    torch.testing.assert_close(both.categorical(t, m), 0.3 * D.categorical(t, m) + 2 * tv.categorical(t, m))
    mixed = torch.log(0.3 * t.softmax(-1) + 0.7 * m.softmax(-1))
    torch.testing.assert_close(D.skew(0.3).categorical(t, m), D.categorical(t, mixed), rtol=1e-8, atol=1e-12)
    if D.smooth:
        assert (3 * D).second_derivative_at_one == pytest.approx(3 * D.second_derivative_at_one)
        assert D.skew(0.3).second_derivative_at_one == pytest.approx(0.49 * D.second_derivative_at_one)
        assert D.unit.curvature(torch.zeros(1, dtype=torch.float64)).item() == pytest.approx(1)


def test_identities_between_members():
    """Each side is computed by different formulas."""
    same(divergence("alpha(0)"), divergence("reverse_kl"))
    same(divergence("alpha(1)"), divergence("forward_kl"))
    same(divergence("4*squared_hellinger"), divergence("alpha(0.5)"))
    same(divergence("2*alpha(2)"), divergence("pearson_chi2"))
    same(divergence("2*alpha(-1)"), divergence("neyman_chi2"))
    same(divergence("skew(pearson_chi2, 0.5)"), divergence("le_cam"))
    same(divergence("reversed(skew_kl(0.3))"), divergence("skew_reverse_kl(0.3)"))
    same(divergence("skew(skew(tv, 0.2), 0.5)"), divergence("skew(tv, 0.6)"), rtol=1e-8)
    b = 0.3  # JSD as its definition: two skewed KLs
    parts = b * divergence(f"skew_kl({b})") + (1 - b) * divergence(f"skew_reverse_kl({1 - b})")
    same(parts, divergence(f"jsd({b})"))


@pytest.mark.parametrize(
    ("near", "limit"),
    [
        ("alpha(1e-7)", "reverse_kl"),
        ("alpha(-1e-7)", "reverse_kl"),
        ("alpha(0.9999999)", "forward_kl"),
        ("alpha(1.0000001)", "forward_kl"),
        ("unit(jsd(1e-9))", "forward_kl"),
        ("unit(jsd(0.999999999))", "reverse_kl"),
        ("skew_kl(1e-9)", "forward_kl"),
        ("skew_reverse_kl(1e-9)", "reverse_kl"),
        ("unit(skew_kl(0.9999999999))", "unit(skew_kl(1))"),
        ("unit(skew_reverse_kl(0.9999999999))", "unit(skew_reverse_kl(1))"),
        ("unit(jsd(0))", "forward_kl"),
        ("unit(jsd(1))", "reverse_kl"),
        ("unit(skew_kl(1))", "alpha(-1)"),
    ],
)
def test_named_limits(near, limit):
    same(divergence(near), divergence(limit), rtol=2e-5, atol=2e-6)


def test_jsd_over_beta_tends_to_forward_kl():
    """On textbook scale jsd(beta) / beta -> forward KL: a name that promises other maths fails here."""
    D = divergence("jsd(0.0001)")
    torch.testing.assert_close(D.value(GRID) / 0.0001, divergence("forward_kl").value(GRID), rtol=0.06, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_unit_jsd_is_continuous_in_beta(dtype):
    """From one KL to the other in small steps, without a jump at either end (every peer jumps a thousand-fold)."""
    generator = torch.Generator().manual_seed(0)
    t, m = (2 * torch.randn(8, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    betas = [0.0, *torch.sigmoid(torch.arange(-25, 25.1, 0.125, dtype=torch.float64)).tolist(), 1.0]
    values = []
    for beta in betas:
        D = divergence(f"unit(jsd({beta!r}))")
        m_ = m.to(dtype).requires_grad_()
        value = D.categorical(t.to(dtype), m_)
        values.append((value.sum().item(), torch.autograd.grad(value.sum(), m_)[0].norm().item()))
    for (a, da), (b, db) in itertools.pairwise(values):
        assert abs(a - b) < 0.04 * abs(a)
        assert abs(da - db) < 0.04 * abs(da)
    for end, kl in ((0, "forward_kl"), (-1, "reverse_kl")):
        assert values[end][0] == pytest.approx(divergence(kl).categorical(t, m).sum().item(), rel=1e-5)


def test_unit_scale_is_kl_to_second_order():
    generator = torch.Generator().manual_seed(0)
    t, noise = (torch.randn(40, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    kl = divergence("forward_kl").categorical(t, t + 1e-4 * noise)
    for name in SMOOTH:
        torch.testing.assert_close(TABLE[name].unit.categorical(t, t + 1e-4 * noise), kl, rtol=3e-3, atol=0)


def test_the_family_describes_itself():
    """Every member has an equation, a range, bounds that disjoint supports reach, and aliases that parse to it."""
    for name, member in divergences().items():
        D = divergence(name)
        assert "target" in member.equation
        assert D.equation
        assert member.bounds == D.bounds
        for alias in member.aliases:
            assert divergence(alias) == D
        t, m = torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0])
        assert D.categorical(t, m).item() == pytest.approx(D.bounds[1])
    assert set(aliases().values()) <= set(divergences())
    with pytest.raises(TypeError):
        divergences()["mine"] = None


def test_register_takes_three_lines():
    """A newcomer's divergence is known to the parser, the algebra and the list."""
    try:
        register("cubic_gap", FDivergence.from_generator(lambda u: (u - 1).abs() ** 3 + (u - 1) ** 2, name="cubic_gap"))
        D = divergence("0.5*cubic_gap + 0.5*forward_kl")
        assert divergence(str(D)) == D
        assert "cubic_gap" in divergences()
        register("mix", lambda c: c * divergence("forward_kl"), parameter="c", low=0.0, default=0.5, equation="c KL")
        assert divergence("mix(0.25)") == divergence("0.25*forward_kl")
        with pytest.raises(ValueError, match="already taken"):
            register("tv", D)
        with pytest.raises(ValueError, match="lower-case"):
            register("My KL", D)
    finally:
        for name in ("cubic_gap", "mix"):
            unregister(name)
    assert not {"cubic_gap", "mix"} & set(divergences())


@pytest.mark.parametrize(
    ("f", "says"),
    [
        (lambda u: u * u.log() + 0.5, "f(1) = 0.5"),
        (lambda u: -((u - 1) ** 2), "not convex"),
        (lambda u: torch.sin(u - 1), "not convex"),
        (lambda u: (u - 2).log() - torch.tensor(-1.0).log(), "finite for u > 0"),
        (lambda u: math.log(u), "element-wise"),
        (lambda u: u.sum() - 1, "one value per entry"),
    ],
)
def test_a_bad_generator_is_refused_with_the_reason(f, says):
    with pytest.raises(ValueError) as error:
        FDivergence.from_generator(f, name="bad")
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (lambda u: -u.log(), "reverse_kl"),
        (lambda u: u * u.log(), "forward_kl"),
        (lambda u: u * u.log() + 3 * (u - 1), "forward_kl"),
        (lambda u: 1 / u - 1, "neyman_chi2"),
        (lambda u: (u - 1) ** 2, "pearson_chi2"),
        (lambda u: 1 - u.sqrt(), "hellinger"),
        (lambda u: (u - 1).abs() / 2, "tv"),
        (lambda u: (u - 1) ** 2 / (2 * (u + 1)), "le_cam"),
        (lambda u: 0.5 * (u * u.log() - (u + 1) * ((u + 1) / 2).log()), "jsd(0.5)"),
        (lambda u: (u**1.3 - 1) / 0.39, "alpha(1.3)"),
    ],
)
def test_a_user_generator_equals_the_named_member(f, name):
    """f alone gives all curves, also far beyond the range of exp, where it is continued by its own asymptote."""
    own, D = FDivergence.from_generator(f, name="own"), divergence(name)
    x = torch.tensor([-1e4, -800, -100, -30, -21, -19, -8, -1, 0, 1, 8, 19, 21, 30, 100, 300, 1e4], dtype=torch.float64)
    for curve in ("value", "link", "slope", "curvature"):
        torch.testing.assert_close(getattr(own, curve)(x), getattr(D, curve)(x), rtol=2e-5, atol=1e-9)
    assert own.limits == pytest.approx(D.limits, rel=1e-6, abs=1e-6)
    assert own.smooth == D.smooth
    assert own != FDivergence.from_generator(lambda u: f(u), name="own")
    assert own == FDivergence.from_generator(f, name="own")


def test_own_members_are_in_the_table():
    assert set(OWN) <= set(TABLE)
