"""Card 23: every check it asks for, exactly."""

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import kullback as kb
from kullback.estimate import expectation
from kullback.theory import tabular
from kullback.theory.posterior import collapse, evidence_bound, log_evidence, posterior, reject, resample

KL = kb.divergence("reverse_kl")


def problem(seed: int, outcomes: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    policy, prior = torch.randn(2, outcomes, generator=draw, dtype=torch.float64).log_softmax(-1)
    return policy, prior, torch.randn(outcomes, generator=draw, dtype=torch.float64)


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.exp() * (p - q)).sum())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 100_000), beta=st.floats(0.05, 20.0))
def test_the_identity_and_the_bound(seed: int, beta: float) -> None:
    """J = -beta KL(policy || p) + beta log Z; the gap of the bound is that KL and never negative; its maximum is p."""
    policy, prior, r = problem(seed)
    p, log_z = posterior(prior, r, beta), float(log_evidence(prior, r, beta))
    assert log_z == pytest.approx(math.log(float((prior.exp() * (r / beta).exp()).sum())), rel=1e-12, abs=1e-12)
    J = float(policy.exp() @ r) - beta * kl(policy, prior)
    assert pytest.approx(-beta * kl(policy, p) + beta * log_z, rel=1e-11, abs=1e-11) == J
    assert float(evidence_bound(policy, prior, r, beta)) == pytest.approx(J / beta, rel=1e-11, abs=1e-11)
    assert log_z - J / beta == pytest.approx(kl(policy, p), rel=1e-9, abs=1e-11)
    assert kl(policy, p) >= 0
    assert float(evidence_bound(p, prior, r, beta)) == pytest.approx(log_z, rel=1e-11, abs=1e-11)


def test_the_identity_is_special_to_this_penalty() -> None:
    """With a forward-KL penalty the optimum falls short by a Bregman divergence, not by that KL to the optimum."""
    policy, prior, r = problem(3)
    D, beta = kb.divergence("forward_kl"), 0.7
    best = tabular.optimum(prior, r, D, coefficient=beta)
    short = float(tabular.objective(best.log_probs, prior, r, D, beta) - tabular.objective(policy, prior, r, D, beta))
    assert short == pytest.approx(beta * float(tabular.bregman(D, prior, policy, best.log_probs)), rel=1e-9)
    assert abs(short - beta * float(D.from_log_probs(best.log_probs, policy))) > 0.01


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_gradients(beta: float) -> None:
    """Score function, finite differences of J, and -beta grad KL(policy || p) agree; GDC's is E_p grad log policy."""
    logits, prior, r = problem(5)
    p = posterior(prior, r, beta)

    def J(x: torch.Tensor) -> torch.Tensor:
        policy = x.log_softmax(-1)
        return policy.exp() @ r - beta * (policy.exp() * (policy - prior)).sum()

    policy = logits.log_softmax(-1)
    step, eye = 1e-5, torch.eye(9, dtype=torch.float64)
    finite = torch.stack([(J(logits + step * e) - J(logits - step * e)) / (2 * step) for e in eye])
    score = tabular.score_gradient(policy, r - beta * (policy - prior) - 3.0)  # any constant baseline
    torch.testing.assert_close(score, finite, rtol=1e-8, atol=1e-8)
    towards = tabular.gradient(lambda x: -beta * KL.from_log_probs(p, x), logits)
    torch.testing.assert_close(towards, score, rtol=1e-10, atol=1e-11)
    gdc = tabular.gradient(lambda x: -kb.divergence("forward_kl").from_log_probs(p, x), logits)
    torch.testing.assert_close(gdc, tabular.score_gradient(policy, (p - policy).exp()), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gdc, p.exp() - policy.exp(), rtol=1e-10, atol=1e-12)


def test_estimators_of_the_penalty_as_losses() -> None:
    """k1 has no gradient, k2 the right one, k3 that of KL(prior || policy)."""
    logits, prior, _ = problem(6)
    weight = logits.log_softmax(-1).exp()
    log_rho = {"k1": lambda x: x - prior, "k2": lambda x: (prior - x) ** 2 / 2,
               "k3": lambda x: (prior - x).exp() - 1 - (prior - x)}  # fmt: skip
    found = {name: tabular.gradient(lambda x, f=f: (weight * f(x)).sum(), logits) for name, f in log_rho.items()}
    assert float(found["k1"].abs().max()) < 1e-12
    torch.testing.assert_close(found["k2"], tabular.gradient(lambda x: KL.from_log_probs(prior, x), logits))
    forward = tabular.gradient(lambda x: kb.divergence("forward_kl").from_log_probs(prior, x), logits)
    torch.testing.assert_close(found["k3"], forward)


def test_limits_ties_shifts_and_scales() -> None:
    _, prior, r = problem(7)
    r[2] = r[5]
    odds = prior[2] - prior[5]
    for beta in (0.01, 0.3, 4.0, 1e6):
        p = posterior(prior, r, beta)
        torch.testing.assert_close(p[2] - p[5], odds, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(posterior(prior, r + 2.5, beta), p)
        torch.testing.assert_close(posterior(prior, 3 * r, 3 * beta), p)
        shift = log_evidence(prior, r + 2.5, beta) - log_evidence(prior, r, beta)
        assert float(shift) == pytest.approx(2.5 / beta, rel=1e-9)
    torch.testing.assert_close(posterior(prior, r, math.inf), prior)
    r[2] = r[5] = 9.0
    cold = posterior(prior, r, 0.0)
    torch.testing.assert_close(cold.exp().sum(), cold[[2, 5]].exp().sum())
    torch.testing.assert_close(cold[2] - cold[5], odds)


def test_a_larger_beta_gives_less_reward_and_less_distance() -> None:
    _, prior, r = problem(8)
    path = [posterior(prior, r, beta) for beta in (0.05, 0.1, 0.3, 1.0, 3.0, 10.0)]
    for a, b in itertools.pairwise(path):
        assert float(expectation(a, r)) > float(expectation(b, r))
        assert kl(a, prior) > kl(b, prior)


def test_tokens_add_up_to_the_sequence() -> None:
    draw = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 3, 4, generator=draw, dtype=torch.float64).log_softmax(-1)
    for tokens in itertools.product(range(4), repeat=3):
        per_token = sum(float(ours[t, v] - theirs[t, v]) for t, v in enumerate(tokens))
        whole = sum(float(ours[t, v]) for t, v in enumerate(tokens)) - sum(
            float(theirs[t, v]) for t, v in enumerate(tokens)
        )
        assert per_token == pytest.approx(whole, abs=1e-12)


def test_a_uniform_prior_is_maximum_entropy() -> None:
    policy, _, r = problem(9)
    uniform = torch.full((9,), -math.log(9), dtype=torch.float64)
    J = 0.4 * float(evidence_bound(policy, uniform, r, 0.4))
    assert pytest.approx(float(policy.exp() @ r) + 0.4 * float(tabular.entropy(policy)) - 0.4 * math.log(9)) == J


def test_exact_samplers() -> None:
    """The share kept is Z exp(-max r / beta), and both histograms are the posterior, within 5 standard errors."""
    _, prior, r = problem(10, 6)
    beta, n = 0.8, 200_000
    p, draw = posterior(prior, r, beta).exp(), torch.Generator().manual_seed(1)
    rate = float((log_evidence(prior, r, beta) - r.max() / beta).exp())
    kept = reject(prior, r, beta, n, generator=draw)
    assert len(kept) / n == pytest.approx(rate, abs=5 * math.sqrt(rate * (1 - rate) / n))
    again = resample(prior, r, beta, n, 50_000, generator=draw)
    for found in (kept, again):
        share = torch.bincount(found, minlength=6) / len(found)
        assert float(((share - p).abs() / (p * (1 - p) / min(len(found), 20_000)).sqrt()).max()) < 5


def test_a_hard_constraint_costs_what_it_excludes() -> None:
    """KL(p || prior) = -log P_prior(b = 1) for p = prior b / Z."""
    _, prior, _ = problem(11)
    b = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 0, 1])
    p = torch.where(b == 1, prior, -torch.inf).log_softmax(-1)
    torch.testing.assert_close(p, posterior(prior, b, 0.0))
    cost = float(KL.from_log_probs(prior, p))
    assert cost == pytest.approx(-math.log(float((prior.exp() * b).sum())), rel=1e-12)


def test_collapse_in_numbers() -> None:
    """A posterior keeps the odds of ties; plain reward ascent moves them without limit as its entropy goes."""
    draw = torch.Generator().manual_seed(0)
    prior = tabular.random_policy(12, seed=0, concentration=5.0)
    r = 0.3 * torch.rand(12, generator=draw, dtype=torch.float64)
    r[:2] = 1.0
    kept = collapse(posterior(prior, r, 0.1), prior, r)
    assert float(kept.tie_odds) == pytest.approx(1.0, abs=1e-9)
    assert float(kept.effective_support) == pytest.approx(math.exp(float(kept.entropy)))
    assert float(kept.prior_kl) == pytest.approx(kl(posterior(prior, r, 0.1), prior))
    logits, seen = prior.clone(), []
    for step in range(3001):
        policy = logits.log_softmax(-1)
        if step in (0, 300, 3000):
            seen.append(collapse(policy, prior, r))
        logits = logits + tabular.score_gradient(policy, r)
    assert float(seen[0].tie_odds) == pytest.approx(1.0)
    assert [float(s.entropy) for s in seen] == sorted((float(s.entropy) for s in seen), reverse=True)
    assert float(seen[-1].entropy) < 0.1 < float(kept.entropy)
    assert float(seen[-1].tie_odds) > 10 * float(seen[1].tie_odds) ** 0.5 > 10
    assert float(seen[-1].reward) > 0.999

    sample = torch.multinomial(prior.exp().expand(400, -1), 1000, replacement=True, generator=draw)
    counts = torch.tensor([float(len(set(row))) for row in sample.tolist()])
    assert float(collapse(prior, prior, r).distinct) == pytest.approx(float(counts.mean()), abs=0.05)


def test_bad_input() -> None:
    _, prior, r = problem(0)
    with pytest.raises(ValueError, match="beta=-1: must not be negative"):
        posterior(prior, r, -1.0)
    with pytest.raises(ValueError, match="prior: its probabilities sum to"):
        posterior(prior + 1, r, 1.0)
