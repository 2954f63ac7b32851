"""Truncated targets: exact at k = vocabulary, bounds below it."""

import pytest
import torch

from kullback.divergence import TopK, divergence

from .table import TABLE

TAILS = ("bucket", "drop", "renormalise")


def pair(vocab=12, rows=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", TABLE)
def test_all_tokens_kept_is_exact(name, tail):
    """k = vocabulary: value and gradient of `categorical`, and no phantom bucket, stored tail or not."""
    D, (t, m) = TABLE[name], pair()
    m.requires_grad_()
    exact = D.categorical(t, m)
    (expected,) = torch.autograd.grad(exact.sum(), m)
    for log_tail in (True, False):
        kept = TopK.from_logits(t, 12)
        kept = kept if log_tail else TopK(kept.log_probs, kept.token_ids)
        value = D.topk(kept, m, tail=tail)
        torch.testing.assert_close(value, exact, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(torch.autograd.grad(value.sum(), m)[0], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", TABLE)
def test_what_each_tail_computes(name):
    """Bucket is D of the merged distributions and a lower bound that rises with k; drop lies below it."""
    D, (t, m) = TABLE[name], pair()
    before = torch.zeros(40, dtype=torch.float64)
    q, p = t.softmax(-1), m.softmax(-1)
    for k in (1, 3, 7, 11, 12):
        kept = TopK.from_logits(t, k)
        ids = kept.token_ids
        q_, p_ = q.gather(-1, ids), p.gather(-1, ids)
        bucket, drop, renormalised = (D.topk(kept, m, tail=tail) for tail in TAILS)
        if k < 12:
            merged = [torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1).log() for x in (q_, p_)]
            torch.testing.assert_close(bucket, D.from_log_probs(*merged), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(drop, (p_ * D.value((q_ / p_).log())).sum(-1), rtol=1e-7, atol=1e-10)
        conditional = [(x / x.sum(-1, keepdim=True)).log() for x in (q_, p_)]
        torch.testing.assert_close(renormalised, D.from_log_probs(*conditional), rtol=1e-7, atol=1e-10)
        assert (before <= bucket * (1 + 1e-9) + 1e-12).all()
        assert (drop <= bucket * (1 + 1e-9) + 1e-12).all()
        before = bucket
    torch.testing.assert_close(before, D.categorical(t, m), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("tail", TAILS)
def test_gradient(tail):
    t, m = pair(vocab=6, rows=3)
    m.requires_grad_()
    for name in ("reverse_kl", "jsd(0.1)", "chi2_kl", "own_log"):
        kept = TopK.from_logits(t, 3)
        assert torch.autograd.gradcheck(lambda m, n=name, k=kept: TABLE[n].topk(k, m, tail=tail, temperature=2.0), m)


def test_a_tail_below_rounding():
    """A teacher so peaked that its top k sums to 1 in float32: a finite value, close to the truth of a stored tail."""
    t = torch.tensor([40.0, 0.0, -1.0, -2.0, -3.0])
    m = torch.zeros(5, requires_grad=True)
    kept = TopK.from_logits(t, 2)
    blind = TopK(kept.log_probs, kept.token_ids)
    for name in ("reverse_kl", "forward_kl", "jsd(0.1)", "tv"):
        D = TABLE[name]
        exact = D.categorical(t, m)
        assert D.topk(kept, m) <= exact * (1 + 1e-6)
        assert torch.isfinite(D.topk(blind, m))
        assert D.topk(blind, m) <= exact * (1 + 1e-6)
        assert torch.autograd.grad(D.topk(blind, m), m)[0].isfinite().all()


def test_masked_outside():
    """Every token outside the top k is -inf on the model's side: an empty bucket, no NaN."""
    m = torch.tensor([0.0, 1.0, -torch.inf, -torch.inf], requires_grad=True)
    kept = TopK.from_logits(torch.tensor([0.0, 2.0, -torch.inf, -torch.inf]), 2)
    for D in TABLE.values():
        value = D.topk(kept, m)
        assert value.item() == pytest.approx(D.categorical(torch.tensor([0.0, 2.0]), m[:2].detach()).item(), rel=1e-5)
        assert torch.autograd.grad(value, m)[0].isfinite().all()


def test_mistakes_are_named():
    t, m = torch.zeros(2, 5), torch.zeros(2, 5)
    kept = TopK.from_logits(t, 2)
    tv = divergence("tv")
    with pytest.raises(ValueError, match='tail="ignore": choose one of bucket, drop, renormalise'):
        tv.topk(kept, m, tail="ignore")
    with pytest.raises(ValueError, match="k=9: choose 1 to 5"):
        TopK.from_logits(t, 9)
    with pytest.raises(ValueError, match="same positions"):
        tv.topk(kept, m[:1])
    with pytest.raises(ValueError, match="integer"):
        TopK(kept.log_probs, kept.log_probs)
    with pytest.raises(ValueError, match=r"\[..., k\]"):
        TopK(kept.log_probs, kept.token_ids[:, :1])
    with pytest.raises(ValueError, match="vocabulary 1"):
        tv.topk(kept, m[:, :1])
