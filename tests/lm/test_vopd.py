"""Card 05, section 5, by enumeration of the sampled token in float64: every state is repeated once for each token."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import kullback as kb
from kullback.lm.batch import Batch, base_columns
from kullback.lm.methods.vopd import VOPD
from kullback.lm.predictions import LogitPredictions
from kullback.lm.rehearse import rehearse
from kullback.lm.rollout import Origin, build_rollout
from kullback.lm.signals import match, policy

STATES, VOCAB = 6, 7
BASELINES = ["none", "exact", *range(1, VOCAB + 1)]


class Tabular(LogitPredictions):
    """Logits that stay in float64."""

    def logits_of(self, chunk: slice) -> Tensor:
        return self.logits[chunk]

    def token_log_probs(self) -> Tensor:
        return self.logits.log_softmax(-1).gather(-1, self.tokens[:, None])[:, 0]


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(2, STATES, VOCAB, generator=draw, dtype=torch.float64)).unbind()


def enumerate_tokens(target: Tensor, model: Tensor) -> tuple[Batch, Tensor]:
    """A row for every state and token, and the leaf that holds each row's own logits."""
    rows = len(model) * VOCAB
    tokens = torch.arange(VOCAB).repeat(len(model))
    rollout = build_rollout([[1]] * rows, [[token] for token in tokens.tolist()], [[int(Origin.STUDENT)]] * rows)
    leaf = model.detach().repeat_interleave(VOCAB, 0).requires_grad_()
    teacher = Tabular(rollout.scored, tokens, target.repeat_interleave(VOCAB, 0))
    return Batch(rollout, base_columns(rollout), Tabular(rollout.scored, tokens, leaf), {"teacher": teacher}), leaf


def gradients(target: Tensor, model: Tensor, **options: Any) -> Tensor:
    """[state, token, vocab]: the logit gradient of vOPD's own term for every sampled token."""
    batch, leaf = enumerate_tokens(target, model)
    (term,) = VOPD(teacher="given", **options).signal(batch)
    return torch.autograd.grad(term.value.sum(), leaf)[0].view(-1, VOCAB, VOCAB)


def expected(model: Tensor, per_token: Tensor) -> Tensor:
    return (model.softmax(-1)[..., None] * per_token).sum(1)


def full_gradient(target: Tensor, model: Tensor) -> Tensor:
    """Of KL(model || target), by torch's own formula."""
    leaf = model.clone().requires_grad_()
    p, q = torch.distributions.Categorical(logits=leaf), torch.distributions.Categorical(logits=target)
    return torch.autograd.grad(torch.distributions.kl_divergence(p, q).sum(), leaf)[0]


@pytest.mark.parametrize("baseline", BASELINES)
def test_every_baseline_has_the_gradient_of_the_full_vocabulary_kl(baseline: Any) -> None:
    """Checks 1 and 2."""
    target, model = pair()
    mean = expected(model, gradients(target, model, baseline=baseline))
    torch.testing.assert_close(mean, full_gradient(target, model), rtol=0, atol=1e-13)
    p, log_ratio = model.softmax(-1), target.log_softmax(-1) - model.log_softmax(-1)
    kl = -(p * log_ratio).sum(-1, keepdim=True)
    torch.testing.assert_close(mean, p * (-log_ratio - kl), rtol=0, atol=1e-13)


def test_any_constant_is_a_baseline() -> None:
    """Check 2."""
    target, model = pair()
    batch, leaf = enumerate_tokens(target, model)
    ours: Any = batch.model
    reward = (batch.targets["teacher"].token_log_probs() - ours.token_log_probs()).detach()  # type: ignore[attr-defined]
    for constant in (-3.0, 0.0, 11.0):
        term = policy(batch, advantage=ours.grid(reward + constant), clip=None)
        mean = expected(model, torch.autograd.grad(term.value.sum(), leaf)[0].view(-1, VOCAB, VOCAB))
        torch.testing.assert_close(mean, full_gradient(target, model), rtol=0, atol=1e-13)


def test_each_sample_is_the_card_s_with_a_detached_advantage() -> None:
    """Checks 5, 7 and 8: g_y = -A_y (e_y - p), A = log q - log p + KL(p || q). What is not detached would add to it."""
    target, model = pair()
    p, log_ratio = model.softmax(-1), target.log_softmax(-1) - model.log_softmax(-1)
    advantage = log_ratio - (p * log_ratio).sum(-1, keepdim=True)
    assert float((p * advantage).sum(-1).abs().max()) < 1e-14
    by_hand = -advantage[..., None] * (torch.eye(VOCAB, dtype=torch.float64) - p[:, None])
    torch.testing.assert_close(gradients(target, model), by_hand, rtol=0, atol=1e-13)


def test_no_gradient_reaches_the_teacher() -> None:
    target, model = pair()
    target.requires_grad_()
    batch, _ = enumerate_tokens(target, model)
    (term,) = VOPD(teacher="given").signal(batch)
    assert torch.autograd.grad(term.value.sum(), target, allow_unused=True) == (None,)


def test_ends_of_the_top_k_baseline() -> None:
    """Check 3: k = 1 is plain sampled distillation, k = V the exact baseline."""
    target, model = pair()
    assert torch.equal(gradients(target, model, baseline=1), gradients(target, model, baseline="none"))
    exact = gradients(target, model, baseline="exact")
    torch.testing.assert_close(gradients(target, model, baseline=VOCAB), exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd(0.3)", "pearson_chi2"])
def test_at_the_teacher_every_single_gradient_is_zero(baseline: Any, name: str) -> None:
    """Check 4: not only their mean; the undetached form of check 8 would leave noise here."""
    _, model = pair()
    assert float(gradients(model, model, baseline=baseline, divergence=name).abs().max()) == 0.0


@pytest.mark.parametrize("name", ["forward_kl", "jsd(0.5)", "pearson_chi2", "squared_hellinger"])
@pytest.mark.parametrize("baseline", ["none", "exact", 3])
def test_other_divergences_have_their_own_gradient(name: str, baseline: Any) -> None:
    target, model = pair()
    leaf = model.clone().requires_grad_()
    (exact,) = torch.autograd.grad(kb.divergence(name).categorical(target, leaf).sum(), leaf)
    mean = expected(model, gradients(target, model, baseline=baseline, divergence=name))
    torch.testing.assert_close(mean, exact, rtol=1e-12, atol=1e-12)


def test_sampling_must_be_the_student_s_own() -> None:
    """Check 10."""
    with pytest.raises(ValueError, match="sampling_temperature"):
        rehearse(VOPD(teacher="given", sampling_temperature=0.7))


def test_advantages_are_not_whitened() -> None:
    """Check 11: a row's value does not know the other rows."""
    target, model = pair()
    alone = gradients(target[:2], model[:2])
    assert torch.equal(alone, gradients(target, model)[:2])


def test_half_precision_logits_are_compared_in_float32() -> None:
    """Check 12."""
    target, model = (logits.bfloat16() for logits in pair())

    def value(target: Tensor, model: Tensor) -> Tensor:
        batch, _ = enumerate_tokens(target, model)
        ours: Any = batch.model
        theirs: Any = batch.targets["teacher"]
        plain = {"m": LogitPredictions(ours.scored, ours.tokens, model.repeat_interleave(VOCAB, 0).requires_grad_())}
        plain["t"] = LogitPredictions(theirs.scored, theirs.tokens, theirs.logits)
        return match(
            "reverse_kl",
            dataclasses.replace(batch, predictions=plain["m"], targets={"teacher": plain["t"]}),
            route="link",
        ).value

    assert value(target, model).dtype == torch.float32
    torch.testing.assert_close(value(target, model), value(target.float(), model.float()), rtol=1e-6, atol=1e-6)
