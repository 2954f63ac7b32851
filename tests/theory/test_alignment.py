"""Card 24: each of its checks, by enumeration."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kullback.divergence import divergence
from kullback.estimate import beta_for_kl, legendre, log_partition, tilt, variance
from kullback.theory import alignment, tabular

KL = divergence("reverse_kl")
COIN = torch.tensor([0.7, 0.3], dtype=torch.float64).log()
ZERO_ONE = torch.tensor([0.0, 1.0], dtype=torch.float64)
LETTERS = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
LADDER = torch.arange(4, dtype=torch.float64)


def random_problem(seed, outcomes=50):
    draw = torch.Generator().manual_seed(seed)
    return tabular.random_policy(outcomes, seed=seed), torch.randn(outcomes, generator=draw, dtype=torch.float64)


# The optimum under a budget


def test_budget_zero_is_the_reference_and_a_large_one_the_best():
    p, r = random_problem(0)
    assert KL.from_log_probs(p, tilt(p, r, beta_for_kl(p, r, 0.0))) == 0
    most = -p[r.argmax()].item()
    for budget in (most, 2 * most):
        assert tabular.optimum(p, r, budget=budget).reward.item() == r.max().item()


def test_reward_is_concave_in_the_budget_with_slope_one_over_beta():
    p, r = random_problem(1)
    budgets = torch.linspace(0.05, 1.5, 30, dtype=torch.float64)
    best = tabular.optimum(p.expand(30, 50), r, budget=budgets)
    steps = best.reward.diff()
    assert bool((steps.diff() < 0).all())
    h = 1e-5
    up, down = (tabular.optimum(p.expand(30, 50), r, budget=budgets + s * h).reward for s in (1, -1))
    torch.testing.assert_close((up - down) / (2 * h), best.coefficient, rtol=1e-6, atol=0)


def test_derivatives_in_beta():
    p, r = random_problem(2)
    beta = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(tabular.expectation(tilt(p, r, beta), r), beta)
    assert slope.item() == pytest.approx(variance(tilt(p, r, 1.3), r).item(), rel=1e-12)


@given(st.integers(0, 10**6), st.floats(0.05, 4))
def test_what_the_budget_buys_is_a_jeffreys_divergence(seed, beta):
    p, r = random_problem(seed)
    phi = tilt(p, r, beta)
    gained = tabular.expectation(phi, r) - tabular.expectation(p, r)
    assert gained.item() == pytest.approx(divergence("jeffreys").from_log_probs(p, phi).item() / beta, rel=1e-9)


@given(st.integers(0, 10**6), st.floats(0.02, 1.0))
@settings(deadline=None)
def test_identity_two_bounds_every_policy(seed, budget):
    p, r = random_problem(seed)
    best = tabular.optimum(p, r, budget=min(budget, 0.9 * float(-p[r.argmax()])))
    candidates = torch.cat([tabular.random_policy(50, 20, seed=seed + 1), tilt(p, r, 0.7)[None], p[None]])
    kl, reward = KL.from_log_probs(p.expand_as(candidates), candidates), tabular.expectation(candidates, r)
    direct = KL.from_log_probs(best.log_probs.expand_as(candidates), candidates)
    torch.testing.assert_close(best.gap(kl, reward), direct, rtol=1e-10, atol=1e-10)
    within = kl <= best.distance
    assert bool((reward[within] <= best.reward + 1e-12).all())


def test_beta_multiplies_the_reward_and_its_inverse_the_kl():
    """The pitfall of notation: a DPO or PPO coefficient is 1 / beta."""
    p, r = random_problem(3)
    torch.testing.assert_close(tabular.optimum(p, r, coefficient=0.25).log_probs, tilt(p, r, 4.0))


# Best of N


def enumerated_best_of(p, r, n):
    """pi_n by all k^n tuples of draws, ties broken evenly."""
    k, law = len(p), torch.zeros(len(p), dtype=torch.float64)
    for draws in itertools.product(range(k), repeat=n):
        chance = math.exp(sum(p[i].item() for i in draws))
        top = max(r[i].item() for i in draws)
        winners = [i for i in draws if r[i].item() == top]
        for i in winners:
            law[i] += chance / len(winners)
    return law


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("levels", [2, 3, 10])
def test_best_of_n_by_enumeration(n, levels):
    p = tabular.random_policy(4, seed=n)
    r = torch.randint(levels, (4,), generator=torch.Generator().manual_seed(levels)).double()
    torch.testing.assert_close(alignment.best_of_n(p, r, n).exp(), enumerated_best_of(p, r, n), rtol=1e-12, atol=0)


@given(st.integers(0, 10**6), st.floats(1, 1e6), st.integers(1, 30))
def test_best_of_n_sums_to_one_within_its_bound_and_sees_only_order(seed, n, levels):
    p, r = random_problem(seed, outcomes=20)
    r = (levels * r).round() / levels  # ties
    law = alignment.best_of_n(p, r, n)
    assert law.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert KL.from_log_probs(p, law).item() <= alignment.best_of_n_bound(n) + 1e-12
    torch.testing.assert_close(alignment.best_of_n(p, r.exp() + r, n), law, rtol=1e-12, atol=1e-12)
    batch = alignment.best_of_n(torch.stack([p, p.flip(0)]), torch.stack([r, r.flip(0)]), n)
    torch.testing.assert_close(batch[1].flip(0), law, rtol=1e-10, atol=1e-10)


def test_the_optimum_is_not_invariant_under_monotone_transforms():
    p, r = random_problem(4)
    one, other = (tabular.optimum(p, reward, budget=0.3).log_probs for reward in (r, r.exp()))
    assert (one - other).abs().max() > 0.1


def test_one_draw_is_the_reference_and_many_are_the_best():
    p, r = random_problem(5)
    torch.testing.assert_close(alignment.best_of_n(p, r, 1), p, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(alignment.best_of_n(p, r, math.exp(200)).exp()[r.argmax()].item(), 1.0)


def test_the_bound_is_tight_without_ties():
    """A uniform reference over ever more distinct rewards."""
    short = []
    for k in (100, 1000, 10000):
        p = torch.full((k,), -math.log(k), dtype=torch.float64)
        kl = KL.from_log_probs(p, alignment.best_of_n(p, torch.arange(k).double(), 8))
        short.append(alignment.best_of_n_bound(8) - kl.item())
    assert short[0] > short[1] > short[2] > 0
    assert short[2] < 1e-3


def test_log_n_is_not_the_budget_it_uses():
    """A pitfall: with ties the KL of best-of-N stays far below log N."""
    law = alignment.best_of_n(COIN, ZERO_ONE, 1000)
    assert KL.from_log_probs(COIN, law).item() == pytest.approx(-math.log(0.3), rel=1e-6)
    assert math.log(1000) > 6


def test_monte_carlo_agrees_with_the_law():
    p, r = random_problem(6, outcomes=6)
    r = r.round()
    draw = torch.Generator().manual_seed(0)
    draws = torch.multinomial(p.exp(), 200_000 * 4, replacement=True, generator=draw).view(-1, 4)
    won = draws.gather(1, r[draws].argmax(1, keepdim=True))[:, 0]  # the first of equals, which is as good as any
    seen = torch.bincount(won, minlength=6).double() / len(won)
    expected = alignment.best_of_n(p, r, 4).exp()
    assert bool(((seen - expected).abs() < 5 * (expected / len(won)).sqrt() + 1e-9).all())


def test_outcomes_that_cannot_occur_never_win():
    p = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64).log()
    law = alignment.best_of_n(p, torch.tensor([0.0, 1.0, 5.0, -1.0]), 3).exp()
    torch.testing.assert_close(law, torch.tensor([0.125, 0.875, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize("n", [0, 0.5, -1, math.inf, math.nan])
def test_no_best_of_less_than_one(n):
    with pytest.raises(ValueError, match="n >= 1"):
        alignment.best_of_n(COIN, ZERO_ONE, n)


# Sequences of independent symbols


@pytest.mark.parametrize(("p", "r", "length"), [(COIN, ZERO_ONE, 9), (LETTERS, LADDER, 5)])
def test_the_optimum_of_sequences_is_a_product(p, r, length):
    sequences = torch.tensor(list(itertools.product(range(len(p)), repeat=length)))
    whole, total = p[sequences].sum(1), r[sequences].sum(1)
    best = tabular.optimum(whole, total, budget=0.1 * length)
    beta = beta_for_kl(p, r, 0.1)
    assert 1 / best.coefficient.item() == pytest.approx(beta.item(), rel=1e-9)
    torch.testing.assert_close(best.log_probs, tilt(p, r, beta)[sequences].sum(1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("p", "r", "length"), [(COIN, ZERO_ONE, 9), (LETTERS, LADDER - 7, 5), (LETTERS, 0.5 * LADDER, 4)]
)
def test_the_law_of_the_total_is_that_of_all_sequences(p, r, length):
    """And best-of-N and its distances are the same on it as on the sequences themselves."""
    sequences = torch.tensor(list(itertools.product(range(len(p)), repeat=length)))
    whole, total = p[sequences].sum(1), r[sequences].sum(1)
    law, totals = alignment.sum_law(p, r, length, step=0.5 if r[1] == 0.5 else 1.0)
    for value, log_mass in zip(totals, law, strict=True):
        assert log_mass.exp().item() == pytest.approx(whole[total == value].exp().sum().item(), rel=1e-12)
    for n in (3, math.exp(2.5)):
        long, short = alignment.best_of_n(whole, total, n), alignment.best_of_n(law, totals, n)
        assert KL.from_log_probs(whole, long).item() == pytest.approx(KL.from_log_probs(law, short).item(), rel=1e-10)
        phi, phi_total = tilt(whole, total, 0.8), tilt(law, totals, 0.8)
        assert KL.from_log_probs(phi, long).item() == pytest.approx(
            KL.from_log_probs(phi_total, short).item(), rel=1e-9
        )


def test_totals_far_below_the_smallest_float():
    law, totals = alignment.sum_law(COIN, ZERO_ONE, 2000)
    assert law[-1].item() == pytest.approx(2000 * math.log(0.3), rel=1e-12)
    assert torch.logsumexp(law, 0).item() == pytest.approx(0, abs=1e-10)
    assert tabular.expectation(law, totals).item() == pytest.approx(600, rel=1e-10)


def test_rewards_off_the_lattice_are_refused():
    with pytest.raises(ValueError, match="step=1: the rewards do not lie on a lattice"):
        alignment.sum_law(COIN, torch.tensor([0.0, 0.3]), 4)
    with pytest.raises(ValueError, match="length=0"):
        alignment.sum_law(COIN, ZERO_ONE, 0)


@given(st.integers(0, 10**6), st.floats(-3, 3), st.floats(0.1, 2))
def test_scaled_cumulants_are_renyi_cross_entropies(seed, t, beta):
    p, r = random_problem(seed, outcomes=5)
    tilted, q = tilt(p, r, beta), r.log_softmax(-1)
    scaled = log_partition(tilted, r, t)
    by_renyi = -t * alignment.renyi_cross_entropy(tilted, q, 1 + t) + t * r.logsumexp(-1)
    torch.testing.assert_close(scaled, by_renyi, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_partition(tilted, r, -beta), -log_partition(p, r, beta), rtol=1e-9, atol=1e-9)
    near = alignment.renyi_cross_entropy(tilted, q, 1 + 1e-7)
    torch.testing.assert_close(alignment.renyi_cross_entropy(tilted, q, 1.0), near, rtol=1e-5, atol=1e-5)


def test_scaled_cumulants_hold_at_every_length():
    p, r, beta, t = LETTERS, LADDER, 0.6, 0.9
    for length in (1, 3, 8):
        law, totals = alignment.sum_law(tilt(p, r, beta), r, length)
        assert log_partition(law, totals, t).item() / length == pytest.approx(
            log_partition(tilt(p, r, beta), r, t).item(), rel=1e-10
        )


@given(st.floats(0.02, 0.98), st.floats(0.1, 2))
def test_the_rate_of_the_optimum_is_a_kl_between_tilts(share, beta):
    """J(a), by its own supremum over a grid, is reverse_kl(target=p_beta, model=p_{beta_a})."""
    phi, a = tilt(LETTERS, LADDER, beta), 3 * share
    rate = legendre(phi, LADDER, a)
    model = tilt(LETTERS, LADDER, beta + rate.t)
    assert tabular.expectation(model, LADDER).item() == pytest.approx(a, rel=1e-9)
    assert KL.from_log_probs(phi, model).item() == pytest.approx(rate.value.item(), rel=1e-9, abs=1e-12)
    grid = rate.t + torch.linspace(-2, 2, 4001, dtype=torch.float64)
    supremum = (grid * a - log_partition(phi, LADDER, grid)).max()
    assert rate.value.item() == pytest.approx(supremum.item(), abs=1e-6)


def test_the_rate_is_that_of_large_deviations():
    """-(1/m) log P(R_m >= a) falls to J(a) as m grows."""
    phi, a = tilt(LETTERS, LADDER, 0.5), 2.2
    rate = legendre(phi, LADDER, a).value.item()
    seen = []
    for length in (50, 200, 800):
        law, totals = alignment.sum_law(phi, LADDER, length)
        seen.append(-torch.logsumexp(law[totals >= a * length - 1e-9], 0).item() / length)
    assert seen[0] > seen[1] > seen[2] > rate
    assert seen[2] - rate < 1.2 * math.log(800) / (2 * 800) + 0.01


TABLE = {  # length: reward, KL to the reference, its bound, KL to the optimum; all per symbol
    20: (0.4444, 0.0554, 0.0568, 0.0190),
    100: (0.4929, 0.0895, 0.0900, 0.0092),
    400: (0.5074, 0.0973, 0.0975, 0.0039),
    1000: (0.5113, 0.0989, 0.0990, 0.0020),
}


@pytest.mark.parametrize("length", TABLE)
def test_the_card_s_table(length):
    found = alignment.agreement(COIN, ZERO_ONE, length, 0.1)
    assert found.optimum_reward == pytest.approx(0.51463, abs=5e-6)
    assert found.beta == pytest.approx(0.90583, abs=5e-6)
    seen = (found.best_of_n_reward, found.best_of_n_kl, found.bound, found.distance)
    assert seen == pytest.approx(TABLE[length], abs=5.1e-5)
    assert found.identity == pytest.approx(found.distance, rel=1e-8)


def test_the_total_distance_grows():
    """A pitfall: the equivalence is per symbol."""
    total = [alignment.agreement(COIN, ZERO_ONE, m, 0.1).total_distance for m in (100, 400, 1000)]
    assert total == pytest.approx([0.92, 1.55, 1.99], abs=0.01)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"budget=2: choose one above 0 and below .* 1.20397"):
        alignment.agreement(COIN, ZERO_ONE, 10, 2.0)
    with pytest.raises(ValueError, match="N = exp"):
        alignment.agreement(COIN, ZERO_ONE, 10_000, 0.1)
