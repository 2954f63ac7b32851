"""Advantages against slow and obvious sums, and what must hold for all rewards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kullback as kb
from kullback.lm.advantages import (
    divergence_cost,
    generalised_advantage,
    group_advantage,
    importance,
    informative,
    later,
    overlong,
    sampler_gap,
    shaped_reward,
    whiten,
)
from kullback.lm.weights import leave_one_out

REWARDS = st.lists(st.sampled_from([0.0, 0.25, 1.0, -1.0, float("nan")]), min_size=2, max_size=12)


@given(REWARDS, st.sampled_from(["group", "leave_one_out", "none"]), st.sampled_from(["none", "batch"]))
def test_groups_do_not_see_each_other_and_unknown_rewards_count_nowhere(rewards, baseline, scale):
    reward = torch.tensor(rewards, dtype=torch.float64)
    group = torch.arange(len(reward)) % 3
    found = group_advantage(reward, group, baseline=baseline, scale=scale, epsilon=0.0 if scale == "none" else 1e-4)
    spread = 1.0
    known = ~reward.isnan()
    if scale == "batch":
        spread = (float(reward[known].std()) if known.sum() > 1 else 0.0) + 1e-4
    for i, r in enumerate(reward.tolist()):
        others = [x for j, x in enumerate(reward.tolist()) if j != i and group[j] == group[i] and x == x]
        if r != r or (baseline != "none" and not others):
            assert found[i] == 0
            continue
        base = {"group": (sum(others) + r) / (len(others) + 1), "none": 0.0}.get(
            baseline, sum(others) / max(len(others), 1)
        )
        assert float(found[i]) == pytest.approx((r - base) / spread, abs=1e-9)


def test_grpo_s_own_choice_is_the_z_score() -> None:
    reward = torch.tensor([1.0, 0.0, 0.0, 0.5, 0.1, 0.1, 0.1, 0.1])
    found = group_advantage(reward, torch.tensor([0] * 4 + [1] * 4), epsilon=1e-4)
    first = reward[:4]
    torch.testing.assert_close(found[:4], (first - first.mean()) / (first.std() + 1e-4))
    assert found[4:].tolist() == [0.0] * 4  # not the rounding error of a mean over 1e-4
    assert informative(reward, torch.tensor([0] * 4 + [1] * 4)).tolist() == [True] * 4 + [False] * 4
    tenths = torch.full((10,), 0.1, dtype=torch.float64)  # ten of them, added and divided, are not one
    assert group_advantage(tenths, torch.zeros(10, dtype=torch.long), epsilon=0.0).tolist() == [0.0] * 10


def test_an_unknown_reward_makes_no_group_informative() -> None:
    reward = torch.tensor([1.0, torch.nan, 1.0, -1.0, torch.nan, -1.0, 1.0, 0.0, torch.nan])
    assert informative(reward, torch.arange(9) // 3).tolist() == [False] * 6 + [True] * 3


def test_a_shaped_reward_is_unknown_where_a_grade_is() -> None:
    grades = {"accuracy": torch.tensor([1.0, 0.0, torch.nan]), "finished": torch.tensor([1.0, 1.0, 1.0])}
    found = shaped_reward(grades, {"accuracy": 1.0, "finished": 0.1})
    torch.testing.assert_close(found, torch.tensor([1.1, 0.1, torch.nan]), equal_nan=True)
    assert grades["accuracy"][0] == 1
    with pytest.raises(ValueError, match="gives no 'style'; it gives accuracy, finished"):
        shaped_reward(grades, {"style": 1.0})


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_generalised_advantages_are_the_double_sum(seed, gamma, lam):
    """Scored positions with a tool's tokens in between, every delta discounted and added by hand."""
    draw = torch.Generator().manual_seed(seed)
    reward, value = torch.randn(2, 3, 7, generator=draw, dtype=torch.float64)
    scored = torch.rand(3, 7, generator=draw) < 0.7
    found = generalised_advantage(reward, value, scored, gamma=gamma, lam=lam)
    for i in range(3):
        places = scored[i].nonzero()[:, 0].tolist()
        r, V = [float(reward[i, t]) for t in places], [float(value[i, t]) for t in places] + [0.0]
        delta = [r[k] + gamma * V[k + 1] - V[k] for k in range(len(places))]
        expected = [sum((gamma * lam) ** (j - k) * delta[j] for j in range(k, len(delta))) for k in range(len(delta))]
        assert found[i, places].tolist() == pytest.approx(expected, abs=1e-12)
        assert (found[i][~scored[i]] == 0).all()


def test_the_ends_of_lambda() -> None:
    reward, value = torch.randn(2, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scored = torch.ones(2, 5, dtype=torch.bool)
    one = generalised_advantage(reward, value, scored, gamma=1.0, lam=1.0)
    torch.testing.assert_close(one, reward.flip(1).cumsum(1).flip(1) - value)  # reward to go minus value
    zero = generalised_advantage(reward, value, scored, gamma=0.9, lam=0.0)
    after = torch.cat([value[:, 1:], torch.zeros(2, 1)], 1)
    torch.testing.assert_close(zero, reward + 0.9 * after - value)  # one temporal difference


def test_whitening_ignores_what_is_masked() -> None:
    values, mask = torch.randn(4, 6, dtype=torch.float64), torch.rand(4, 6) < 0.6
    values[~mask] = torch.nan
    white = whiten(values, mask)
    assert float(white[mask].mean()) == pytest.approx(0, abs=1e-9)
    assert float(white[mask].std()) == pytest.approx(1, abs=1e-6)
    assert (white[~mask] == 0).all()


def test_importance_weights_turn_a_sampler_s_mean_into_the_student_s() -> None:
    """All completions of two tokens from three: E_sampler[weight * h] = E_student[h], if the cap does not act."""
    draw = torch.Generator().manual_seed(0)
    student, sampler = torch.randn(2, 3, 3, generator=draw, dtype=torch.float64).log_softmax(-1).unbind(0)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    ours, theirs = (
        torch.stack([p[0, pairs[:, 0]], p[1, pairs[:, 1]]], 1) for p in (student, sampler)
    )  # two tokens, independent
    scored, h = torch.ones(9, 2, dtype=torch.bool), torch.randn(9, generator=draw, dtype=torch.float64)
    whole = importance(ours, theirs, scored, cap=1e9, level="sequence")[:, 0]
    assert float((theirs.sum(1).exp() * whole * h).sum()) == pytest.approx(float((ours.sum(1).exp() * h).sum()))
    each = importance(ours, theirs, scored, cap=1e9)
    torch.testing.assert_close(each, (ours - theirs).exp())
    assert importance(ours, theirs, scored, cap=1.1).max() == pytest.approx(1.1)
    unknown = torch.full_like(theirs, torch.nan)
    assert (importance(ours, unknown, scored, cap=2.0) == 1).all()
    gap = (theirs.sum(1).exp()[:, None] * sampler_gap(ours, theirs, scored)).sum()  # KL of both tokens
    assert float(gap) == pytest.approx(float((sampler.exp() * (sampler - student))[:2].sum()))


def test_a_divergence_s_cost_per_token() -> None:
    D, scored = kb.divergence("forward_kl"), torch.tensor([[True, True, False]])
    target, model = torch.tensor([[-1.0, -2.0, torch.nan]]), torch.tensor([[-1.5, -1.0, torch.nan]])
    values = torch.tensor([[0.3, 0.2, torch.nan]])
    local = divergence_cost(D, target, model, scored)
    torch.testing.assert_close(local[0, :2], D.link(torch.tensor([0.5, -1.0])))
    along = divergence_cost(D, target, model, scored, horizon="sequence", values=values)
    torch.testing.assert_close(along, local + torch.tensor([[0.2, 0.0, 0.0]]))
    whole = divergence_cost(D, target, model, scored, horizon="whole")
    torch.testing.assert_close(whole[0], torch.cat([D.link(torch.tensor([-0.5, -0.5])), torch.zeros(1)]))


@settings(deadline=None)  # TRL is imported on the way
@given(st.integers(1, 40), st.data())
def test_overlong_answers_pay_as_in_trl(longest, data):
    rewards = pytest.importorskip("trl.rewards")
    soft = data.draw(st.integers(1, longest))
    lengths = data.draw(st.lists(st.integers(1, longest), min_size=1, max_size=8))
    theirs = rewards.get_soft_overlong_punishment(longest, soft)([[0] * length for length in lengths])
    torch.testing.assert_close(overlong(torch.tensor(lengths), longest=longest, soft=soft), torch.tensor(theirs))


@given(REWARDS, st.integers(1, 3))
def test_a_baseline_never_has_its_own_row_nor_an_unknown_one(values, groups):
    group = torch.arange(len(values)) % groups
    found = leave_one_out(torch.tensor(values, dtype=torch.float64), group)
    for i in range(len(values)):
        others = [x for j, x in enumerate(values) if j != i and group[j] == group[i] and x == x]
        assert float(found[i]) == pytest.approx(sum(others) / len(others) if others else 0.0, abs=1e-12)


def test_what_comes_later_leaves_out_the_token_itself() -> None:
    assert later(torch.tensor([[1.0, 2.0, 4.0], [3.0, 0.0, 5.0]])).tolist() == [[6.0, 4.0, 0.0], [5.0, 5.0, 0.0]]
