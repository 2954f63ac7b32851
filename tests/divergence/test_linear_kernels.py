"""The fast curves and the compiled kernels equal the plain ones: values, gradients, ends, near and far."""

import pytest
import torch

from kullback.divergence import FDivergence, divergence, kernels
from kullback.divergence.joint import curves, mix
from kullback.divergence.pair import Pair

from .table import TABLE

ONE = torch.ones((), dtype=torch.float64)


def logits(apart, dtype=torch.float64, rows=6, vocab=51, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = 2 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    target = model + apart * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    return target.to(dtype), model.to(dtype)


def plain(D, target, model):
    gradient = model.double().clone()
    return kernels.plain_rows(D, target.double().clone(), gradient, ONE), gradient


@pytest.mark.parametrize("apart", [1e-3, 0.3, 3.0, 20.0])
@pytest.mark.parametrize("name", TABLE)
def test_joint_curves(name, apart):
    """In float64 the same to 1e-9 of the value; the gradients too."""
    target, model = logits(apart)
    value, gradient = kernels.rows(TABLE[name], target, model, ONE)
    expected, slope = plain(TABLE[name], target, model)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    assert (gradient - slope).norm() <= 1e-9 * slope.norm()
    again = model.clone()
    torch.testing.assert_close(kernels.eager_rows(TABLE[name], target.clone(), again, ONE), expected, rtol=1e-9, atol=0)
    assert (again - slope).norm() <= 1e-9 * slope.norm()
    alone = kernels.eager_rows(TABLE[name], target.clone(), model.clone(), ONE, with_gradient=False)
    torch.testing.assert_close(alone, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("apart", [1e-3, 1e-2, 1.0, 10.0])
@pytest.mark.parametrize("name", TABLE)
def test_joint_curves_in_float32(name, apart):
    """The gradient keeps its digits however close the two are; the value those the logits have."""
    target, model = logits(apart, torch.float32)
    value, gradient = kernels.rows(TABLE[name], target, model, torch.ones(()))
    expected, slope = plain(TABLE[name], target, model)
    rtol = max(1e-5, 1e-6 / apart)
    torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=0)
    assert (gradient - slope).norm() <= 5e-6 * slope.norm()


@pytest.mark.parametrize("name", TABLE)
def test_ends(name):
    """-inf on either side, on both, and on all but one token: no NaN, and the limits of the member."""
    target, model = logits(1.0)
    target[0, 3] = model[1, 4] = -torch.inf
    target[2, 5] = model[2, 5] = -torch.inf
    target[3, 1:] = -torch.inf
    model[4, :-1] = -torch.inf
    target[5, 1:], model[5, :-1] = -torch.inf, -torch.inf
    expected, slope = plain(TABLE[name], target, model)
    value, gradient = kernels.rows(TABLE[name], target, model, ONE)
    assert not value.isnan().any()
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-12)
    again = model.clone()
    torch.testing.assert_close(kernels.eager_rows(TABLE[name], target.clone(), again, ONE), expected)
    torch.testing.assert_close(again, slope)


def test_identical_rows_are_exactly_zero():
    _, model = logits(1.0, torch.float32)
    for D in TABLE.values():
        value, gradient = kernels.rows(D, model.clone(), model, torch.ones(()))
        assert (value == 0).all()
        assert (gradient == 0).all()


@pytest.mark.parametrize("share", [1e-3, 0.1, 0.5, 0.9])
def test_mix_keeps_its_digits(share):
    size = torch.logspace(-6, 2, 200, dtype=torch.float64)
    ratio = torch.cat([-size, size])
    to_mix, to_model = mix(ratio.float(), share)
    exact = Pair(ratio.float().double(), torch.zeros_like(ratio), ratio.float().double()).mix(share)
    torch.testing.assert_close(to_mix.double(), exact[0].ratio, rtol=2e-6 / min(share, 1 - share), atol=0)
    torch.testing.assert_close(to_model.double(), exact[1], rtol=2e-6 / min(share, 1 - share), atol=0)


COMPILED = {"jsd": divergence("jsd(0.1)"), "own": FDivergence.from_generator(lambda u: (u - 1) ** 2 / (u + 1))}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_linear(name):
    """Through `linear`, with every option of the head, against the eager path; one compilation serves every size."""
    D = COMPILED[name]
    generator = torch.Generator().manual_seed(2)

    def both(rows, vocab, **options):
        x = [torch.randn(*s, generator=generator) for s in ((rows, 5), (vocab, 5), (rows, 4), (vocab, 4))]
        x[2].requires_grad_(), x[3].requires_grad_()
        out = []
        for mode in ("never", "always"):
            with kernels.kernels(mode):
                value = D.linear(*x, **options)
            out.append((value, *torch.autograd.grad(value.mean(), x[2:])))
        for a, b in zip(*out, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-7)

    both(9, 37, temperature=2.0, model_softcap=3.0, model_logit_scale=0.5, chunk=4)
    both(1, 64)
    both(130, 200, target_bias=torch.randn(200, generator=generator))
    holes = torch.zeros(40)
    holes[7] = -torch.inf
    both(6, 40, target_bias=holes, model_bias=holes)


def test_the_small_is_never_compiled(monkeypatch):
    monkeypatch.setattr(kernels, "_compiled", lambda *_: pytest.fail("compiled"))
    x = [torch.randn(3, 4), torch.randn(5, 4)]
    with kernels.kernels("auto"):
        divergence("jsd(0.5)").linear(*x, *x)
    with pytest.raises(ValueError, match="always, never"):
        kernels.set_kernels("sometimes")


def test_without_a_compiler_the_eager_path_answers(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", broken)
    x = [torch.randn(3, 4), torch.randn(5, 4), torch.randn(3, 4), torch.randn(5, 4)]
    D = divergence("alpha(0.123)")
    with kernels.kernels("always"), pytest.warns(UserWarning, match="no compiler here"):
        value = D.linear(*x)
    with kernels.kernels("never"):
        torch.testing.assert_close(value, D.linear(*x))
    kernels._compiled.cache_clear()


def test_every_member_has_both_curves():
    """The joint curves of a divergence without a rule of its own are its own curves."""
    target, model = logits(1.0)
    t, m = (torch.log_softmax(x, -1) for x in (target, model))
    for D in TABLE.values():
        value, link = curves(D, Pair(t, m, t - m))
        torch.testing.assert_close(value, D.weighted_value(t, m))
        torch.testing.assert_close(link, D.weighted_link(t, m))
