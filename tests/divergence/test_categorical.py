"""Exact divergences over a vocabulary: values, gradients, extreme inputs, other libraries."""

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kullback.divergence import divergence

from .table import GENERATORS, TABLE, centred

LOGITS = st.integers(2, 9).flatmap(
    lambda n: st.tuples(*[st.lists(st.floats(-4, 4), min_size=n, max_size=n) for _ in range(2)])
)
EXTREME = st.one_of(st.sampled_from([0.0, -torch.inf, 1e4, -1e4, 60.0]), st.floats(-1e4, 1e4))


def pair(seed=0, rows=6, vocab=7, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(rows, vocab, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("name", TABLE)
@settings(max_examples=8, deadline=None)
@given(logits=LOGITS)
def test_every_gradient_is_the_same_gradient(name, logits):
    """Pathwise gradient = m (g - E g) / T = enumerated policy gradient with reward -g."""
    D = TABLE[name]
    target, model = torch.tensor(logits, dtype=torch.float64)
    model.requires_grad_()
    T = 1.7
    log_p = (model / T).log_softmax(-1)
    (pathwise,) = torch.autograd.grad(D.categorical(target, model, temperature=T), model)
    p, g = log_p.exp().detach(), D.link((target / T).log_softmax(-1) - log_p).detach()
    torch.testing.assert_close(pathwise, p * (g - (p * g).sum()) / T, rtol=1e-6, atol=1e-9)
    (score_function,) = torch.autograd.grad((p * g * log_p).sum(), model)
    torch.testing.assert_close(pathwise, score_function, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", GENERATORS)
def test_value_and_gradients_against_plain_autograd(name):
    """sum m f(t / m) with the textbook f in probability space, differentiated by autograd and by finite differences."""
    D, (t, m) = TABLE[name], pair()
    t.requires_grad_(), m.requires_grad_()
    p, q = m.softmax(-1), t.softmax(-1)
    plain = (p * centred(name, q / p)).sum(-1)
    value = D.categorical(t, m, target_grad=True)
    torch.testing.assert_close(value, plain, rtol=1e-8, atol=1e-10)
    expected = torch.autograd.grad(plain.sum(), (t, m))
    got = torch.autograd.grad(value.sum(), (t, m))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    if name != "tv":
        assert torch.autograd.gradcheck(lambda t, m: D.categorical(t, m, target_grad=True), (t[:2], m[:2]), atol=1e-5)


@pytest.mark.parametrize("name", TABLE)
def test_divergence_axioms(name):
    """D >= 0, 0 iff equal, blind to a constant in the logits, target detached by default, at most its bound."""
    D, (t, m) = TABLE[name], pair(rows=200)
    value = D.categorical(t, m)
    assert (value > 0).all()
    assert (value <= D.bounds[1] * (1 + 1e-12)).all()
    assert (D.categorical(t, t) == 0).all()
    assert (D.categorical(t.float(), t.float()) == 0).all()
    torch.testing.assert_close(D.categorical(t + 3, m - 50), value)
    t.requires_grad_(), m.requires_grad_()
    out = D.categorical(t, m).sum()
    assert torch.autograd.grad(out, t, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(out, m)[0].abs().sum() > 0


@pytest.mark.parametrize("name", TABLE)
def test_data_processing(name):
    """Merging tokens or passing them through a channel never increases D."""
    D, (t, m) = TABLE[name], pair(rows=60, vocab=8, scale=2.0)
    channel = torch.rand(8, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    channel /= channel.sum(-1, keepdim=True)
    after = D.from_log_probs((t.softmax(-1) @ channel).log(), (m.softmax(-1) @ channel).log())
    before = D.categorical(t, m)
    assert (after <= before * (1 + 1e-9)).all()
    assert (after < 0.99 * before).any()


@pytest.mark.parametrize("name", TABLE)
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 6).flatmap(lambda n: st.tuples(*[st.lists(EXTREME, min_size=n, max_size=n) for _ in range(2)])),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    temperature=st.sampled_from([1.0, 0.05, 10.0]),
)
def test_extreme_logits(name, rows, dtype, temperature):
    """-inf masks, logits of 1e4, one token, half precision, T = 0.05: no NaN in value or gradient, and D >= 0."""
    D = TABLE[name]
    t, m = (torch.tensor(row).to(dtype) for row in rows)
    for x in (t, m):
        if x.isneginf().all():
            x[0] = 0.0  # a position where nothing can occur is no distribution
    m.requires_grad_()
    value = D.categorical(t, m, temperature=temperature)
    assert value >= 0
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (gradient,) = torch.autograd.grad(value, m)
    assert not gradient.isnan().any()
    assert gradient.isfinite().all() or dtype == torch.float16  # a gradient of 1e5 is beyond its range
    assert gradient.dtype == dtype
    same = D.categorical(m.detach(), m, temperature=temperature)
    assert same == 0
    assert not D.expected_link(t, m, temperature=temperature).isnan()
    if len(t) == 1:
        assert value == 0


def test_disjoint_supports():
    """The value is the bound; where that is infinite the gradient is zero, not NaN."""
    t, m = torch.tensor([0.0, 1.0, -torch.inf]), torch.tensor([-torch.inf, -torch.inf, 2.0])
    for D in TABLE.values():
        x = m.clone().requires_grad_()
        value = D.categorical(t, x)
        assert value.item() == pytest.approx(D.bounds[1], rel=1e-5)
        (gradient,) = torch.autograd.grad(value, x)
        assert gradient.isfinite().all()


def test_masked_tokens_change_nothing():
    """Columns at -inf on both sides are as good as absent."""
    t, m = pair()
    cut = [torch.cat([x, torch.full((6, 3), -torch.inf, dtype=x.dtype)], -1) for x in (t, m)]
    for D in TABLE.values():
        torch.testing.assert_close(D.categorical(*cut), D.categorical(t, m))
        full = cut[1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(D.categorical(cut[0], full).sum(), full)
        assert (gradient[:, -3:] == 0).all()


def test_a_nan_stays_visible():
    """NaN logits are a fault of the model: value and gradient say so."""
    t, m = torch.zeros(3), torch.tensor([0.0, torch.nan, 1.0], requires_grad=True)
    value = divergence("jsd(0.1)").categorical(t, m)
    assert value.isnan()
    assert torch.autograd.grad(value, m)[0].isnan().any()


def test_padded_vocabulary():
    """Heads of different sizes for one tokenizer: an identical student scores exactly 0 (a peer: 0.035)."""
    t = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([t, torch.zeros(4, 64)], -1).requires_grad_()
    for D in TABLE.values():
        assert (D.categorical(t, padded, pad_vocab=True) == 0).all()
        assert (D.categorical(padded.detach(), t, pad_vocab=True) == 0).all()
    with pytest.raises(ValueError, match=r"1000 columns, model_logits 1064: .* pad_vocab=True"):
        divergence("tv").categorical(t, padded)
    model = torch.randn(4, 1064, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (gradient,) = torch.autograd.grad(divergence("tv").categorical(t, model, pad_vocab=True).sum(), model)
    assert (gradient[:, 1000:] == 0).all()


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match=r"temperature=0: must be positive"):
        divergence("tv").categorical(torch.zeros(3), torch.zeros(3), temperature=0)


def test_scipy_and_torch_distributions():
    t, m = pair(rows=30)
    p, q = m.softmax(-1), t.softmax(-1)
    kl = torch.distributions.kl_divergence
    categorical = torch.distributions.Categorical
    torch.testing.assert_close(divergence("forward_kl").categorical(t, m), kl(categorical(q), categorical(p)))
    torch.testing.assert_close(divergence("reverse_kl").categorical(t, m), kl(categorical(p), categorical(q)))
    relative = scipy.special.rel_entr(q.numpy(), p.numpy()).sum(-1)
    np.testing.assert_allclose(divergence("forward_kl").categorical(t, m), relative)
    from scipy.spatial.distance import jensenshannon

    np.testing.assert_allclose(divergence("jsd(0.5)").categorical(t, m), jensenshannon(p, q, axis=-1) ** 2)
    np.testing.assert_allclose(divergence("tv").categorical(t, m), 0.5 * np.abs((p - q).numpy()).sum(-1))
    chi2 = scipy.stats.chisquare(q.numpy(), p.numpy(), axis=-1).statistic
    np.testing.assert_allclose(divergence("pearson_chi2").categorical(t, m), chi2, rtol=1e-6)
    power = scipy.stats.power_divergence(q.numpy(), p.numpy(), lambda_=0.7, axis=-1).statistic
    np.testing.assert_allclose(divergence("alpha(1.7)").categorical(t, m), power / 2, rtol=1e-6)


def test_expected_link():
    """E_model[g] by enumeration; for reverse KL it is the divergence; top-k with all tokens is the same number."""
    t, m = pair()
    for D in TABLE.values():
        expected = (m.softmax(-1) * D.link(t.log_softmax(-1) - m.log_softmax(-1))).sum(-1)
        m.requires_grad_()
        got = D.expected_link(t, m)
        assert not got.requires_grad
        torch.testing.assert_close(got, expected.detach())
        torch.testing.assert_close(D.topk_expected_link(t.log_softmax(-1), m.log_softmax(-1)), got)
    kl = divergence("reverse_kl")
    torch.testing.assert_close(kl.expected_link(t, m), kl.categorical(t, m).detach())
    kept = m.detach().topk(3).indices
    p, q = m.log_softmax(-1).gather(-1, kept).detach(), t.log_softmax(-1).gather(-1, kept)
    p_, q_ = p.exp() / p.exp().sum(-1, keepdim=True), q.exp() / q.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(kl.topk_expected_link(q, p), (p_ * (p_ / q_).log()).sum(-1))


def test_second_derivatives():
    """The backward pass is made of differentiable pieces, so Hessians work: at equality they are f''(1) Fisher."""
    t, _ = pair(rows=1, vocab=4)
    p = t[0].softmax(-1)
    fisher = torch.diag(p) - torch.outer(p, p)
    for name in ("forward_kl", "unit(jsd(0.1))", "chi2_kl", "own_square"):
        D = TABLE[name]
        hessian = torch.autograd.functional.hessian(lambda m, D=D: D.categorical(t[0], m), t[0] + 1e-9)
        torch.testing.assert_close(hessian, D.second_derivative_at_one * fisher, rtol=1e-5, atol=1e-6)
