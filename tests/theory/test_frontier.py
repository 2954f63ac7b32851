"""The frontier over prompts: against a general optimiser, against policies known in full, and its standard errors."""

import math

import numpy
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kullback.estimate import expectation, tilt
from kullback.theory import tabular
from kullback.theory.alignment import best_of_n
from kullback.theory.frontier import Frontier


def rewards_of(seed, prompts=5, samples=4):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(5, (prompts, samples), generator=draw).double() / 4


def kl(policy, reference):
    return (policy.exp() * (policy - reference)).sum(-1)


def test_no_optimiser_finds_more_reward_for_the_kl():
    rewards = rewards_of(3, prompts=3)
    plane = Frontier(rewards, replicates=2)
    for budget in (0.05, 0.3, 0.7):
        spent = torch.full((3,), budget, dtype=torch.float64)
        attainable = plane.place(spent, torch.zeros(3)).attainable.value

        def policy(logits):
            return torch.from_numpy(numpy.asarray(logits)).view(3, 4).log_softmax(-1)

        found = scipy.optimize.minimize(
            lambda x: -float((policy(x).exp() * rewards).sum(-1).mean()),
            numpy.zeros(12),
            constraints={
                "type": "ineq",
                "fun": lambda x, b=budget: b - float((policy(x).exp() * (policy(x) + math.log(4))).sum(-1).mean()),
            },
            options={"ftol": 1e-12, "maxiter": 500},
        )
        assert -found.fun == pytest.approx(attainable, abs=2e-5)


@given(st.integers(0, 10**6), st.floats(0.3, 3))
@settings(deadline=None, max_examples=30)
def test_distances_are_those_of_the_policies_themselves(seed, heat):
    """Policies over the reference's samples, so that KL(policy || optimum) can be summed directly."""
    rewards = rewards_of(seed)
    reference = torch.full((5, 4), -math.log(4), dtype=torch.float64)
    policy = (heat * tabular.random_policy(4, 5, seed=seed) + rewards).log_softmax(-1)
    spent, earned = kl(policy, reference), expectation(policy, rewards)
    plane = Frontier(rewards, replicates=3)
    standing = plane.place(spent, earned)
    assert standing.kl.value == pytest.approx(spent.mean().item())
    assert standing.reward.value == pytest.approx(earned.mean().item())
    assert standing.attainable.value >= standing.reward.value - 1e-9
    betas = torch.logspace(-4, 3, 20001, base=math.e, dtype=torch.float64)[:, None]
    tilted = tilt(reference, rewards, betas)
    kls, gained = kl(tilted, reference).mean(-1), expectation(tilted, rewards).mean(-1)
    for number, seen, goal in ((standing.distance, kls, spent.mean()), (standing.excess, gained, earned.mean())):
        if seen[0] < goal < seen[-1] and not math.isnan(number.value):
            nearest = int((seen - goal).abs().argmin())
            direct = kl(policy, tilted[nearest]).mean().item()
            assert number.value == pytest.approx(direct, rel=5e-3, abs=2e-3)
            assert number.value >= -1e-9


def test_best_of_n_by_its_law_and_the_reference_at_the_origin():
    rewards = rewards_of(1, prompts=20, samples=8)
    plane = Frontier(rewards)
    reference = torch.full((20, 8), -math.log(8), dtype=torch.float64)
    for n in (1, 2, 4.5, 8):
        law = best_of_n(reference, rewards, n)
        found = plane.best_of(n)
        assert found.reward.value == pytest.approx(expectation(law, rewards).mean().item())
        assert found.kl.value == pytest.approx(kl(law, reference).mean().item(), abs=1e-12)
        assert found.attainable.value >= found.reward.value - 1e-9
    origin = plane.best_of(1)
    assert (origin.kl.value, origin.excess.value) == pytest.approx((0, 0), abs=1e-12)
    assert origin.attainable.value == pytest.approx(rewards.mean().item())


def test_continuous_rewards_are_kept_as_they_are():
    rewards = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plane = Frontier(rewards)
    assert plane.rewards.equal(rewards)
    kls, gained = plane.curve()
    assert gained[0].item() == pytest.approx(rewards.mean().item())
    assert gained[-1].item() == pytest.approx(rewards.amax(1).mean().item())
    assert kls[-1].item() == pytest.approx(math.log(5))
    assert bool((kls.diff() >= 0).all() and (gained.diff() >= 0).all())


def test_standard_errors_are_those_of_a_mean_over_prompts():
    draw = torch.Generator().manual_seed(0)
    rewards = torch.randint(2, (400, 8), generator=draw).double()
    plane = Frontier(rewards, replicates=1000)
    spent, earned = torch.rand(400, generator=draw) * 0.2, 0.5 + 0.2 * torch.rand(400, generator=draw)
    standing = plane.place(spent, earned)
    assert standing.kl.standard_error == pytest.approx(spent.std().item() / 20, rel=0.1)
    assert standing.reward.standard_error == pytest.approx(earned.std().item() / 20, rel=0.1)
    assert 0 < standing.distance.standard_error < 0.1


def test_beyond_what_the_samples_show_there_is_no_number():
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    far = Frontier(rewards).place(torch.tensor([5.0, 5.0]), torch.tensor([1.0, 1.0]))
    assert far.attainable.value == 0.5
    assert math.isnan(far.distance.value)
    assert math.isnan(far.needed.value)
    assert math.isnan(far.needed.standard_error)
    worse = Frontier(rewards).place(torch.tensor([0.1, 0.1]), torch.tensor([0.0, 0.0]))  # than the reference
    assert worse.needed.value == 0
    assert worse.excess.value == pytest.approx(0.1)


def test_what_cannot_be_placed_is_refused():
    with pytest.raises(ValueError, match="1 prompts"):
        Frontier(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="finite"):
        Frontier(torch.tensor([[0.0, math.nan], [0.0, 1.0]]))
