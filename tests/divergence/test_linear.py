"""The fused loss equals `categorical` of the logits it never builds: values, every gradient, every option."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kullback.divergence import TopK, divergence, linear

from .table import TABLE

N, V, H, K = 11, 13, 5, 7
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 2.5},
    "scale": {"target_logit_scale": 0.7, "model_logit_scale": 1.3},
    "softcap": {"target_softcap": 1.5, "model_softcap": 2.0},
    "all": {"temperature": 0.5, "target_logit_scale": 1.2, "model_logit_scale": 0.6, "model_softcap": 1.0},
}


def problem(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    target = {"hidden": draw(N, K), "head": draw(V, K), "bias": draw(V)}
    model = {"hidden": draw(N, H), "head": draw(V, H), "bias": draw(V)}
    return target, {k: v.requires_grad_() for k, v in model.items()}


def logits(part, scale=1.0, softcap=None):
    z = scale * (part["hidden"] @ part["head"].T + part["bias"])
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def both(D, target, model, options, **more):
    reference = D.categorical(
        logits(target, options.get("target_logit_scale", 1.0), options.get("target_softcap")),
        logits(model, options.get("model_logit_scale", 1.0), options.get("model_softcap")),
        temperature=options.get("temperature", 1.0),
    )
    fused = D.linear(
        target["hidden"],
        target["head"],
        model["hidden"],
        model["head"],
        target_bias=target["bias"],
        model_bias=model["bias"],
        **options,
        **more,
    )
    return reference, fused


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", TABLE)
def test_linear_is_categorical(name, option):
    target, model = problem()
    reference, fused = both(TABLE[name], target, model, OPTIONS[option], chunk=4)
    torch.testing.assert_close(fused, reference, rtol=1e-7, atol=1e-9)
    expected = torch.autograd.grad(reference.mean(), list(model.values()))
    got = torch.autograd.grad(fused.mean(), list(model.values()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("used", ["announced", "scaled", "other", "zeros", "one"])
def test_any_upstream_gradient_is_exact(used):
    """Whether or not the loss is built with the announced token weights."""
    target, model = problem(1)
    generator = torch.Generator().manual_seed(5)
    announced = torch.rand(N, generator=generator, dtype=torch.float64)
    announced[3] = 0.0
    other = torch.rand(N, generator=generator, dtype=torch.float64)
    one = torch.zeros(N, dtype=torch.float64)
    one[3] = 2.0
    weight = {"announced": announced, "scaled": -0.3 * announced, "other": other, "zeros": 0 * one, "one": one}[used]
    reference, fused = both(divergence("jsd(0.1)"), target, model, {}, token_weight=announced, chunk=3)
    torch.testing.assert_close(fused, reference)
    expected = torch.autograd.grad((weight * reference).sum(), list(model.values()))
    got = torch.autograd.grad((weight * fused).sum(), list(model.values()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("trained", ["hidden", "head", "bias"])
def test_frozen_parts_get_no_gradient(trained):
    target, model = problem(2)
    parts = {k: v if k == trained else v.detach() for k, v in model.items()}
    reference, fused = both(divergence("chi2_kl"), target, parts, {}, chunk=4)
    weight = torch.linspace(0, 1, N, dtype=torch.float64)
    (expected,) = torch.autograd.grad((weight * reference).sum(), parts[trained])
    (got,) = torch.autograd.grad((weight * fused).sum(), parts[trained])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("chunk", [1, 2, 5, 11, 100, None])
def test_the_chunk_does_not_matter(chunk):
    target, model = problem(3)
    reference, fused = both(divergence("reverse_kl"), target, model, {}, chunk=chunk)
    torch.testing.assert_close(fused, reference)
    for a, b in zip(
        torch.autograd.grad(fused.sum(), list(model.values())),
        torch.autograd.grad(reference.sum(), list(model.values())),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tail", ["bucket", "drop", "renormalise"])
@pytest.mark.parametrize("k", [1, 4, V])
@pytest.mark.parametrize("name", TABLE)
def test_linear_topk_is_topk(name, k, tail):
    D, (target, model) = TABLE[name], problem(4)
    kept = TopK.from_logits(logits(target), k)
    reference = D.topk(kept, logits(model, 1.3, 2.0), tail=tail, temperature=1.5)
    fused = D.linear_topk(
        kept,
        model["hidden"],
        model["head"],
        tail=tail,
        model_bias=model["bias"],
        temperature=1.5,
        model_logit_scale=1.3,
        model_softcap=2.0,
        chunk=4,
    )
    torch.testing.assert_close(fused, reference, rtol=1e-8, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad(fused.mean(), list(model.values())),
        torch.autograd.grad(reference.mean(), list(model.values())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_batch_shape_and_no_grad():
    target, model = problem()
    hidden = model["hidden"].detach()[:10].reshape(2, 5, H)
    value = divergence("tv").linear(target["hidden"][:10].reshape(2, 5, K), target["head"], hidden, model["head"])
    assert value.shape == (2, 5)
    assert value.requires_grad
    with torch.no_grad():
        again = divergence("tv").linear(target["hidden"][:10].reshape(2, 5, K), target["head"], hidden, model["head"])
    assert not again.requires_grad
    torch.testing.assert_close(again, value.detach())
    empty = divergence("tv").linear(target["hidden"][:0], target["head"], model["hidden"][:0], model["head"])
    assert empty.shape == (0,)
    assert torch.autograd.grad(empty.sum(), model["head"])[0].abs().sum() == 0


def test_padded_heads():
    """Extra rows of the larger head are ignored: an identical student scores exactly 0, and they get no gradient."""
    target, model = problem()
    head = torch.cat([target["head"], torch.ones(3, K, dtype=torch.float64)]).requires_grad_()
    for D in TABLE.values():
        value = D.linear(target["hidden"], target["head"], target["hidden"], head, pad_vocab=True)
        assert (value == 0).all()
    student = torch.cat([model["head"].detach(), torch.ones(3, H, dtype=torch.float64)]).requires_grad_()
    value = divergence("jsd(0.1)").linear(target["hidden"], target["head"], model["hidden"], student, pad_vocab=True)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert (gradient[V:] == 0).all()
    assert (gradient[:V] != 0).all()
    with pytest.raises(ValueError, match="pad_vocab=True"):
        divergence("tv").linear(target["hidden"], target["head"], target["hidden"], head)


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.numel())
        return out


@pytest.mark.parametrize("name", ["forward_kl", "jsd(0.1)", "skew(le_cam, 0.4)", "own_softened"])
def test_the_logits_never_exist(name):
    """Forward and backward, also when the head's gradient is recomputed: nothing as large as [N, V] is made."""
    n, v, h, chunk = 96, 64, 4, 8
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(*s, generator=generator, requires_grad=True) for s in ((n, h), (v, h)))
    states, weight = torch.randn(n, h, generator=generator), torch.rand(n, generator=generator)
    D, kept = TABLE[name], TopK.from_logits(torch.randn(n, v, generator=generator), 3)
    with Largest() as seen:
        (weight * D.linear(states, head.detach(), hidden, head, chunk=chunk)).sum().backward()
        (weight * D.linear_topk(kept, hidden, head, chunk=chunk)).sum().backward()
    assert seen.size <= max(chunk * v, n * h, v * h)
    assert seen.size < n * v / 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision(dtype):
    """Half-precision states: float32 values, gradients in the parameter's dtype, close to the exact ones."""
    target, exact = problem(6)
    cast = {k: v.detach().to(dtype).requires_grad_() for k, v in exact.items()}
    lowered = {k: v.to(dtype) for k, v in target.items()}
    raised = [{k: v.detach().double().requires_grad_() for k, v in part.items()} for part in (lowered, cast)]
    D = divergence("jsd(0.1)")
    reference, _ = both(D, {k: v.detach() for k, v in raised[0].items()}, raised[1], {})
    _, fused = both(D, lowered, cast, {}, chunk=4)
    assert fused.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(fused.double(), reference, rtol=20 * eps, atol=20 * eps)
    got = torch.autograd.grad(fused.mean(), list(cast.values()))
    expected = torch.autograd.grad(reference.mean(), list(raised[1].values()))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= 10 * eps * b.norm()


def test_autocast_and_mixed_dtypes():
    """Under autocast the products run in bfloat16 whatever the parameters are; without it the wider dtype wins."""
    target, model = problem(7, torch.float32)
    D = divergence("reverse_kl")
    exact = D.linear(target["hidden"], target["head"], model["hidden"], model["head"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = D.linear(target["hidden"].bfloat16(), target["head"], model["hidden"], model["head"])
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=0.05, atol=0.05)
    low.sum().backward()
    assert model["head"].grad.dtype == torch.float32
    mixed = D.linear(target["hidden"], target["head"], model["hidden"].bfloat16(), model["head"])
    torch.testing.assert_close(mixed, exact, rtol=0.05, atol=0.05)


def test_disjoint_supports_stay_finite():
    """An infinite position (a target mask at -inf by its bias) zeroes that row's gradient and no other."""
    target, model = problem(8)
    bias = target["bias"].clone()
    bias[4] = -torch.inf
    value = divergence("reverse_kl").linear(
        target["hidden"], target["head"], model["hidden"], model["head"], target_bias=bias, chunk=4
    )
    assert value.isposinf().all()
    for gradient in torch.autograd.grad(value[:3].clamp(max=1).sum(), (model["hidden"], model["head"])):
        assert not gradient.isnan().any()


def test_mistakes_are_named():
    target, model = problem()
    args = (target["hidden"], target["head"], model["hidden"], model["head"])
    tv = divergence("tv")
    for options, says in (
        ({"temperature": 0.0}, "temperature=0.0: must be positive"),
        ({"model_softcap": -1.0}, "model_softcap=-1.0"),
        ({"chunk": 0}, "chunk=0"),
        ({"token_weight": torch.ones(3)}, r"token_weight has shape \(3,\)"),
        ({"model_bias": torch.ones(3)}, "model_bias"),
    ):
        with pytest.raises(ValueError, match=says):
            tv.linear(*args, **options)
    with pytest.raises(ValueError, match="same tokens"):
        tv.linear(target["hidden"][:3], *args[1:])
    with pytest.raises(ValueError, match="model_hidden has shape"):
        tv.linear(*args[:2], target["hidden"], model["head"])


@pytest.mark.parametrize("tolerance", [1e-5, 1e-2, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_skipped_columns_stay_within_the_bound(tolerance, weighted, monkeypatch):
    """Values exact; each chunk's logit gradient within the tolerance; so both gradients within the stated bound."""
    monkeypatch.setattr(linear, "SKIP_RANK", 2)  # of a width of 6
    generator = torch.Generator().manual_seed(9)
    n, v, h = 12, 300, 6
    target, model = (8 * torch.randn(n, h, generator=generator, dtype=torch.float64) for _ in range(2))
    heads = [torch.randn(v, h, generator=generator, dtype=torch.float64) for _ in range(2)]
    model.requires_grad_(), heads[1].requires_grad_()
    bias = torch.zeros(v, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(n, generator=generator, dtype=torch.float64) if weighted else None
    D, wanted = divergence("forward_kl"), (model, heads[1], bias)

    def run(tolerance):
        value = D.linear(
            target, heads[0], model, heads[1], model_bias=bias, token_weight=weight, gradient_tolerance=tolerance
        )
        return value, torch.autograd.grad((value * (1 if weight is None else weight)).sum(), wanted)

    (exact, gradients), (value, skipped) = run(0.0), run(tolerance)
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(skipped[2], gradients[2])
    G = torch.softmax(model @ heads[1].T, -1) - torch.softmax(target @ heads[0].T, -1)
    # weighted: the columns are chosen before token weights, which are at most 1 here
    states = model.detach() * (1 if weight is None else weight[:, None])
    for x, near, right in zip((heads[1].detach(), states), skipped, gradients, strict=False):
        assert 0 < (near - right).norm() <= 1.01 * tolerance * G.norm() * torch.linalg.matrix_norm(x, 2)
    left = [x - x @ (d := linear._main_directions(x)) @ d.T for x in (heads[1].detach(), states)]
    for x, near, right in zip(left, skipped, gradients, strict=False):
        assert (near - right).norm() <= 1.01 * tolerance * G.norm() * torch.linalg.matrix_norm(x, 2)


def test_the_columns_left_out_are_the_smallest_that_fit():
    G = torch.randn(6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    G *= torch.logspace(0, -4, 40)
    energy = G.square().sum(0)
    for tolerance in (0.01, 0.1, 0.5):
        kept = linear._kept_columns(G, tolerance)
        out = torch.ones(40, dtype=torch.bool).index_fill_(0, kept, False)
        assert energy[out].sum() <= tolerance**2 * energy.sum() < energy[out].sum() + energy[kept].min()
    assert linear._kept_columns(torch.ones(6, 40), 0.1) is None


def test_main_directions_are_orthonormal_and_leave_little():
    generator = torch.Generator().manual_seed(1)
    spectrum = torch.logspace(1, -2, 40, dtype=torch.float64)
    a, b = (torch.linalg.qr(torch.randn(n, 40, generator=generator, dtype=torch.float64)).Q for n in (300, 60))
    matrix = a * spectrum @ b.T
    found = linear._main_directions(matrix)
    torch.testing.assert_close(found.T @ found, torch.eye(linear.SKIP_RANK, dtype=torch.float64))
    assert torch.linalg.matrix_norm(matrix - matrix @ found @ found.T, 2) < 1.5 * spectrum[linear.SKIP_RANK]
    common = 5 + torch.randn(300, 60, generator=generator, dtype=torch.float64)  # what all rows have in common is found
    found = linear._main_directions(common)
    assert torch.linalg.matrix_norm(common - common @ found @ found.T, 2) < torch.linalg.matrix_norm(common, 2) / 10


def test_skipping_across_chunks_and_in_half_precision():
    target, model = problem(10, torch.bfloat16)
    D, wanted = divergence("reverse_kl"), list(model.values())
    args = (target["hidden"], target["head"], model["hidden"], model["head"])
    exact, near = (D.linear(*args, model_bias=model["bias"], chunk=4, gradient_tolerance=t) for t in (0.0, 0.2))
    torch.testing.assert_close(near, exact)
    for a, b in zip(torch.autograd.grad(near.sum(), wanted), torch.autograd.grad(exact.sum(), wanted), strict=True):
        assert (a - b).float().norm() <= 0.3 * b.float().norm()
    with pytest.raises(ValueError, match=r"gradient_tolerance=1\.5"):
        D.linear(*args, gradient_tolerance=1.5)
