"""Card 23: the setting, its exact statements, and the collapse and its absence in a short run."""

import math

import pytest
import torch

from kullback.papers import p23_rl_as_bayes as paper
from kullback.papers import posterior_strings as strings


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return paper.reproduce(quick=True, docs=tmp_path_factory.mktemp("docs"))


def test_priors_are_laws_and_the_reward_is_a_letter_s():
    prior, reward = strings.problem(2)
    torch.testing.assert_close(torch.logsumexp(prior, 1), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    assert int(reward.sum()) == 4**6 - 3**6


def test_identities_are_exact(result):
    assert result.numbers["errors"]["value"] < 1e-12
    assert result.numbers["errors"]["gradient"] < 1e-12


def test_reward_alone_collapses_with_plain_gradients_and_not_with_exact_adam(result):
    plain, adam = (result.numbers["plain"][name] for name in ("plain gradient", "exact gradient, Adam"))
    first, last = plain[0], plain[max(plain)]
    assert last["entropy"][0] < 0.2 * first["entropy"][0]
    assert last["tie_odds"][0] > 1e3
    assert last["reward"][0] > 0.99
    assert adam[max(adam)]["entropy"][0] > 0.95 * first["entropy"][0]


def test_penalised_reward_and_forward_kl_come_to_the_posterior(result):
    table, gaps = result.numbers["matched"]["table"], result.numbers["matched"]["gaps"]
    for name in ("reward - beta KL", "forward KL"):
        assert table[name, 1.0]["to_target"][0] < 1e-4
        assert table[name, 0.3]["to_target"][0] < 5e-3
    for place in range(len(strings.BETAS)):
        assert all(value[place] > -1e-12 for value in gaps.values())  # a bound
        assert gaps[max(gaps)][place] < 0.2 * gaps[0][place]
    assert all(error < 1e-12 for error in result.numbers["matched"]["constrained"]["cost_error"])


def test_the_posterior_s_reward_and_distance_fall_with_beta(result):
    rows = [result.numbers["matched"]["table"]["posterior", beta] for beta in strings.BETAS]
    for what in ("reward", "prior_kl"):
        values = [row[what][0] for row in rows]
        assert values == sorted(values, reverse=True)
    assert all(row["tie_odds"][0] == pytest.approx(1, abs=1e-9) for row in rows)


def test_tied_actions(result):
    tied = result.numbers["tied"]
    assert tied["posterior"]["odds"] == pytest.approx(tied["path"][0]["odds"])
    assert tied["path"][max(tied["path"])]["odds"] > 50 * tied["path"][0]["odds"]
    assert math.isfinite(tied["posterior"]["entropy"])


def test_quick_run_writes_its_page(result):
    assert result.page.name == "23-rl-as-bayes.md"
    assert "arXiv 2205.11275" in result.text
    assert result.figures[0].stat().st_size < 200_000


def test_the_arms_start_alike_and_only_three_know_the_posterior(result):
    models = result.numbers["models"]
    assert len({str(runs[0]["path"][0]) for runs in models.values()}) == 1
    assert paper.methods()[paper.ALONE].penalty == 0
    assert paper.methods()[paper.PENALISED].penalty == paper.BETA
    assert all(str(paper.methods()[name].energy) == f"posterior(accuracy, beta={paper.BETA:g})"
               for name in (paper.REVERSE_KL, paper.FORWARD_KL))  # fmt: skip
    assert len(result.directions) == 16
