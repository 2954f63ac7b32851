"""Card 24: the exact experiments at full size with the card's numbers, the trained one for fewer steps."""

import itertools

import pytest
import torch

from kullback.papers import p24_alignment_asymptotics as paper


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return paper.reproduce(quick=True, docs=tmp_path_factory.mktemp("docs"))


@pytest.fixture(scope="module")
def grid(result):
    return result.numbers["grid"]


def test_gap_and_distance_fall_on_the_grid(grid):
    assert len(grid) == 6
    for row in grid.values():
        for a, b in itertools.pairwise(row):
            assert 0 < b.gap < a.gap
            assert 0 < b.distance < a.distance


def test_the_rate_of_the_card(grid):
    """2 beta m gap / log m at m = 400, four letters."""
    found = [grid["letters", budget][-1].gap / grid["letters", budget][-1].predicted_gap for budget in paper.BUDGETS]
    assert found == pytest.approx([0.61, 0.86, 1.04], abs=0.006)


def test_total_kl_grows_by_half_log_two(grid):
    for name in paper.SYMBOLS:
        hundred, two, four = grid[name, 0.1][3:]
        for a, b in ((hundred, two), (two, four)):
            assert 0.30 < b.total_distance - a.total_distance < 0.35


def test_lattice_effects_are_there():
    """The KL per symbol rises at about every third step in length once it has become small."""
    rises, steps = paper.lattice_effect(range(300, 331))
    assert steps == 30
    assert 5 < rises < 20


def test_best_of_n_lies_below_the_frontier(result):
    for name, curves in result.numbers["frontier"].items():
        below, points, widest = paper.below_the_curve(curves, name)
        assert below == points > 15
        assert widest > 0.01  # not on it


def test_sequences_with_memory_are_laws_and_identity_two_holds(result):
    for name, rows in result.numbers["memory"].items():
        log_p, _ = paper.sequences_with_memory(name, 6)
        assert torch.logsumexp(log_p, 0).item() == pytest.approx(0, abs=1e-12)
        assert max(row["error"] for row in rows) < 1e-11
        assert rows[-1]["distance"] < rows[0]["distance"]
        assert rows[-1]["gap"] < rows[0]["gap"]


def test_the_pair_reward_counts_neighbours():
    _, reward = paper.sequences_with_memory("pair reward", 4)
    assert reward.tolist()[0b0111] == 2
    assert reward.tolist()[0b1101] == 1
    assert reward.tolist()[0b0101] == 0


def test_identity_two_follows_training(result):
    for name, paths in result.numbers["trained"].items():
        for path in paths:
            for direct, gap in path.values():
                assert gap == pytest.approx(direct, abs=1e-12)
            assert path[100][0] < (0.05 if name == "exact" else 0.5) * path[0][0]


def test_quick_run_writes_page_and_figure(result):
    page = result.page.read_text()
    assert result.page.name == "24-alignment-asymptotics.md"
    assert page == result.text
    assert result.held is True
    assert not result.missed
    assert "kullback reproduce 24 --quick" in page
    assert "arXiv 2404.01730" in page
    assert result.figures[0].stat().st_size < 200_000
