"""Card 04: the tabular experiment's objects, exact, and the page from a quick run."""

import pytest
import torch

from kullback.divergence import divergence
from kullback.papers import p04_dph_rl as paper
from kullback.papers import replayed_policy as toy


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return paper.reproduce(quick=True, docs=tmp_path_factory.mktemp("docs"))


@pytest.fixture(scope="module")
def world():
    return toy.make_world(2, 300)


def test_kept_answers_are_right_and_belong_to_mastered_prompts(world):
    prompts = (world.kept >= 0).any(-1)
    assert prompts.any()
    assert not (prompts & ~world.mastered).any()
    answers = world.kept[world.kept >= 0]
    right = world.right[..., None].expand_as(world.kept)[world.kept >= 0]
    assert (answers // len(toy.STYLES) == right).all()


def test_at_the_start_replay_is_silent(world):
    for name in toy.DPH:
        weights = [part.clone().requires_grad_() for part in world.weights]
        initial = toy.policy(world.weights, world.features)
        draw = torch.Generator().manual_seed(0)
        value = toy._replayed(world, weights, initial, toy.TOY[name], draw).sum()
        value.backward()
        assert float(value.detach()) == pytest.approx(0, abs=1e-6)
        assert max(float(part.grad.abs().max()) for part in weights) < 1e-6


def test_seeds_in_one_batch_are_independent():
    """The second seed's policy is the same whether or not the first is trained beside it."""
    both, second = toy.make_world(2, 50), toy.make_world(1, 50, first=1)
    for together, alone in zip(both.weights, second.weights, strict=True):
        torch.testing.assert_close(together[1], alone[0], rtol=1e-4, atol=1e-5)


def test_measures_are_those_of_many_samples(world):
    exact = toy.measure_toy(world, world.weights)
    p = toy.policy(world.weights, world.features).exp()
    draw = torch.Generator().manual_seed(0)
    answers = torch.multinomial(p.flatten(0, 1), 16 * 400, replacement=True, generator=draw).view(2, 128, 400, 16)
    right = answers // 4 == world.right[..., None, None]
    strict = (right & (answers % 4 == world.wanted[..., None, None])).any(-1).float().mean(-1)
    for seed in range(2):
        mask = world.mastered[seed]
        assert exact["accuracy"][seed] == pytest.approx(float(right[seed][mask].float().mean()), abs=0.01)
        assert exact["strict"][seed] == pytest.approx(float(strict[seed][mask].mean()), abs=0.01)


def test_directions_of_the_card():
    """Fewer steps and seeds than the page; the two asserted directions are there."""
    names = ["GRPO, all prompts", "eta = 0", "forward KL", "2 JSD"]
    found = toy.run_toy(names=names, seeds=2, fit=1500, steps=300)
    for name in ("forward KL", "2 JSD"):
        for other, keys in (
            ("eta = 0", ("accuracy", "entropy", "strict")),
            ("GRPO, all prompts", ("entropy", "strict")),
        ):
            for key in keys:
                assert all(a > b for a, b in zip(found[name][key], found[other][key], strict=True)), (name, other, key)


def test_a_quick_run_writes_the_page(result):
    assert result.paper.number == 4
    assert result.page.exists()
    assert result.figures[0].exists()
    assert set(result.numbers["arms"]) == set(paper.names_of_arms())
    for runs in result.numbers["arms"].values():
        for group in ("mastered", "open"):
            curve = [runs[0][group][f"pass@{k}"] for k in paper.KS]
            assert curve == sorted(curve) or any(value != value for value in curve)


def test_the_arms_train_five_divergences_that_differ():
    names = [toy.TOY[name].held for name in toy.DPH]
    ratio = torch.linspace(-2, 2, 5, dtype=torch.float64)
    values = {name: tuple(divergence(name).value(ratio).tolist()) for name in names}
    assert len(set(values.values())) == 5
