"""The one pass over the vocabulary against plain float64 enumeration: every number, every kind of head, any order."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kullback.divergence import divergence, kernels, statistics
from kullback.divergence.statistics import first, likeliest, linear_statistics

from .test_linear import Largest

N, H, K = 9, 5, 7
NAMES = (
    "entropy",
    "log_prob",
    "target_entropy",
    "target_log_prob",
    "forward_kl",
    "reverse_kl",
    "jsd(0.1)",
    "jsd(0.5)",
    "squared_hellinger",
    "bhattacharyya",
    "bhattacharyya_coefficient",
    "overlap(1)",
    "overlap(4)",
    "agreement",
    "alpha(0.3)",
)
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 2.5},
    "scale": {"target_logit_scale": 0.7, "model_logit_scale": 1.3},
    "softcap": {"target_softcap": 1.5, "model_softcap": 2.0},
    "all": {"temperature": 0.5, "target_logit_scale": 1.2, "model_logit_scale": 0.6, "model_softcap": 1.0},
}


def problem(vocab=(151, 151), seed=0, dtype=torch.float64, n=N):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "target_hidden": draw(n, K),
        "target_head": draw(vocab[0], K),
        "target_bias": draw(vocab[0]),
        "model_hidden": draw(n, H),
        "model_head": draw(vocab[1], H),
        "model_bias": draw(vocab[1]),
        "tokens": torch.randint(min(vocab), (n,), generator=generator),
    }


def logits(x, side, temperature=1.0, target_logit_scale=1.0, model_logit_scale=1.0, **softcaps):
    scale = {"target": target_logit_scale, "model": model_logit_scale}[side]
    out = scale * (x[f"{side}_hidden"].double() @ x[f"{side}_head"].double().T + x[f"{side}_bias"].double())
    cap = softcaps.get(f"{side}_softcap")
    return (out if cap is None else cap * torch.tanh(out / cap)) / temperature


def expected(target, model, tokens):
    """From probabilities, one position and one token after another."""
    shared = min(target.shape[1], model.shape[1])
    rows = []
    for t_all, m_all, token in zip(
        target.softmax(-1).tolist(), model.softmax(-1).tolist(), tokens.tolist(), strict=True
    ):
        t, m = ([x / math.fsum(p[:shared]) for x in p[:shared]] for p in (t_all, m_all))

        def kl(p, q):
            return math.fsum(a * math.log(a / b) if b else math.inf for a, b in zip(p, q, strict=True) if a)

        def jsd(beta, t=t, m=m):
            middle = [beta * a + (1 - beta) * b for a, b in zip(t, m, strict=True)]
            return beta * kl(t, middle) + (1 - beta) * kl(m, middle)

        def likely(p, k):
            return set(sorted((v for v in range(shared) if p[v] > 0), key=lambda v: -p[v])[:k])

        def overlap(k, t=t, m=m):
            return len(likely(t, k) & likely(m, k)) / len(likely(t, k))

        affinity = math.fsum(math.sqrt(a * b) for a, b in zip(t, m, strict=True))
        rows.append(
            {
                "entropy": -math.fsum(p * math.log(p) for p in m_all if p),
                "log_prob": math.log(m_all[token]) if m_all[token] else -math.inf,
                "target_entropy": -math.fsum(p * math.log(p) for p in t_all if p),
                "target_log_prob": math.log(t_all[token]) if t_all[token] else -math.inf,
                "forward_kl": kl(t, m),
                "reverse_kl": kl(m, t),
                "jsd(0.1)": jsd(0.1),
                "jsd(0.5)": jsd(0.5),
                "squared_hellinger": 1 - affinity,
                "bhattacharyya": -math.log(affinity),
                "bhattacharyya_coefficient": affinity,
                "overlap(1)": overlap(1),
                "overlap(4)": overlap(4),
                "agreement": float(t.index(max(t)) == m.index(max(m))),
                "alpha(0.3)": math.fsum(
                    (a**0.3 * b**0.7 - 0.7 * b - 0.3 * a) / (0.3 * -0.7) for a, b in zip(t, m, strict=True)
                ),
            }
        )
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in NAMES}


def compare(found, oracle, **tolerance):
    assert set(found) == set(oracle)
    for name, values in oracle.items():
        torch.testing.assert_close(found[name].double(), values, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("vocab", [(13, 13), (151, 151), (160, 151), (128, 139)])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_number_is_the_enumerated_one(name, vocab):
    x, options = problem(vocab), OPTIONS[name]
    oracle = expected(logits(x, "target", **options), logits(x, "model", **options), x["tokens"])
    compare(linear_statistics(**x, statistics=NAMES, pad_vocab=True, **options), oracle, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("vocab", [(151, 151), (160, 151)])
def test_compiled_it_is_the_same(vocab):
    x, names = problem(vocab, dtype=torch.float32), [*NAMES[:6], "bhattacharyya", "overlap(4)"]

    def oracle():
        found = expected(logits(x, "target"), logits(x, "model"), x["tokens"])
        return {name: found[name] for name in names}

    with kernels.kernels("always"):
        compare(linear_statistics(**x, statistics=names, pad_vocab=True), oracle(), rtol=2e-5, atol=2e-6)
        x["model_bias"][3] = x["target_bias"][3] = x["target_bias"][4] = -torch.inf
        compare(linear_statistics(**x, statistics=names, pad_vocab=True), oracle(), rtol=2e-5, atol=2e-6)


def test_impossible_tokens():
    """-inf on one side, the other, both; and all but two tokens, so that fewer than k can be likeliest."""
    x = problem((40, 40))
    x["target_bias"][:3], x["model_bias"][2:5] = -torch.inf, -torch.inf
    oracle = expected(logits(x, "target"), logits(x, "model"), x["tokens"])
    assert oracle["forward_kl"].isposinf().all()
    compare(linear_statistics(**x, statistics=NAMES), oracle, rtol=1e-9, atol=1e-12)
    x["target_bias"][2:], x["model_bias"][5:] = -torch.inf, -torch.inf
    x["target_bias"][:2] = x["model_bias"][:2] = torch.tensor([0.5, 0.0])
    oracle = expected(logits(x, "target"), logits(x, "model"), x["tokens"])
    assert set(oracle["overlap(4)"].tolist()) == {1.0}
    compare(linear_statistics(**x, statistics=NAMES), oracle, rtol=1e-9, atol=1e-12)
    x["target_bias"][:2], x["target_bias"][30:] = -torch.inf, 0.0  # nothing in common
    seen = linear_statistics(**x, statistics=["bhattacharyya", "bhattacharyya_coefficient", "overlap(4)", "jsd(0.5)"])
    assert seen["bhattacharyya"].isposinf().all()
    assert not seen["bhattacharyya_coefficient"].any()
    assert not seen["overlap(4)"].any()
    torch.testing.assert_close(seen["jsd(0.5)"], torch.full((N,), math.log(2), dtype=torch.float64))


def test_close_and_far_distributions_keep_their_digits():
    """At 1e-5 apart -log(sum sqrt) in float32 is noise, at 300 nats apart sqrt(t m) is zero; neither may show."""
    x = problem((151, 151))
    x["target_hidden"], x["target_head"] = x["model_hidden"], x["model_head"]
    x["target_bias"] = x["model_bias"] + 1e-3 * torch.randn(
        151, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )
    exact = linear_statistics(**x, statistics=["bhattacharyya", "squared_hellinger"])
    low = {name: value.float() if value.is_floating_point() else value for name, value in x.items()}
    torch.testing.assert_close(
        linear_statistics(**low, statistics=["bhattacharyya"])["bhattacharyya"].double(), exact["bhattacharyya"],
        rtol=1e-2, atol=0,
    )  # fmt: skip
    torch.testing.assert_close(exact["bhattacharyya"], -torch.log1p(-exact["squared_hellinger"]))
    eye = torch.eye(2)
    far = linear_statistics(eye, 300 * eye, eye, 300 * eye.flip(0), ["bhattacharyya"])["bhattacharyya"]
    torch.testing.assert_close(far, torch.full((2,), 150 - math.log(2)))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), extra=st.integers(0, 70), cut=st.integers(1, 8))
def test_padding_order_and_chunks_change_nothing(seed, extra, cut):
    """Rows of a head that only one side has, the order of the tokens, of the vocabulary, and the cut into chunks."""
    x = problem((90, 90), seed)
    names = [name for name in NAMES if not name.startswith("target_")]
    plain = linear_statistics(**x, statistics=names)
    draw = torch.Generator().manual_seed(seed + 1)

    padded = dict(x)
    padded["target_head"] = torch.cat([x["target_head"], torch.randn(extra, K, dtype=torch.float64, generator=draw)])
    padded["target_bias"] = torch.cat([x["target_bias"], torch.full((extra,), 5.0, dtype=torch.float64)])
    compare(linear_statistics(**padded, statistics=names, pad_vocab=True), plain, rtol=1e-9, atol=1e-12)

    order, columns = torch.randperm(N, generator=draw), torch.randperm(90, generator=draw)
    moved = {name: value[order] if len(value) == N else value[columns] for name, value in x.items()}
    moved["tokens"] = columns.argsort()[x["tokens"]][order]
    compare(
        linear_statistics(**moved, statistics=names), {k: v[order] for k, v in plain.items()}, rtol=1e-9, atol=1e-12
    )

    before = statistics.ENTRIES, statistics.LEAST_ROWS
    try:
        statistics.ENTRIES, statistics.LEAST_ROWS = cut * 90, 1
        compare(linear_statistics(**x, statistics=names), plain, rtol=1e-9, atol=1e-12)
    finally:
        statistics.ENTRIES, statistics.LEAST_ROWS = before


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), vocab=st.integers(1, 700), k=st.integers(1, 40), levels=st.sampled_from([3, 10**6]))
def test_the_likeliest_are_found_group_by_group(seed, vocab, k, levels):
    """Also among many equal logits (three levels), and where only some tokens are possible."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(levels, (4, vocab), generator=draw).double()
    assert (first(x) == x.argmax(-1)).all()
    x[torch.rand(4, vocab, generator=draw) < 0.3] = -torch.inf
    found = likeliest(x, k)
    k = min(k, vocab)
    assert all(len(set(row)) == k for row in found.tolist())
    values = torch.where(found < 0, -torch.inf, x.gather(-1, found.clamp(min=0)))
    assert torch.equal(values.sort(-1, descending=True).values, x.sort(-1, descending=True).values[:, :k])
    assert torch.equal(found < 0, values == -torch.inf)


def test_the_logits_never_exist(monkeypatch):
    n, v = 256, 128
    monkeypatch.setattr(statistics, "ENTRIES", 16 * v)
    monkeypatch.setattr(statistics, "LEAST_ROWS", 1)
    x = problem((v, v), dtype=torch.float32, n=n)
    with kernels.kernels("never"), Largest() as seen:  # a dispatch mode does not see into a compiled kernel
        linear_statistics(**x, statistics=NAMES)
    assert seen.size <= max(16 * v, n * (len(NAMES) + 2))
    assert seen.size < n * v / 4


def test_logits_of_a_side_are_made_once():
    calls = []
    x = problem()

    def counted(name):
        made = logits(x, name)

        def give(rows):
            calls.append(name)
            return made[rows]

        return statistics.Side(made.shape[1], give)

    wanted = {what: statistics.asked(what) for what in NAMES}
    statistics.measure(
        {"target": counted("target"), "model": counted("model"), "idle": counted("target")}, wanted, x["tokens"]
    )
    assert sorted(calls) == ["model", "target"]


def test_half_precision_is_summed_in_float32():
    x = problem(dtype=torch.bfloat16)
    made = {
        side: (x[f"{side}_hidden"] @ x[f"{side}_head"].T).double() + x[f"{side}_bias"].double()
        for side in ("target", "model")
    }
    compare(
        linear_statistics(**x, statistics=NAMES),
        expected(made["target"], made["model"], x["tokens"]),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("change", "names", "message"),
    [
        ({"tokens": None}, ["log_prob"], "give tokens="),
        ({}, ["overlap(0)"], "k must be at least 1"),
        ({}, ["forwrad_kl"], "forward_kl"),
        ({"target_head": torch.zeros(160, K)}, ["forward_kl"], "pass pad_vocab=True"),
        ({"tokens": torch.zeros(3, dtype=torch.long)}, ["entropy"], r"tokens covers \(3,\)"),
        ({"temperature": 0.0}, ["entropy"], "temperature=0.0: must be positive"),
        ({"model_bias": torch.full((151,), torch.nan)}, ["forward_kl"], "the model's logits are NaN at 9 of 9"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(change, names, message):
    with pytest.raises(ValueError, match=message):
        linear_statistics(**(problem() | change), statistics=names)


def test_batches_keep_their_shape_and_nothing_carries_a_gradient():
    x = problem(n=6)
    shaped = {k: v.reshape(2, 3, *v.shape[1:]) if len(v) == 6 else v for k, v in x.items()}
    shaped["model_head"] = x["model_head"].clone().requires_grad_()
    found = linear_statistics(**shaped, statistics=NAMES)
    compare({k: v.flatten() for k, v in found.items()}, linear_statistics(**x, statistics=NAMES), rtol=1e-12, atol=0)
    assert all(v.shape == (2, 3) and not v.requires_grad for v in found.values())


def test_divergences_are_those_of_categorical():
    x = problem(dtype=torch.float64)
    for name in ("le_cam", "tv", "skew(le_cam, 0.4)", "0.3*forward_kl + 0.7*reverse_kl"):
        found = linear_statistics(**x, statistics=[name])[name]
        torch.testing.assert_close(found, divergence(name).categorical(logits(x, "target"), logits(x, "model")))
