"""Card 06: the statements about weights, ratios and fixed points that the whole step does not show."""

import math

import pytest
import torch
from torch import nn

from kullback.diffusion import Denoiser, FDistill, Mlp, Noise, RatioWeights, matching_loss, two_modes
from kullback.diffusion.exact import estimated_gradient, weight_variance
from kullback.divergence import divergence

NOISE = Noise(0.2, 4.0, draw="log_uniform")


def test_reverse_kl_is_dmd2_to_one_in_a_million():
    """In float64 stage 2's 1 / (1 + 1e-6) is all that is left between the two gradients."""
    g = torch.Generator().manual_seed(0)
    x, teacher, fake = torch.randn(3, 6, 2, generator=g, dtype=torch.float64)
    sigma = torch.linspace(0.3, 3, 6, dtype=torch.float64)
    x.requires_grad_()
    h, _ = RatioWeights(divergence("reverse_kl"), NOISE)(torch.randn(6, generator=g, dtype=torch.float64), sigma)
    assert h.shape == (6,)
    (ours,) = torch.autograd.grad(matching_loss(x, teacher, fake, h, sigma, "dmd").sum(), x)
    scale = (x - teacher).detach().abs().mean(1, keepdim=True) + 1e-6
    dmd2 = (fake - teacher) / scale / 2
    torch.testing.assert_close(ours, dmd2, rtol=1.1e-6, atol=0)
    assert float((ours / dmd2 - 1).abs().max()) > 0.5e-6


@pytest.mark.parametrize("variance", [0.3, 1.0, 4.0])
def test_forward_kl_rests_only_where_the_moments_match(variance):
    """Its gradient is that of -E_p log q, which depends on the teacher's mean and variance alone, at every level."""
    mean, deviation = 1.0, 0.8
    for a in (-1.3, -0.8, 0.0, 0.4, 0.8, 1.7):
        for b in (-0.5, 1.0, 1.8):
            total = a**2 + variance
            # D = const + log(total) / 2 + (deviation^2 + variance + (mean - b)^2) / (2 total)
            into_a = a / total - a * (deviation**2 + variance + (mean - b) ** 2) / total**2
            into_b = (b - mean) / total
            found = estimated_gradient("forward_kl", a, b, (mean, deviation), variance, nodes=160)
            assert found == pytest.approx((into_a, into_b), abs=2e-6, rel=2e-6)
    at_rest = [estimated_gradient("forward_kl", a, mean, (mean, deviation), variance) for a in (0.8, -0.8, 0.0)]
    assert at_rest == [pytest.approx((0, 0), abs=1e-9)] * 3
    leaves = estimated_gradient("forward_kl", 0.05, mean, (mean, deviation), variance)[0]
    assert leaves < 0  # descent goes on to larger a: 0 is unstable


@pytest.mark.parametrize("apart", [0.3, 1.0, 1.5])
def test_variance_of_the_weights_at_any_distance(apart):
    """exp(d^2) - 1, a quarter of it for Jeffreys, exp(d^2 / 4) - 1; JS before normalising never exceeds 1/4."""
    d = apart**2
    assert weight_variance("forward_kl", apart) == pytest.approx(math.expm1(d), rel=1e-6)
    assert weight_variance("jeffreys", apart) == pytest.approx(math.expm1(d) / 4, rel=1e-6)
    assert weight_variance("squared_hellinger", apart) == pytest.approx(math.expm1(d / 4), rel=1e-6)
    assert weight_variance("reverse_kl", apart) == pytest.approx(0, abs=1e-12)
    x = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    log_model, log_target = -(x**2) / 2, -((x - 4 * apart) ** 2) / 2
    share = log_model.softmax(0)
    h = divergence("2*jsd(0.5)").curvature(log_target - log_model)
    assert float((share * h**2).sum() - (share * h).sum() ** 2) < 0.25
    assert h.max() <= 1 + 1e-12  # rounding


@pytest.mark.parametrize(
    ("name", "factor"),
    [("reverse_kl", 0), ("2*skew(reverse_kl, 0.5)", 0.5), ("2*jsd(0.5)", 0.5), ("squared_hellinger", 0.5),
     ("jeffreys", 0.5), ("forward_kl", 1), ("neyman_chi2", 1)],
)  # fmt: skip
def test_near_equality_the_weights_spread_as_the_ratio_does(name, factor):
    """std of normalised h = std(r) times 0, 1/2 or 1, to first order."""
    r = 1 + 1e-3 * torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = RatioWeights(divergence(name), NOISE, clip=None, stage1=False)
    h, _ = plain(r.log(), torch.ones(len(r)))
    assert float(h.std()) == pytest.approx(factor * float(r.std()), rel=5e-3, abs=1e-9)


def test_a_bin_of_one_sample_without_memory_says_nothing():
    """Pitfall 3: with EMA 0 the normalised ratio is 1 whatever the logit was; with memory it is not."""
    sigma = torch.tensor([0.3, 3.0])
    for ema, same in ((0.0, True), (0.9, False)):
        for logit in (-2.0, 0.5, 2.0):
            weights = RatioWeights(divergence("forward_kl"), NOISE, bins=2, ema=ema, stage2=False)
            _, held = weights(torch.tensor([logit, -logit]), sigma)
            assert (float(held.abs().max()) < 1e-4) == same, (ema, logit)


@pytest.mark.parametrize("kind", ["noised", "clean"])
def test_r1_compares_the_logit_of_a_noised_sample_with_that_of_a_nudged_one(kind):
    """Nudged where it was noised, or, as released, where it was not."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(2, 3, generator=torch.Generator().manual_seed(0)))

        def forward(self, x, sigma):
            return x @ self.matrix + sigma[:, None]

    data, ratio = two_modes(), Heads()
    made = FDistill(nn.Identity(), data, Denoiser(Mlp((2,), 8), 2.0), ratio, data,
                    RatioWeights(divergence("jeffreys"), NOISE), NOISE, batch=16, r1=2.5, r1_kind=kind)  # fmt: skip
    batch = made.draw(0)
    term = made.terms(batch, 0)[2]
    assert (term.name, term.coefficient) == ("r1", 2.5)
    noised = batch["real"] + batch["real_sigma"][:, None] * batch["real_noise"]
    nudged = (noised if kind == "noised" else batch["real"]) + batch["nudge"]
    expected = ((noised - nudged) @ ratio.matrix).square().mean(1)  # the level is the same on both sides
    torch.testing.assert_close(term.value, expected, rtol=1e-4, atol=1e-5)


def test_a_sample_s_log_ratio_is_the_mean_over_heads():
    class Split(nn.Module):
        def forward(self, x, sigma):
            return torch.stack([x[:, 0] + 1.0, x[:, 0] - 1.0, x[:, 0] + 0.3], 1)

    data = two_modes()
    made = FDistill(nn.Identity(), data, Denoiser(Mlp((2,), 8), 2.0), Split(), data,
                    RatioWeights(divergence("jeffreys"), NOISE, stage1=False), NOISE, batch=16)  # fmt: skip
    batch = made.draw(4)
    shown = made.student_terms(batch)[0].seen["log_ratio"]
    noised = batch["latent"] + batch["sigma"][:, None] * batch["noise"]
    expected = (noised[:, 0] + 0.1).clamp(math.log(0.1), math.log(20)).mean()
    assert float(shown) == pytest.approx(float(expected), abs=1e-5)
