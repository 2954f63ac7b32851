"""Card 01: the exact experiments at full size with the card's claims, the trained ones for a few steps."""

import pytest
import torch

from kullback.divergence import divergence
from kullback.papers import p01_f_dpo as paper
from kullback.theory import tabular


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return paper.reproduce(quick=True, docs=tmp_path_factory.mktemp("docs"))


@pytest.mark.parametrize("seed", range(5))
def test_each_divergence_is_smallest_for_its_own_optimum(seed):
    """Check 5."""
    assert paper.on_the_diagonal(paper.at_one_reward(seed))


def test_no_order_holds_at_every_coefficient():
    """Experiment B1 of the card: rewards and forward against reverse KL in all draws, the entropies of alpha mostly."""
    exact = paper.at_one_coefficient(30)
    small, one = paper.COEFFICIENTS.index(0.03), paper.COEFFICIENTS.index(1.0)
    reward, entropy = ({name: exact[name][key] for name in paper.NAMES} for key in ("reward", "entropy"))
    assert (reward["forward_kl"] < reward["reverse_kl"])[small].all()
    assert (reward["alpha(0.5)"] > reward["alpha(0.7)"])[small].all()
    assert (reward["alpha(0.7)"] > reward["forward_kl"])[small].all()
    in_order = (entropy["alpha(0.5)"] < entropy["alpha(0.7)"]) & (entropy["alpha(0.7)"] < entropy["forward_kl"])
    assert int(in_order[small].sum()) >= 25
    means = [float(entropy[name][small].mean()) for name in ("alpha(0.5)", "alpha(0.7)", "forward_kl")]
    assert means == sorted(means)
    assert (reward["forward_kl"] > reward["reverse_kl"])[one].all()
    assert (entropy["forward_kl"] < entropy["reverse_kl"])[one].all()
    assert float(reward["reverse_kl"][one].mean()) == pytest.approx(0.94, abs=0.2)  # the card has other draws
    assert float(reward["forward_kl"][one].mean()) == pytest.approx(1.33, abs=0.2)


def test_the_penalties_of_the_paper_s_ppo():
    """Check 9: minus the link has the gradient; the two official forms do not, but for the cases the card names."""
    found = {name: paper.ppo_penalty(name, 100) for name in paper.FEW}
    for cosines in found.values():
        torch.testing.assert_close(cosines["link"], torch.ones_like(cosines["link"]))
    torch.testing.assert_close(found["reverse_kl"]["reward"], torch.ones(100, dtype=torch.float64))
    assert float((found["forward_kl"]["reward"] < 0).double().mean()) > 0.95
    assert all(0.1 < float(found[name]["reward"].lt(0).double().mean()) < 1 for name in ("2*jsd(0.5)", "alpha(0.5)"))


def test_the_loss_form_of_reverse_kl_is_forward_kl():
    """E over samples of the policy of grad [-log rho + rho - 1], rho = reference / policy, by enumeration."""
    reference, logits = tabular.random_policy(7, seed=1), tabular.random_policy(7, seed=2).requires_grad_()
    policy = logits.log_softmax(-1)
    log_rho = reference - policy
    (loss_form,) = torch.autograd.grad((policy.detach().exp() * (-log_rho + log_rho.exp() - 1)).sum(), logits)
    forward = tabular.gradient(lambda p: divergence("forward_kl").from_log_probs(reference, p), logits.detach())
    torch.testing.assert_close(loss_form, forward)
    u = log_rho.detach().exp()
    ours = tabular.score_gradient(policy.detach(), u * divergence("reverse_kl").slope(log_rho.detach()))
    torch.testing.assert_close(-ours, loss_form)


def test_counted_pairs_are_all_pairs():
    counts = paper._count_pairs(torch.tensor([0.0, 3.0, 0.0]), 9000, torch.Generator().manual_seed(0))
    assert int(counts.sum()) == 9000
    share = float(counts[1, 0] / (counts[1, 0] + counts[0, 1]))
    assert share == pytest.approx(1 / (1 + 2.718281828**-3), abs=0.02)


def test_quick_run_writes_page_and_figure(result):
    assert result.page.name == "01-f-dpo.md"
    assert result.page.read_text() == result.text
    assert "kullback reproduce 01 --quick" in result.text
    assert sum(direction.asserted for direction in result.directions) == 5
    assert len(result.directions) == 10
    for runs in result.numbers["models"].values():
        for run in runs:
            assert 0 <= run["ECE"] <= 1
            assert run["KL"] > 0
    assert result.numbers["models"]["reverse_kl"][0]["before KL"] == pytest.approx(0, abs=1e-5)
    assert result.figures[0].stat().st_size < 200_000
