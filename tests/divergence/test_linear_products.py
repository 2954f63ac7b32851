"""The products equal the plain ones, whoever computes them, on any layout, dtype and number of threads."""

import pytest
import torch

import kullback as kb
from kullback.divergence import products

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.t().contiguous().t(),
    "padded rows": lambda x: torch.cat([x, x])[: len(x)],
    "padded columns": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "every second": lambda x: x.repeat_interleave(2, dim=0)[::2],
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(products, "BLOCK", 64)  # several blocks of 64, the last one ragged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_products(small_blocks, layout, dtype):
    """Against float64 products of the same rounded numbers; `out` may be a slice of a wider buffer."""
    turn = LAYOUTS[layout]
    hidden, head, grad = (turn(x.to(dtype)) for x in (draw(131, 24), draw(203, 24, seed=1), draw(131, 203, seed=2)))
    wide = torch.promote_types(dtype, torch.float32)
    grad, eps = turn(grad.to(wide)), torch.finfo(dtype).eps
    h, w, g = (x.double() for x in (hidden, head, grad))

    def close(got, exact):
        assert (got.double() - exact).norm() <= 8 * eps * exact.norm()

    out = torch.full((140, 203), torch.nan, dtype=wide)
    close(products.logits(hidden, head, out[:131]), h @ w.T)
    assert out[131:].isnan().all()
    states = torch.full_like(hidden, torch.nan)
    products.times_head(grad, head, states)
    close(states, g @ w)
    total = torch.full((203, 24), torch.nan, dtype=wide)
    products.add_outer(grad, hidden, total, first=True)
    close(total, g.T @ h)
    products.add_outer(grad, hidden, total, first=False)
    close(total, 2 * g.T @ h)


def test_one_dnn_and_mm_agree(monkeypatch):
    """To float32 rounding: each against float64, and it was oneDNN that was asked, then not."""
    hidden, head = draw(130, 64).float(), draw(3001, 64, seed=1).float()
    exact = hidden.double() @ head.double().T
    out = torch.empty(130, 3001)
    if torch.backends.mkldnn.is_available():
        assert products.has_one_dnn(hidden, out)
    found = products.logits(hidden, head, out).clone()
    monkeypatch.setattr(products, "has_one_dnn", lambda *_: False)
    plain = products.logits(hidden, head, out)
    for got in (found, plain):
        assert (got - exact).norm() <= 1e-6 * exact.norm()


def test_when_one_dnn_is_not_asked():
    x = torch.randn(4, 3)
    assert not products.has_one_dnn(x.double(), x.double())
    assert not products.has_one_dnn(x.bfloat16(), x)
    assert not products.has_one_dnn(x[:0], x[:0])
    with torch.backends.mkldnn.flags(enabled=False):
        assert not products.has_one_dnn(x, x)
    for shape in ((0, 3, 5), (4, 3, 0), (4, 0, 5)):
        n, h, v = shape
        out = products.logits(torch.ones(n, h), torch.ones(v, h), torch.full((n, v), 7.0))
        assert (out == 0).all()


def test_the_number_of_threads_changes_only_rounding():
    x = [draw(*s, seed=i).float() for i, s in enumerate(((70, 32), (999, 32), (70, 48), (999, 48)))]
    x[2].requires_grad_(), x[3].requires_grad_()
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            value = kb.divergence("jsd(0.1)").linear(*x)
            found.append((value.detach(), *torch.autograd.grad(value.mean(), x[2:])))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert (a - b).norm() <= 2e-6 * a.norm()


def test_inside_torch_compile():
    """One graph break, the same numbers, and the compiled kernel is still allowed."""
    x = [draw(*s, seed=i).float() for i, s in enumerate(((6, 4), (9, 4), (6, 5), (9, 5)))]
    x[2].requires_grad_(), x[3].requires_grad_()
    D = kb.divergence("jsd(0.1)")

    def loss(*x):
        return (2 * D.linear(*x)).mean()

    compiled = torch.compile(loss, backend="aot_eager")
    results = []
    for f in (loss, compiled):
        value = f(*x)
        results.append((value, *torch.autograd.grad(value, x[2:])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()
