"""Card 02: the setting, the estimator, and what a quick run must already show."""

import pytest
import torch

import kullback as kb
from kullback.papers import p02_f_dpg as paper
from kullback.theory import tabular


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return paper.reproduce(quick=True, docs=tmp_path_factory.mktemp("docs"))


def test_chains_are_laws_and_targets_have_two_modes():
    base, allowed = paper.chains(3)
    torch.testing.assert_close(torch.logsumexp(base, 1), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    text = paper.strings()
    assert len(text) == 729
    assert int(allowed.sum()) == 2 * 2**6 - 1  # the string of 2s lacks both
    p = paper.log_target(base, allowed)
    kept = torch.where(allowed, base, -torch.inf).log_softmax(-1)
    torch.testing.assert_close(p.exp(), kept.exp(), atol=1e-7, rtol=0)


def test_independent_letters():
    logits = torch.randn(2, paper.LENGTH, paper.LETTERS, dtype=torch.float64)
    log_p = paper.independent(logits)
    torch.testing.assert_close(torch.logsumexp(log_p, 1), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    text, place = paper.strings(), 100
    alone = sum(logits[1].log_softmax(-1)[t, v] for t, v in enumerate(text[place]))
    torch.testing.assert_close(log_p[1, place], alone)


def test_training_lowers_its_own_divergence():
    base, allowed = paper.chains(2)
    for name in ("forward_kl", "tv", "2*jsd(0.5)"):
        D, target = kb.divergence(name), paper.log_target(base, allowed)
        start, end = paper.train(base, allowed, name, 0), paper.train(base, allowed, name, 100)
        assert (D.from_log_probs(target, end) < D.from_log_probs(target, start)).all()


def test_measures():
    base, allowed = paper.chains(1)
    found = paper.measure(base, base, allowed)
    share = float((base[0].exp() * allowed).sum())
    assert found["alignment"] == pytest.approx([share])
    assert found["entropy"] == pytest.approx(tabular.entropy(base).tolist())
    assert found["forward_kl"] == pytest.approx(
        [-torch.tensor(share).log().item()], abs=1e-5
    )  # KL(p, a) of p = a b / Z


def test_samples_reach_a_target_that_the_policy_can_be():
    base, allowed = paper.chains(1)
    path = paper.by_samples(base[0], allowed, "2*jsd(0.5)", 100, 256)
    assert path["forward_kl"][-1] < 0.3 * path["forward_kl"][0]
    assert path["normaliser"][-1] == pytest.approx(1, abs=0.1)


def test_a_quick_run_shows_the_order_and_writes_its_page(result):
    exact = result.numbers["exact"]
    for low, high in (("forward_kl", "2*jsd(0.5)"), ("2*jsd(0.5)", "reverse_kl")):
        assert sum(exact[low]["alignment"]) < sum(exact[high]["alignment"])
    assert result.page.name == "02-f-dpg.md"
    assert "arXiv 2302.08215" in result.text
    assert result.figures[0].stat().st_size < 200_000


def test_a_quick_run_trains_a_language_model_in_four_divergences(result):
    models = result.numbers["models"]
    assert tuple(models) == paper.TRAINED
    for runs in models.values():
        assert list(runs[0]["path"]) == [0, 1, 2]
        assert runs[0]["path"][0]["KL"] == pytest.approx(0, abs=1e-5)
        assert runs[0]["path"][2]["KL"] > 0
        assert all(row["rollout/target_tv"] >= 0 for row in runs[0]["metrics"])
