"""The printed Triton kernels equal `plain_rows` in float64: on a GPU where there is one, else in Triton's interpreter.

Triton decides at its import whether it interprets, which `tests/conftest.py` asks for where there is no GPU. Compiling
down to machine code therefore has a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kullback.divergence import FDivergence, divergence, kernels

from .table import TABLE

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")
triton_curves = pytest.importorskip("kullback.divergence.triton_curves")
triton_math = pytest.importorskip("kullback.divergence.triton_math")
triton_rows = pytest.importorskip("kullback.divergence.triton_rows")

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter's, of inf and NaN


def situations(vocab, dtype):
    """Rows of every kind, and how exact float32 can be there relative to its eps."""
    generator = torch.Generator().manual_seed(vocab)
    model = 2 * torch.randn(10, vocab, generator=generator, dtype=torch.float64)
    target = model + torch.randn(10, vocab, generator=generator, dtype=torch.float64)
    target[1] = model[1] + 0.01 * (target[1] - model[1])
    target[2], model[2] = 15 * target[2], 15 * model[2]  # peaked
    target[3], model[3] = 4000 * target[3], 4000 * model[3]
    if vocab > 1:
        target[4, 0] = model[5, 0] = -torch.inf
        target[6, 0] = model[6, 0] = -torch.inf
        target[7, 1:] = -torch.inf
        model[8, 1:] = -torch.inf
        target[9, 1:], model[9, :1] = -torch.inf, -torch.inf  # disjoint
    loose = torch.ones(10, dtype=torch.float64)
    loose[1], loose[2], loose[3] = 10, 30, 3000  # what the logits' own rounding leaves
    return target.to(dtype), model.to(dtype), loose


def check(D, target, model, loose, with_gradient=True, by=0.7):
    """Values and gradients against the plain float64 rows; `model` may be a view of a larger buffer."""
    dtype = model.dtype
    wide = torch.promote_types(dtype, torch.float32)
    expected = model.double().cpu().clone()
    factor = torch.tensor(by, dtype=torch.float64)
    value = kernels.plain_rows(D, target.double().cpu().clone(), expected, factor)
    before = model.clone()
    kernel = triton_rows.compiled.__wrapped__(D, dtype, with_gradient)
    got = kernel(target, model, factor.to(DEVICE, wide))
    assert got.dtype == wide
    got = got.double().cpu()
    assert torch.equal(got.isnan(), value.isnan())
    fits = value < (1e30 if wide == torch.float32 else torch.inf)  # beyond, float32 ends earlier than float64
    assert (got[~fits & ~value.isnan()] > 1e29).all()
    tolerance = loose[fits] * (1e-11 if wide == torch.float64 else 4e-6)
    assert ((got - value)[fits].abs() <= tolerance * value[fits] + 1e-3 * tolerance).all()
    if not with_gradient:
        assert torch.equal(model, before)
        return
    error = (model.double().cpu() - expected)[fits].norm(dim=-1)
    # relative to the gradient; to the links, whose mean cancels where all are alike; and what the storage can hold
    links = D.weighted_link(*(torch.log_softmax(x.double().cpu(), -1) for x in (target, before)))[fits]
    stored = torch.finfo(dtype)
    rounding = 8 * torch.finfo(wide).eps * links.nan_to_num(posinf=0, neginf=0).abs().sum(-1)
    allowed = (tolerance + stored.eps) * expected[fits].norm(dim=-1) + rounding
    assert (error <= allowed + stored.tiny * stored.eps * model.shape[1] ** 0.5).all(), (error, allowed)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float64) for name in TABLE]
    + [(name, torch.float32) for i, name in enumerate(TABLE) if i % 3 == 0 or "own" in name or "(" in name],
    ids=str,
)
def test_every_divergence(name, dtype):
    """float64 shows that the formulas are the same, float32 that no constant and no cast has the wrong width."""
    target, model, loose = situations(40, dtype)
    check(TABLE[name], target.to(DEVICE), model.to(DEVICE), loose)


@pytest.mark.parametrize(
    ("name", "dtype", "with_gradient"),
    [
        ("jsd(0.1)", torch.float32, True),
        ("jsd(0.1)", torch.float32, False),
        ("jsd(0.1)", torch.bfloat16, True),
        ("own_softened", torch.float16, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab", [1, 2, 31, 256, 600])
def test_sizes_and_dtypes(vocab, name, dtype, with_gradient, monkeypatch):
    """Less than a tile, one, and several; rows that are part of a wider buffer, whose rest must not be touched."""
    monkeypatch.setattr(triton_rows, "TILE", 256)
    target, model, loose = (x[[0, 1, 4, 5]] for x in situations(vocab, dtype))
    buffer = torch.full((4, vocab + 16), torch.nan, dtype=dtype, device=DEVICE)
    buffer[:, :vocab] = model.to(DEVICE)
    check(TABLE[name], target.to(DEVICE), buffer[:, :vocab], loose, with_gradient)
    assert buffer[:, vocab:].isnan().all()


def test_no_rows_and_no_distribution():
    kernel = triton_rows.compiled(divergence("jsd(0.5)"), torch.float32, True)
    one = torch.ones((), device=DEVICE)
    assert kernel(*torch.empty(2, 0, 7, device=DEVICE), one).shape == (0,)
    full = torch.zeros(1, 7, device=DEVICE)
    for pair in ((full - torch.inf, full.clone()), (full.clone(), full - torch.inf)):
        assert kernel(*pair, one).isnan().all()
        assert kernels.rows(divergence("jsd(0.5)"), *pair, one)[0].isnan().all()
    with pytest.raises(ValueError, match="side by side"):
        kernel(torch.zeros(7, 3, device=DEVICE).t(), torch.zeros(3, 7, device=DEVICE), one)


def test_identical_rows_are_exactly_zero():
    _, model, _ = situations(40, torch.float32)
    model = model[:4].to(DEVICE)
    for D in list(TABLE.values())[::6]:
        gradient = model.clone()
        value = triton_rows.compiled(D, torch.float32, True)(model, gradient, torch.ones((), device=DEVICE))
        assert (value == 0).all()
        assert (gradient == 0).all()


LOGIT = st.one_of(st.floats(-30, 30), st.just(-float("inf")))


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from(["reverse_kl", "alpha(0.3)", "jsd(0.1)", "tv", "skew(le_cam, 0.4)"]))
def test_any_logits(data, name):
    vocab = data.draw(st.integers(1, 9))
    rows = st.lists(LOGIT, min_size=vocab, max_size=vocab).filter(lambda row: max(row) > -31)
    target, model = (torch.tensor([data.draw(rows)], dtype=torch.float64, device=DEVICE) for _ in range(2))
    check(divergence(name), target, model, 100 * torch.ones(1, dtype=torch.float64))


def own(f):
    return FDivergence.from_generator(f, name="own")


OWN = {
    "cubic": lambda u: (u - 1).abs() ** 3,
    "half": lambda u: (u - 1).clamp(min=0) ** 2,
    "relu": lambda u: torch.relu(1 - u) ** 2,
    "two sides": lambda u: torch.where(u > 1, (u - 1) ** 2, 2 * (u - 1) ** 2),
    "huber": lambda u: torch.where((u - 1).abs() < 1, 0.5 * (u - 1) ** 2, (u - 1).abs() - 0.5),
    "softplus": lambda u: torch.nn.functional.softplus(u) - torch.nn.functional.softplus(torch.ones_like(u)),
    "logaddexp": lambda u: torch.logaddexp(u, torch.ones_like(u)) - 1 - torch.log(torch.tensor(2.0, dtype=u.dtype)),
    "xlogy": lambda u: torch.xlogy(u, u),
    "roots": lambda u: (1 - torch.sqrt(u)) ** 2 + torch.rsqrt(u) - 1,
    "powers": lambda u: u**1.3 - 1 + u**-2 - u**0,
    "exp": lambda u: torch.exp(-u) - torch.exp(-torch.ones_like(u)),
    "reciprocal": lambda u: torch.reciprocal(u) - 1,
    "square": lambda u: torch.square(u - 1),
}


@pytest.mark.parametrize("name", OWN)
def test_a_users_own(name):
    """Far out the tails are fitted, by `plain_rows` and the kernel alike."""
    target, model, loose = situations(40, torch.float64)
    rows = [0, 1, 4]
    check(own(OWN[name]), target[rows].to(DEVICE), model[rows].to(DEVICE), 100 * loose[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["expm1", "log1p", "tanh"])
def test_functions_keep_their_digits(name, dtype):
    @triton.jit
    def apply(x, out, F: tl.constexpr, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        tl.store(out + at, F(tl.load(x + at)))

    size = torch.logspace(-12, 1.9, 512, dtype=torch.float64)
    x = torch.cat([-size, size]).to(dtype)
    if name == "log1p":
        x = torch.where(x > -1, x, torch.zeros_like(x))
    out = torch.empty_like(x, device=DEVICE)
    apply[(1,)](x.to(DEVICE), out, F=getattr(triton_math, name), SIZE=1024)
    exact = getattr(torch, name)(x.double())
    eps = torch.finfo(dtype).eps
    # a GPU's exp is exact to a few eps where its argument is small, and to eps * |x| beyond
    slack = 4 + (x.abs() if DEVICE == "cuda" and dtype == torch.float32 else 0)
    assert ((out.double().cpu() - exact).abs() <= eps * slack * exact.abs()).all()


def test_linear_takes_the_kernel(monkeypatch):
    """Through `linear`, with every option of the head, against the eager path."""
    monkeypatch.setattr(kernels, "TRITON_DEVICES", (DEVICE,))
    monkeypatch.setattr(kernels, "_compiled", lambda *_: pytest.fail("inductor was asked"))
    kernels._triton.cache_clear()
    generator = torch.Generator().manual_seed(2)
    x = [torch.randn(*s, generator=generator).to(DEVICE) for s in ((9, 5), (37, 5), (9, 4), (37, 4))]
    x[2].requires_grad_(), x[3].requires_grad_()
    out = []
    for mode in ("never", "always"):
        with kernels.kernels(mode):
            value = TABLE["own_softened"].linear(*x, temperature=2.0, model_softcap=3.0, chunk=4)
        out.append((value, *torch.autograd.grad(value.mean(), x[2:])))
    assert kernels._triton.cache_info().currsize == 1
    kernels._triton.cache_clear()
    for a, b in zip(*out, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-7)


def test_an_operation_without_a_translation_is_named(monkeypatch):
    D = own(lambda u: (u - 1) * torch.atan(u - 1) - 0.5 * torch.log1p((u - 1) ** 2))
    with pytest.raises(triton_curves.Unprintable, match="atan"):
        triton_curves.source(D, torch.float32)
    monkeypatch.setattr(kernels, "TRITON_DEVICES", ("cpu",))
    monkeypatch.setattr(kernels, "_compiled", lambda *_: None)
    kernels._triton.cache_clear()
    x = [torch.randn(3, 4), torch.randn(5, 4), torch.randn(3, 4), torch.randn(5, 4)]
    with kernels.kernels("always"), pytest.warns(UserWarning, match="no Triton kernel for own .*atan") as warned:
        values = [D.linear(*x), D.linear(*x)]
    assert len(warned) == 1
    value = values[0]
    with kernels.kernels("never"):
        torch.testing.assert_close(value, D.linear(*x))
    kernels._triton.cache_clear()


def test_auto_wants_a_large_problem(monkeypatch):
    asked = []
    monkeypatch.setattr(kernels, "TRITON_DEVICES", ("cpu",))
    monkeypatch.setattr(kernels, "_triton", lambda *x: asked.append(x[1:]) or None)
    D, like = divergence("tv"), torch.zeros(1)
    for mode, entries in (("auto", kernels.WORTH - 1), ("never", kernels.WORTH), ("auto", kernels.WORTH)):
        with kernels.kernels(mode):
            kernels.choose(D, like, entries, True)
    assert asked == [(torch.float32, torch.device("cpu"), True)]


def test_every_divergence_has_a_source():
    """All that the tables need is there, also for GPUs; a name cannot end the comment that it stands in."""
    for D in TABLE.values():
        text = triton_curves.source(D, torch.float32)
        assert text.count("def ") == 1
        assert text.rstrip().splitlines()[-1].startswith("    return ")
    odd = FDivergence.from_generator(lambda u: (u - 1) ** 2, name="a\nimport os")
    assert "\nimport" not in triton_curves.source(odd, torch.float32)


def test_it_compiles_for_hopper(tmp_path):
    """Down to machine code for compute capability 9.0, which needs no GPU; and it spills no registers."""
    nvidia = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not ((nvidia / "ptxas").exists() and (nvidia / "cuobjdump").exists()):
        pytest.skip("this Triton comes without ptxas and cuobjdump")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'src'}"
    command = [
        sys.executable,
        "-m",
        "tests.divergence.for_hopper",
        nvidia,
        tmp_path,
        "jsd(0.1)=fp32",
        "own_softened=bf16",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    used = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(used) == 2
    for registers, stack, warps in used:
        assert 0 < registers * 32 * warps <= 2**16
        assert stack == 0
