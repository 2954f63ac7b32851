"""Card 09: the exact part at full size with the card's directions, the trained part for a few steps."""

import pytest
import torch

from kullback.divergence import divergence
from kullback.papers import p09_decoupling_kl as paper
from kullback.papers import two_mode_strings as strings


@pytest.fixture(scope="module")
def cells():
    return {
        (prefix, weight): strings.tabular_cell(prefix=prefix, weight=weight, seeds=2, steps=400)
        for prefix in paper.PREFIXES
        for weight in paper.WEIGHTS
    }


@pytest.mark.parametrize("prefix", paper.PREFIXES)
def test_reverse_is_more_accurate_and_less_undecided(cells, prefix):
    for seed in range(2):
        accuracy, entropy = (
            [cells[prefix, weight][name][seed] for weight in paper.WEIGHTS] for name in ("avg@1", "entropy")
        )
        assert accuracy == sorted(accuracy)
        assert entropy == sorted(entropy, reverse=True)


def test_numbers_are_near_the_card_s(cells):
    """Four seeds of the card's second implementation, a little widened."""
    ranges = {
        ("teacher", 0.0): {"avg@1": (0.13, 0.20), "pass@32": (0.89, 0.98), "entropy": (0.58, 0.75)},
        ("teacher", 1.0): {"avg@1": (0.21, 0.27), "pass@32": (0.80, 0.93), "entropy": (0.53, 0.65)},
        ("student", 0.0): {"avg@1": (0.08, 0.14), "entropy": (0.80, 0.99)},
        ("student", 1.0): {"avg@1": (0.20, 0.26), "entropy": (0.58, 0.73)},
    }
    for cell, expected in ranges.items():
        for name, (low, high) in expected.items():
            assert all(low < value < high for value in cells[cell][name]), (cell, name, cells[cell][name])


def test_forward_covers_on_teacher_prefixes(cells):
    for seed in range(2):
        passing = [cells["teacher", weight]["pass@32"][seed] for weight in paper.WEIGHTS]
        assert passing == sorted(passing, reverse=True)


def test_each_coupled_cell_is_best_at_its_own_sequence_kl(cells):
    ends = [(prefix, weight) for prefix in paper.PREFIXES for weight in (0.0, 1.0)]
    for seed in range(2):
        assert min(ends, key=lambda cell: cells[cell]["KL(T||S)"][seed]) == ("teacher", 0.0)
        assert min(ends, key=lambda cell: cells[cell]["KL(S||T)"][seed]) == ("student", 1.0)


@pytest.mark.parametrize("weight", paper.GRID)
@pytest.mark.parametrize("prefix", paper.PREFIXES)
def test_the_closed_gradient_is_autograd_s(prefix, weight):
    draw = torch.Generator().manual_seed(0)
    D = (
        divergence(f"{weight!r}*reverse_kl + {1 - weight!r}*forward_kl")
        if 0 < weight < 1
        else divergence(("forward_kl", "reverse_kl")[int(weight)])
    )
    teacher, _ = strings.two_modes(3, draw)
    visits, target = strings.conditionals(teacher)
    position = torch.cat([torch.full((strings.SYMBOLS**t,), t) for t in range(strings.LENGTH)])
    logits = torch.randn(3, strings.LENGTH, strings.SYMBOLS, generator=draw, dtype=torch.float64).requires_grad_()
    if prefix == "student":
        visits = torch.cat(strings.reach_of(logits.detach())[:-1], 1)
    (expected,) = torch.autograd.grad((visits * D.categorical(target.log(), logits[:, position])).sum(), logits)
    found = strings.cell_gradient(D, target.log(), logits.detach(), visits, position)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_prefixes_and_strings_are_probabilities():
    teacher, right = strings.two_modes(40, torch.Generator().manual_seed(0))
    visits, target = strings.conditionals(teacher)
    torch.testing.assert_close(teacher.sum(1), torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(visits.sum(1), torch.full((40,), float(strings.LENGTH), dtype=torch.float64))
    torch.testing.assert_close(target.sum(-1), torch.ones(40, 85, dtype=torch.float64))
    assert (teacher[torch.arange(40), right] > 0.5).sum() == 30  # the first mode is right for three quarters


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return paper.reproduce(quick=True, docs=tmp_path_factory.mktemp("docs"))


def test_quick_run_writes_page_and_figure(result):
    page = result.page.read_text()
    assert result.page.name == "09-decoupling-kl.md"
    assert page == result.text
    assert "The RL half is not run" in page
    assert "kullback reproduce 09 --quick" in page
    assert result.figures[0].stat().st_size < 200_000


def test_quick_run_has_every_cell_and_a_gate_that_climbs(result):
    assert set(result.numbers["cells"]) == {(prefix, weight) for prefix in paper.PREFIXES for weight in paper.WEIGHTS}
    (gated,) = result.numbers["gated"]
    assert gated["path"]["length"] == [4, 7, 10, 10]  # an untrained student stays undecided, so every probe adds a rung
    assert len(gated["path"]["probed"]) == 4


def test_what_is_not_decided_does_not_count(result):
    start_for_rl = next(one for one in result.directions if "RL" in one.says)
    assert start_for_rl.held is None
    assert result.held in (True, False, "partly")
