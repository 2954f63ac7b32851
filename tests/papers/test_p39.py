"""Card 39: the bandit, its exact optimum, and what its check list asks of the study."""

import pytest
import torch

from kullback.papers import covered_bandit as bandit
from kullback.papers import p39_chi_po as paper


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return paper.reproduce(quick=True, docs=tmp_path_factory.mktemp("docs"))


def test_pairs_are_of_two_different_actions_labelled_by_the_reward():
    pairs = bandit.sample_pairs(0, 20_000)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    reward = bandit.rewards(0)
    expected = torch.sigmoid(reward[pairs].max(1).values - reward[pairs].min(1).values).mean()
    ordered = (reward[pairs[:, 0]] > reward[pairs[:, 1]]).double().mean()
    assert float(ordered) == pytest.approx(float(expected), abs=0.015)
    # action 0 against another: 2 * 1/2 * 1/2 of all draws, the others without repeats 1/4 * 99/100
    assert float((pairs == 0).any(1).double().mean()) == pytest.approx(0.5 / (0.5 + 0.25 * 0.99), abs=0.015)


def test_few_pairs_leave_actions_out():
    assert bandit.unseen_actions(0, 100) > 20
    assert bandit.unseen_actions(0, 1600) < 3


def test_every_run_starts_at_the_reference(result):
    base = sum(result.numbers["reference"]) / 2
    for runs in result.numbers["runs"].values():
        assert runs.reward[0].mean(1).tolist() == pytest.approx([base] * len(bandit.COEFFICIENTS))
        assert runs.end.shape == (6, 2)


@pytest.mark.parametrize("pairs", bandit.PAIRS)
def test_chi_po_stays_nearer(result, pairs):
    """From coefficient 0.5 on, already after the quick run's 300 steps; below it, only later."""
    runs = result.numbers["runs"]
    assert (runs["chi-PO", pairs].chi2.mean(1)[2:] < runs["DPO", pairs].chi2.mean(1)[2:]).all()


def test_the_clip_is_all_that_differs(result):
    """It binds with few pairs, and then the two rows differ."""
    runs = result.numbers["runs"]
    plain, cut = runs["chi-PO, no clip", 100], runs["chi-PO", 100]
    assert (cut.clipped[0] > 0).any()
    assert not torch.allclose(plain.end, cut.end)


def test_quick_run_writes_page_and_figure(result):
    assert result.page.name == "39-chi-po.md"
    assert result.page.read_text() == result.text
    assert "kullback reproduce 39 --quick" in result.text
    assert len(result.directions) == 14
    assert sum(direction.asserted for direction in result.directions) == 4
    assert result.figures[0].stat().st_size < 250_000


def test_the_language_model_s_arms_share_their_pairs_and_their_start(result):
    models = result.numbers["models"]
    assert [name.rpartition(", ")[0] for name in models] == ["DPO", "chi-PO", "DPO", "DPO, clipped", "chi-PO"]
    assert len({str(runs[0]["path"][0]) for runs in models.values()}) == 1
    (written,) = result.numbers["pairs"]
    assert all(row["chosen"] != row["rejected"] for row in written["pairs"])
