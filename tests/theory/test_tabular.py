"""The laboratory: optima of every divergence against their conditions, and gradients against each other."""

import math

import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kullback.divergence import divergence, divergences
from kullback.estimate import beta_for_kl, tilted_kl
from kullback.theory import tabular

FAMILY = [*divergences(), "alpha(0.3)", "alpha(-0.5)", "jsd(0.1)", "0.5*forward_kl + 0.5*reverse_kl", "skew_kl(0.4)"]
CLOSED = [name for name in FAMILY if divergence(name).has_closed_form]
BOUNDED = [name for name in FAMILY if not divergence(name).has_closed_form]
assert {"tv", "neyman_chi2", "le_cam", "skew_kl"} <= set(BOUNDED)
assert {"reverse_kl", "forward_kl", "jsd", "squared_hellinger", "chi2_kl", "pearson_chi2", "jeffreys"} <= set(CLOSED)


def problem(seed, outcomes=8, batch=()):
    reference = tabular.random_policy(outcomes, *batch, seed=seed)
    return reference, torch.randn(*batch, outcomes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", FAMILY)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), log_coefficient=st.floats(-3, 4))
def test_an_optimum_meets_its_conditions(name, seed, log_coefficient):
    """r - coefficient * link(u) = normaliser where there is mass, no more than it where there is none; sum 1."""
    D, c = divergence(name), math.exp(log_coefficient)
    reference, r = problem(seed)
    best = tabular.optimum(reference, r, D, coefficient=c)
    assert best.log_probs.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert best.distance.item() == pytest.approx(D.from_log_probs(reference, best.log_probs).item())
    assert best.reward.item() == pytest.approx((best.log_probs.exp() * r).sum().item(), abs=1e-12)
    kept = best.log_probs > -torch.inf
    level = r - c * D.link(reference - best.log_probs)
    if D.smooth:
        torch.testing.assert_close(level[kept], best.normaliser.expand(int(kept.sum())), rtol=1e-7, atol=1e-7)
    assert bool((r[~kept] - c * D.link_at_infinity <= best.normaliser + 1e-9).all())


@pytest.mark.parametrize("name", FAMILY)
def test_no_policy_does_better(name):
    D = divergence(name)
    reference, r = problem(3)
    others = tabular.random_policy(8, 3000, seed=1, concentration=0.7)
    for c in (0.05, 0.5, 5.0):
        best = tabular.optimum(reference, r, D, coefficient=c)
        near = torch.logaddexp(best.log_probs + math.log(0.99), others + math.log(0.01))
        top = tabular.objective(best.log_probs, reference, r, D, c)
        for policies in (others, near, best.log_probs + 1e-3 * torch.randn(200, 8, dtype=torch.float64)):
            assert bool((tabular.objective(policies.log_softmax(-1), reference, r, D, c) <= top + 1e-12).all())


@pytest.mark.parametrize("name", FAMILY)
def test_a_budget_is_spent_and_buys_the_most(name):
    """Also for tv, whose distance jumps with the coefficient: the optimum is then a mixture of two."""
    D = divergence(name)
    reference, r = problem(4, batch=(2,))
    most = D.from_log_probs(reference, tabular.tilt(reference, r, math.inf))
    budget = 0.3 * most.clamp(max=1.0)
    best = tabular.optimum(reference, r, D, budget=budget)
    torch.testing.assert_close(best.distance, budget, rtol=1e-9, atol=1e-12)
    others = torch.stack([tabular.random_policy(8, 2, seed=seed) for seed in range(4000)])
    share = torch.rand(4000, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    others = torch.logaddexp(others + share.log(), reference + torch.log1p(-share))
    within = D.from_log_probs(reference.expand_as(others), others) <= budget
    assert int(within.sum()) > 100
    reward = tabular.expectation(others, r)
    assert bool((reward <= best.reward + 1e-10)[within].all())


def test_a_tv_budget_against_linear_programming():
    reference, r = problem(7)
    p, k = reference.exp().numpy(), 8
    for budget in (0.05, 0.2, 0.45):
        # variables: policy and s >= |policy - p|
        A = [
            [*(1.0 if j == i else 0.0 for j in range(k)), *(-1.0 if j == i else 0.0 for j in range(k))]
            for i in range(k)
        ]
        A += [[-x if j < k else x for j, x in enumerate(row)] for row in A]
        A += [[0.0] * k + [0.5] * k]
        b = [*p, *(-p), budget]
        found = scipy.optimize.linprog(
            [*(-r.numpy()), *([0.0] * k)], A_ub=A, b_ub=b, A_eq=[[1.0] * k + [0.0] * k], b_eq=[1.0], bounds=(0, None)
        )
        best = tabular.optimum(reference, r, "tv", budget=budget)
        assert best.reward.item() == pytest.approx(-found.fun, abs=1e-8)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "neyman_chi2", "jeffreys"])
def test_the_ends_of_a_budget(name):
    D = divergence(name)
    reference, r = problem(5)
    none = tabular.optimum(reference, r, D, budget=0.0)
    torch.testing.assert_close(none.log_probs, reference)
    assert none.coefficient == math.inf
    torch.testing.assert_close(tabular.optimum(reference, r, D, budget=1e-33).log_probs, reference)
    small = tabular.optimum(reference, r, D, budget=1e-10)
    assert small.distance.item() == pytest.approx(1e-10, rel=1e-6)
    every = tabular.optimum(reference, r, D, budget=math.inf)
    assert every.reward == r.max()
    assert every.coefficient == 0
    flat = tabular.optimum(reference, torch.zeros(8), D, budget=0.2)
    torch.testing.assert_close(flat.log_probs, reference)
    with pytest.raises(ValueError, match="positive and finite"):
        none.gap(0.1, 0.1)


@given(st.integers(0, 10**6), st.floats(0.001, 3))
def test_reverse_kl_is_the_exponential_tilt(seed, coefficient):
    reference, r = problem(seed)
    best = tabular.optimum(reference, r, "reverse_kl", coefficient=coefficient)
    torch.testing.assert_close(best.log_probs, tabular.tilt(reference, r, 1 / coefficient), rtol=1e-9, atol=1e-9)
    log_z = tabular.log_partition(reference, r, 1 / coefficient)
    assert best.normaliser.item() == pytest.approx(coefficient * log_z.item(), rel=1e-9, abs=1e-9)
    if 1e-6 < best.distance.item() < 0.99 * tilted_kl(reference, r, math.inf).item():
        by_budget = tabular.optimum(reference, r, "reverse_kl", budget=best.distance)
        assert 1 / by_budget.coefficient.item() == pytest.approx(1 / coefficient, rel=1e-5)
        assert 1 / by_budget.coefficient == pytest.approx(beta_for_kl(reference, r, best.distance).item(), rel=1e-5)


@given(st.integers(0, 10**6), st.sampled_from(["jsd", "chi2_kl", "neyman_chi2"]), st.floats(-50, 50), st.floats(0.2, 5))
@settings(deadline=None, max_examples=30)
def test_shift_and_scale_of_the_reward(seed, name, shift, scale):
    reference, r = problem(seed)
    one = tabular.optimum(reference, r, name, coefficient=0.5)
    moved = tabular.optimum(reference, scale * r + shift, name, coefficient=0.5 * scale)
    torch.testing.assert_close(moved.log_probs.exp(), one.log_probs.exp(), rtol=1e-8, atol=1e-10)
    assert moved.normaliser.item() == pytest.approx(scale * one.normaliser.item() + shift, rel=1e-8, abs=1e-8)


def test_diagonal_dominance_at_matched_reward():
    """Of optima with one expected reward, each is nearest in its own divergence (card 01, check 5)."""
    names = ["reverse_kl", "forward_kl", "jsd", "squared_hellinger", "chi2_kl", "neyman_chi2", "tv"]
    reference, r = problem(11)
    goal = 0.5 * (tabular.expectation(reference, r) + r.max())
    found = [tabular.optimum(reference, r, name, expected_reward=goal) for name in names]
    for best in found:
        assert best.reward.item() == pytest.approx(goal.item(), abs=1e-9)
    for i, name in enumerate(names):
        distances = [divergence(name).from_log_probs(reference, best.log_probs).item() for best in found]
        assert distances[i] == min(distances)
        assert sum(d > distances[i] + 1e-9 for d in distances) == len(names) - 1


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd(0.3)", "squared_hellinger", "chi2_kl", "jeffreys"])
def test_an_optimum_is_differentiable(name):
    reference, r = problem(2, outcomes=5, batch=(2,))
    c = torch.tensor([0.4, 1.1], dtype=torch.float64)

    def everything(logits, r, c):
        best = tabular.optimum(logits.log_softmax(-1), r, name, coefficient=c)
        return best.log_probs, best.normaliser, best.distance, best.reward

    assert torch.autograd.gradcheck(everything, [x.clone().requires_grad_() for x in (reference, r, c)], atol=1e-6)


def test_the_reference_is_never_left():
    p = torch.tensor([0.25, 0.25, 0.5, 0.0], dtype=torch.float64)
    for name in ("reverse_kl", "forward_kl", "tv"):
        best = tabular.optimum(p.log(), torch.tensor([0.0, 1.0, 0.5, 9.0]), name, coefficient=0.3)
        assert best.log_probs[3] == -torch.inf
        assert best.log_probs.exp().sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "exactly one of coefficient, budget, expected_reward"),
        ({"coefficient": 1.0, "budget": 1.0}, "coefficient, budget given"),
        ({"coefficient": 0.0}, "coefficient=0: must be positive and finite; budget=inf"),
        ({"coefficient": math.inf}, "coefficient=inf"),
        ({"budget": -0.1}, "budget=-0.1: must not be negative"),
        ({"budget": math.nan}, "budget=nan"),
        ({"expected_reward": 99.0}, "expected_reward=99: the reference has"),
    ],
)
def test_bad_requests_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        tabular.optimum(*problem(0), "jsd", **options)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd(0.5)", "squared_hellinger", "jeffreys"])
@given(seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_identity_two_for_any_divergence(name, seed):
    """Bregman = D - Delta + (E* r - E r) / coefficient; for reverse KL it is KL(policy || optimum)."""
    reference, r = problem(seed, outcomes=50)
    candidates = tabular.random_policy(50, 20, seed=seed + 1)
    D = divergence(name)
    best = tabular.optimum(reference, r, D, coefficient=0.7)
    reward = tabular.expectation(candidates, r)
    gap = best.gap(D.from_log_probs(reference.expand_as(candidates), candidates), reward)
    direct = tabular.bregman(D, reference, candidates, best.log_probs.expand_as(candidates))
    torch.testing.assert_close(gap, direct, rtol=1e-9, atol=1e-10)
    kl = (candidates.exp() * (candidates - best.log_probs)).sum(-1)
    assert torch.allclose(gap, kl, rtol=1e-10, atol=1e-10) == (name == "reverse_kl")


@pytest.mark.parametrize("name", ["neyman_chi2", "le_cam"])
def test_identity_two_is_a_bound_where_outcomes_are_given_up(name):
    reference, r = problem(6)
    candidates = tabular.random_policy(8, 200, seed=1)
    D = divergence(name)
    best = tabular.optimum(reference, r, D, coefficient=0.15)
    assert bool((best.log_probs == -torch.inf).any())
    gap = best.gap(D.from_log_probs(reference.expand_as(candidates), candidates), tabular.expectation(candidates, r))
    direct = tabular.bregman(D, reference, candidates, best.log_probs.expand_as(candidates))
    assert bool((gap >= direct - 1e-10).all())
    assert bool((gap > direct + 1e-3).any())


@pytest.mark.parametrize("name", FAMILY)
def test_pathwise_and_score_function_gradients_agree(name):
    """And both vanish at the optimum, for a smooth divergence."""
    D = divergence(name)
    reference, r = problem(8)
    logits = tabular.random_policy(8, seed=9)
    pathwise = tabular.gradient(lambda policy: tabular.objective(policy, reference, r, D, 0.5), logits)
    score = tabular.score_gradient(logits, r - 0.5 * D.link(reference - logits))
    torch.testing.assert_close(pathwise, score)
    if name in CLOSED:
        best = tabular.optimum(reference, r, D, coefficient=0.5).log_probs
        at_best = tabular.gradient(lambda policy: tabular.objective(policy, reference, r, D, 0.5), best)
        assert at_best.abs().max() < 1e-12
        assert score.abs().max() > 1e-3


@pytest.mark.parametrize("name", CLOSED)
def test_the_preference_loss_recovers_the_optimum(name):
    """Card 01, check 4: zero population gradient at the closed form, and the implicit reward is the reward."""
    D = divergence(name)
    reference, r = problem(10, outcomes=6)
    best = tabular.optimum(reference, r, D, coefficient=0.8).log_probs

    def loss(policy):
        return tabular.preference_loss(tabular.implicit_reward(policy, reference, D, 0.8), r)

    assert tabular.gradient(loss, best).abs().max() < 1e-12
    assert tabular.gradient(loss, reference).abs().max() > 1e-3
    offset = tabular.implicit_reward(best, reference, D, 0.8) - r
    assert (offset - offset[0]).abs().max() < 1e-8
    others = tabular.random_policy(6, 500, seed=0)
    assert bool((torch.stack([loss(other) for other in others]) > loss(best)).all())


@pytest.mark.parametrize("name", BOUNDED)
def test_no_implicit_reward_where_the_link_is_bounded(name):
    reference, _ = problem(0)
    with pytest.raises(ValueError, match="its link stops at"):
        tabular.implicit_reward(reference, reference, name, 1.0)


def test_preference_loss_by_hand_and_its_weights():
    score, r = torch.tensor([0.3, -0.2], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    prefer, said = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-0.5))
    by_hand = -(prefer * math.log(said) + (1 - prefer) * math.log(1 - said)) / 2 * 2 / 2
    assert tabular.preference_loss(score, r).item() == pytest.approx(by_hand, rel=1e-12)
    weight = torch.tensor([[5.0, 3.0], [3.0, 7.0]], dtype=torch.float64)  # the diagonal and the scale do not count
    assert tabular.preference_loss(score, r, weight).item() == pytest.approx(by_hand, rel=1e-12)
    start = score.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: tabular.preference_loss(s, r, weight), start)


def test_descend_reaches_the_optimum():
    reference, r = problem(12)
    best = tabular.optimum(reference, r, "jsd", coefficient=0.3)
    seen = []
    found = tabular.descend(
        lambda policy: -tabular.objective(policy, reference, r, "jsd", 0.3),
        reference,
        steps=300,
        cooling=True,
        watch=lambda step, policy: seen.append((step, policy)),
    )
    short, before = (
        float(
            tabular.objective(best.log_probs, reference, r, "jsd", 0.3) - tabular.objective(p, reference, r, "jsd", 0.3)
        )
        for p in (found, reference)
    )
    assert 0 < short < 0.02 * before
    assert [step for step, _ in seen] == list(range(301))
    torch.testing.assert_close(seen[0][1], reference)
    torch.testing.assert_close(seen[-1][1], found)


def test_random_policies_and_entropy():
    policies = tabular.random_policy(4, 2000, seed=0)
    torch.testing.assert_close(policies.exp().sum(-1), torch.ones(2000, dtype=torch.float64))
    torch.testing.assert_close(policies.exp().mean(0), torch.full((4,), 0.25, dtype=torch.float64), atol=0.02, rtol=0)
    # the mean entropy of Dirichlet(1, ..., 1) is psi(k + 1) - psi(2)
    expected = 1 / 2 + 1 / 3 + 1 / 4
    assert tabular.entropy(policies).mean().item() == pytest.approx(expected, abs=0.02)
    assert tabular.entropy(torch.tensor([1.0, 0.0]).log()) == 0
    assert torch.equal(policies[:5], tabular.random_policy(4, 2000, seed=0)[:5])
