"""Peers' parameters translated: their own code, where installed, is the oracle."""

import math
import warnings

import pytest
import torch

from kullback.divergence import divergence, peers

BETAS = (0, 0.001, 0.1, 0.5, 0.9, 0.999, 1)


def pair(rows=5, vocab=23):
    generator = torch.Generator().manual_seed(0)
    return [1.5 * torch.randn(rows, vocab, generator=generator) for _ in range(2)]


def gkd_trainer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("trl")
        return pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer


@pytest.mark.parametrize("beta", BETAS)
def test_trl_gkd(beta):
    """Value and gradient, temperature 1 and 2."""
    theirs, D, (t, m) = gkd_trainer().generalized_jsd_loss, peers.trl_gkd(beta), pair()
    for temperature in (1.0, 2.0):
        student = m.clone().requires_grad_()
        loss = theirs(student[None], t[None], beta=beta, temperature=temperature, reduction="sum")
        ours = D.categorical(t, student, temperature=temperature).sum()
        torch.testing.assert_close(ours, loss, rtol=3e-5, atol=1e-6)
        a, b = (torch.autograd.grad(x, student)[0] for x in (ours, loss))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_trl_fused(beta):
    """TRL's tiled loss from hidden states, with bias, scale, soft-cap and temperature: values and all gradients."""
    pytest.importorskip("trl")
    fused = pytest.importorskip("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    generator = torch.Generator().manual_seed(1)
    shapes = {"h": (9, 6), "w": (31, 6), "b": (31,), "th": (9, 8), "tw": (31, 8), "tb": (31,)}
    x = {k: torch.randn(*s, generator=generator).requires_grad_(k in "hwb") for k, s in shapes.items()}
    theirs, _ = fused.apply(x["h"], x["w"], x["b"], x["th"], x["tw"], x["tb"], float(beta), 1.3, 0.8, 3.0, 1.1, 4.0)
    ours = peers.trl_gkd(beta).linear(
        x["th"],
        x["tw"],
        x["h"],
        x["w"],
        target_bias=x["tb"],
        model_bias=x["b"],
        temperature=1.3,
        model_logit_scale=0.8,
        model_softcap=3.0,
        target_logit_scale=1.1,
        target_softcap=4.0,
        chunk=4,
    )
    torch.testing.assert_close(ours, theirs, rtol=5e-5, atol=2e-6)
    wanted = (x["h"], x["w"], x["b"])
    for a, b in zip(torch.autograd.grad(ours.sum(), wanted), torch.autograd.grad(theirs.sum(), wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_liger_jsd(beta):
    pytest.importorskip("liger_kernel")
    theirs = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDFunction
    t, m = pair()
    student = m.clone().requires_grad_()
    loss = theirs.distillation_loss_fn(student, t, beta=beta)
    ours = peers.liger_jsd(beta).categorical(t, student).sum()
    torch.testing.assert_close(ours, loss, rtol=3e-5, atol=1e-6)
    a, b = (torch.autograd.grad(x, student)[0] for x in (ours, loss))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# Scores of a response with z = policy / reference, as the source of each version writes them.
TRL_1_16 = {
    "reverse_kl": lambda log_z, c: log_z,
    "forward_kl": lambda log_z, c: 1 - torch.exp(-log_z),
    "js_divergence": lambda log_z, c: math.log(2) + torch.nn.functional.logsigmoid(log_z),
    "alpha_divergence": lambda log_z, c: (torch.exp((c - 1) * log_z) - 1) / (c - 1),
}
LEGACY = {
    "reverse_kl": lambda log_z, c: log_z,
    "js_divergence": lambda log_z, c: torch.nn.functional.logsigmoid(log_z),
    "alpha_divergence": lambda log_z, c: -torch.exp(-c * log_z) / c,
}
F_DPO = {
    "reverse_kl": lambda log_z, a: log_z,
    "forward_kl": lambda log_z, a: -torch.exp(-log_z),
    "jsd": lambda log_z, a: torch.nn.functional.logsigmoid(log_z),
    "alpha_divergence": lambda log_z, a: -torch.exp(-a * log_z) / a,
}


@pytest.mark.parametrize(
    ("translate", "scores"), [(peers.trl_dpo, TRL_1_16), (peers.trl_dpo_legacy, LEGACY), (peers.f_dpo, F_DPO)]
)
@pytest.mark.parametrize("coefficient", [0.3, 0.5, 0.8])
def test_preference_scores(translate, scores, coefficient):
    """link(log reference - log policy) is the peer's score up to a constant, which cancels in a pair."""
    log_z = torch.linspace(-4, 4, 33, dtype=torch.float64)
    for name, score in scores.items():
        ours, theirs = translate(name, coefficient).link(-log_z), score(log_z, coefficient)
        torch.testing.assert_close(ours - ours[0], theirs - theirs[0], rtol=1e-9, atol=1e-9)


def test_the_installed_trl_still_uses_this_exponent():
    """The translation of `trl_dpo` is for the source that is installed; a change there must be noticed."""
    pytest.importorskip("trl")
    import importlib.util
    from pathlib import Path

    source = Path(importlib.util.find_spec("trl").origin).parent / "trainer" / "dpo_trainer.py"
    text = source.read_text()
    assert "t_chosen = (self.f_alpha_divergence_coef - 1.0) * chosen_logratios" in text
    assert "log 2 + logsigmoid(log t)" in text


def test_the_two_alpha_conventions_agree_at_one_half_only():
    assert peers.trl_dpo("alpha_divergence", 0.5) == peers.trl_dpo_legacy("alpha_divergence", 0.5)
    assert peers.trl_dpo("alpha_divergence", 0.3) == divergence("alpha(0.7)")
    assert peers.trl_dpo_legacy("alpha_divergence", 0.3) == divergence("alpha(0.3)")
    assert peers.trl_dpo("alpha_divergence", 1.0) == divergence("reverse_kl")


def test_distillkit():
    """Its dense losses, written from their definitions in probability space."""
    t, m = (x.double() for x in pair())
    p, q = m.softmax(-1), t.softmax(-1)
    mean = (p + q) / 2
    expected = {
        "kl": (q * (q / p).log()).sum(-1),
        "jsd": 0.5 * (q * (q / mean).log()).sum(-1) + 0.5 * (p * (p / mean).log()).sum(-1),
        "tvd": 0.5 * (p - q).abs().sum(-1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(peers.distillkit(name).categorical(t, m), value)


def test_fastgen():
    """The weights of its code, as functions of r = data / student."""
    r = torch.logspace(-3, 3, 25, dtype=torch.float64)
    weights = {
        "rkl": torch.ones_like(r),
        "kl": r,
        "js": 1 - 1 / (1 + r),
        "jf": 1 + r,
        "sh": r.sqrt(),
        "neyman": 1 / r,
        "sf": 1 / (1 + r),
    }
    for name, weight in weights.items():
        torch.testing.assert_close(peers.fastgen(name).curvature(r.log()), weight)


def test_disco():
    """f' of its code at t = policy / target, up to a constant."""
    log_t = torch.linspace(-3, 3, 24, dtype=torch.float64)
    code = {
        "KLLoss": -torch.exp(-log_t),
        "ReverseKLLoss": log_t + 1,
        "TVLoss": torch.sign(log_t) / 2,
        "JSLoss": math.log(2) - torch.nn.functional.softplus(-log_t),
        "ChiSquaredLoss": 1 - torch.exp(-2 * log_t),
        "ReverseChiSquaredLoss": 2 * (torch.exp(log_t) - 1),
    }
    for name, f_prime in code.items():
        link = peers.disco(name).link(-log_t)
        torch.testing.assert_close(link - link[0], f_prime - f_prime[0], rtol=1e-9, atol=1e-9)


def test_unknown_settings_are_named():
    for call in (
        lambda: peers.trl_gkd(1.5),
        lambda: peers.trl_dpo("chi2"),
        lambda: peers.distillkit("hinge"),
        lambda: peers.fastgen("tv"),
        lambda: peers.disco("chi2"),
    ):
        with pytest.raises(ValueError, match=r"choose one of|must be in \[0, 1\]"):
            call()
