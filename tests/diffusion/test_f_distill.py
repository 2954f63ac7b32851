"""f-distill: weights, gradient and normalisation against autograd, quadrature and the paper's table."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kullback.diffusion import (
    Denoiser,
    Discriminator,
    FDistill,
    Mlp,
    Noise,
    OneStep,
    RatioWeights,
    matching_loss,
    two_modes,
)
from kullback.diffusion.exact import estimated_gradient, numeric_gradient, weight_variance
from kullback.divergence import FDivergence, divergence
from kullback.run.learner import fit
from tests.divergence.table import GENERATORS

NOISE = Noise(0.2, 4.0, draw="log_uniform")
PAPER_H = {  # the paper's Table 1: h(r) = r^2 f''(r)
    "reverse_kl": lambda r: torch.ones_like(r),
    "2*skew(reverse_kl, 0.5)": lambda r: 1 / (1 + r),
    "2*jsd(0.5)": lambda r: r / (1 + r),
    "squared_hellinger": lambda r: r.sqrt() / 4,
    "forward_kl": lambda r: r,
    "jeffreys": lambda r: 1 + r,
    "neyman_chi2": lambda r: 2 / r,
}
CARD = {  # (d/da, d/db) at teacher N(1, 0.8^2), student 0.9 z + 0.4, noise variance 0.5
    "reverse_kl": (0.102451, -0.526316),
    "2*skew(reverse_kl, 0.5)": (0.113316, -0.299371),
    "2*jsd(0.5)": (-0.010866, -0.226945),
    "squared_hellinger": (-0.003036, -0.117890),
    "forward_kl": (-0.099645, -0.458015),
    "jeffreys": (0.002806, -0.984331),
    "neyman_chi2": (1.362451, -1.813319),
}
SMOOTH = [name for name in GENERATORS if name != "tv" and not name.startswith("own")]


def second_derivative(f, u):
    u = u.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(u).sum(), u, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), u)
    return second


@pytest.mark.parametrize("name", SMOOTH)
@given(log_ratio=st.lists(st.floats(-8, 8), min_size=1, max_size=8))
@settings(max_examples=20, deadline=None)
def test_the_weight_is_r_squared_times_the_second_derivative(name, log_ratio):
    x = torch.tensor(log_ratio, dtype=torch.float64)
    h, _ = RatioWeights(divergence(name), NOISE, clip=None, stage1=False, stage2=False)(x, torch.ones(len(x)))
    torch.testing.assert_close(h, x.exp() ** 2 * second_derivative(GENERATORS[name], x.exp()), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", PAPER_H)
def test_the_weights_of_the_papers_table(name):
    x = torch.linspace(-6, 6, 25, dtype=torch.float64)
    torch.testing.assert_close(divergence(name).curvature(x), PAPER_H[name](x.exp()))


@pytest.mark.parametrize("name", CARD)
def test_the_exact_gradient_of_the_card_and_finite_differences(name):
    case = (name, 0.9, 0.4, (1.0, 0.8), 0.5)
    found = estimated_gradient(*case)
    assert found == pytest.approx(CARD[name], abs=1.5e-6)
    assert found == pytest.approx(numeric_gradient(*case), abs=1e-6)


# The whole student step, with exact networks put in


class ExactScore(nn.Module):
    """The student's noised marginal N(b, a^2 I) as a denoiser."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, x, sigma):
        return x - sigma[:, None] ** 2 * (x - self.b) / (self.a**2 + sigma[:, None] ** 2)


class ExactRatio(nn.Module):
    def __init__(self, target, model):
        super().__init__()
        self.target, self.model = target, model

    def forward(self, x, sigma):
        variance = self.model.a**2 + sigma**2
        log_model = -((x - self.model.b) ** 2).sum(1) / (2 * variance) - torch.log(2 * torch.pi * variance)
        return (self.target.log_prob(x, sigma) - log_model)[:, None]


class Shift(nn.Module):
    def __init__(self, a=1.0, b=-1.0):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor([b, 0.0]))

    def forward(self, latent):
        return self.a * latent + self.b


def learner(name="forward_kl", *, batch=64, **options):
    torch.manual_seed(0)
    data = two_modes()
    weights = options.pop("weights", None) or RatioWeights(divergence(name), NOISE)
    fake = options.pop("fake", None) or Denoiser(Mlp((2,), 16), 2.0)
    ratio = options.pop("ratio", None) or Discriminator(Mlp((2,), 16, out=1), 2.0)
    student = options.pop("student", None) or Shift()
    return FDistill(student, options.pop("teacher", data), fake, ratio, data, weights, NOISE, batch=batch, **options)


def student_gradient(made, step=4):
    made.student.zero_grad()
    assert made.moves(step) == ("student",)
    terms = made.terms(made.draw(step), step)
    sum(term.coefficient * term.value.mean() for term in terms).backward()
    return torch.cat([p.grad.flatten() for p in made.student.parameters()])


def test_the_student_step_is_the_weighted_score_difference():
    """The learner's own step on a batch, against the theorem written out."""
    fake = ExactScore(1.0, [-1.0, 0.0])
    target = two_modes()
    plain = RatioWeights(divergence("2*jsd(0.5)"), NOISE, clip=None, stage1=False, stage2=False)
    made = learner(fake=fake, ratio=ExactRatio(target, fake), weights=plain, gan=0.0)
    found = student_gradient(made)

    batch = made.draw(4)
    z, sigma = batch["latent"], batch["sigma"]
    x = z + torch.tensor([-1.0, 0.0])
    noised = x + sigma[:, None] * batch["noise"]
    r = made.ratio(noised, sigma)[:, 0].exp().detach()
    model_score = -(noised - torch.tensor([-1.0, 0.0])) / (1 + sigma[:, None] ** 2)
    pull = -(r / (1 + r))[:, None] * (target.score(noised, sigma) - model_score) / 2  # over the size of a sample
    torch.testing.assert_close(found[0], (pull * z).sum(1).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1:], pull.mean(0), rtol=1e-4, atol=1e-6)


def test_reverse_kl_is_dmd2():
    """h = 1: the DMD loss written out, to the 1e-6 that stage 2 adds to its denominator."""
    made = learner("reverse_kl", normaliser="dmd", gan=0.0)
    found = student_gradient(made)
    batch = made.draw(4)
    made.student.zero_grad()
    x = made.student(batch["latent"])
    noised = (x + batch["sigma"][:, None] * batch["noise"]).detach()
    teacher, fake = (net(noised, batch["sigma"]).detach() for net in (made.teacher, made.fake))
    scale = (x - teacher).detach().abs().mean(1, keepdim=True) + 1e-6
    (x * (fake - teacher) / scale / x.numel()).sum().backward()
    torch.testing.assert_close(
        found, torch.cat([p.grad.flatten() for p in made.student.parameters()]), rtol=1e-5, atol=1e-7
    )


def test_real_samples_get_the_high_logits_and_the_student_wants_them():
    """Both of the discriminator's terms and the student's are cross-entropies with the label real = 1."""
    entropy = nn.functional.binary_cross_entropy_with_logits
    made = learner(gan=0.1)
    batch = made.draw(0)
    with torch.no_grad():
        x = made.student(batch["latent"])
        fake = made.ratio(x + batch["sigma"][:, None] * batch["noise"], batch["sigma"])
        noised_real = batch["real"] + batch["real_sigma"][:, None] * batch["real_noise"]
        real = made.ratio(noised_real, batch["real_sigma"])
        _, told = made.score_terms(batch)
        _, wanted = made.student_terms(batch)
    parts = entropy(fake, torch.zeros_like(fake)) + entropy(real, torch.ones_like(real))
    torch.testing.assert_close(told.value.mean(), parts)
    torch.testing.assert_close(wanted.value.mean(), entropy(fake, torch.ones_like(fake)))
    assert wanted.coefficient == 0.1


def test_the_models_score_is_learned_from_the_students_samples():
    """The denoising error against G(z), not against data, on EDM's weight; the student takes no gradient from it."""
    made = learner()
    batch = made.draw(0)
    denoise, _ = made.score_terms(batch)
    x, sigma = made.student(batch["latent"]).detach(), batch["sigma"]
    answer = made.fake(x + sigma[:, None] * batch["noise"], sigma)
    expected = (1 / sigma**2 + 1 / 2.0**2) * (answer - x).square().mean(1)
    torch.testing.assert_close(denoise.value, expected)
    denoise.value.mean().backward()
    assert made.student.a.grad is None


def test_weights_carry_no_gradient():
    log_ratio = torch.linspace(-2, 2, 8, requires_grad=True)
    weights = RatioWeights(divergence("jeffreys"), NOISE)
    h, held = weights(log_ratio, torch.ones(8))
    assert not h.requires_grad
    assert not held.requires_grad
    assert not weights.means.requires_grad


def test_no_gradient_reaches_teacher_fake_or_ratio_in_the_student_step():
    teacher = Denoiser(Mlp((2,), 16), 2.0)
    made = learner(teacher=teacher, gan=0.1)
    before = {name: [p.clone() for p in player.module.parameters()] for name, player in made.players().items()}
    for name, player in made.players().items():
        player.module.requires_grad_(name == "student")
    assert student_gradient(made).abs().sum() > 0
    assert all(p.grad is None for net in (teacher, made.fake, made.ratio) for p in net.parameters())
    fit(made, 5)  # step 4 is the student's first
    teacher_after = [p.clone() for p in teacher.parameters()]
    assert all(p.grad is None for p in teacher_after)
    moved = {
        n: any(not torch.equal(a, b) for a, b in zip(before[n], p.module.parameters(), strict=True))
        for n, p in made.players().items()
        if before[n]
    }
    assert moved == {"student": True, "fake": True, "ratio": True}


def test_each_step_moves_only_who_moves():
    made = learner(gan=0.1)
    start = [p.clone() for p in made.student.parameters()]
    fit(made, 4)
    assert all(torch.equal(a, b) for a, b in zip(start, made.student.parameters(), strict=True))
    kept = [p.clone() for p in [*made.fake.parameters(), *made.ratio.parameters()]]
    made.moves = lambda step: ("student",)
    made.draw(0)
    fit(made, 1)
    after = [*made.fake.parameters(), *made.ratio.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(kept, after, strict=True))
    assert not torch.equal(start[0], made.student.a)


def test_no_gradient_where_both_scores_agree():
    fake = Denoiser(Mlp((2,), 16), 2.0)
    assert student_gradient(learner(teacher=lambda x, s: fake(x, s), fake=fake, gan=0.0)).abs().max() == 0


def test_the_teacher_may_not_be_the_fake():
    fake = Denoiser(Mlp((2,), 16), 2.0)
    with pytest.raises(ValueError, match="copy"):
        learner(teacher=fake, fake=fake)


# Normalisation


@given(scale=st.floats(0.01, 100), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_scale_of_f_does_not_matter_after_stage_two(scale, seed):
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sigma = torch.linspace(0.2, 4, 64)
    one, many = (RatioWeights(D, NOISE)(x, sigma)[0] for D in (divergence("jeffreys"), scale * divergence("jeffreys")))
    torch.testing.assert_close(one, many, rtol=2e-4, atol=0)  # 1e-6 over the smallest mean
    assert one.mean().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("add", [-3.0, 0.7])
def test_adding_a_multiple_of_r_minus_one_changes_nothing(add):
    x = torch.linspace(-3, 3, 30, dtype=torch.float64)
    plain = FDivergence.from_generator(lambda u: u * u.log())
    tilted = FDivergence.from_generator(lambda u: u * u.log() + add * (u - 1))
    torch.testing.assert_close(plain.curvature(x), tilted.curvature(x))


def test_stage_one_leaves_an_exact_ratio_alone():
    """E_model[r] = 1 at every level: with many samples of the model and the exact ratio, the means stay near one."""
    g = torch.Generator().manual_seed(0)
    sigma = NOISE.sample(200_000, g).double()
    x = -0.5 + (1.5**2 + sigma**2).sqrt() * torch.randn(len(sigma), generator=g, dtype=torch.float64)
    deviation = (1 + sigma**2).sqrt()
    log_ratio = torch.distributions.Normal(torch.zeros_like(x), deviation).log_prob(x)
    log_ratio -= torch.distributions.Normal(torch.full_like(x, -0.5), (1.5**2 + sigma**2).sqrt()).log_prob(x)
    weights = RatioWeights(divergence("forward_kl"), NOISE, clip=None, ema=0.0)
    _, after = weights(log_ratio, sigma)
    assert weights.means.tolist() == pytest.approx([1.0] * 10, abs=0.02)
    torch.testing.assert_close(after, log_ratio.clamp(-10, 10), rtol=0, atol=0.02)  # logits are held there
    clipped = RatioWeights(divergence("forward_kl"), NOISE, clip=(0.5, 1.2), ema=0.0)
    clipped(log_ratio, sigma)
    assert (clipped.means - 1).abs().max() > 0.03  # a clipped ratio does not have mean one


def test_stage_one_divides_by_the_updated_mean_of_its_bin():
    weights = RatioWeights(divergence("forward_kl"), NOISE, bins=2, ema=0.5, stage2=False)
    sigma = torch.tensor([0.3, 0.5, 3.0])  # the middle in log sigma is 0.89
    h, _ = weights(torch.tensor([2.0, 4.0, 0.5]).log(), sigma)
    assert weights.means.tolist() == pytest.approx([0.5 + 0.5 * 3, 0.5 + 0.5 * 0.5])
    assert h.tolist() == pytest.approx([2 / 2, 4 / 2, 0.5 / 0.75], rel=1e-5)
    weights(torch.tensor([1.0]).log(), torch.tensor([3.0]))
    assert weights.means[0].item() == pytest.approx(2.0)  # an empty bin keeps its mean


def test_bins_in_sigma_share_one_bin_on_the_edm_grid():
    """The card's 64 %: why bins are even in log sigma here."""
    edm = Noise(0.002, 80.0)
    sigma = edm.grid(100_000)
    assert (edm.bins(sigma, 10, "sigma") == 0).double().mean().item() == pytest.approx(0.64, abs=0.01)
    assert (edm.bins(sigma, 10) == 0).double().mean().item() < 0.2


@pytest.mark.parametrize(
    ("name", "variance"),
    [("forward_kl", math.e - 1), ("jeffreys", (math.e - 1) / 4), ("squared_hellinger", math.exp(0.25) - 1)],
)
def test_variance_of_normalised_weights_for_shifted_gaussians(name, variance):
    """Two unit Gaussians one apart: by quadrature, and for the weights as a run has them, up to sampling."""
    assert weight_variance(name, 1.0) == pytest.approx(variance, rel=1e-6)
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h, _ = RatioWeights(divergence(name), NOISE, clip=None, stage1=False)(x - 0.5, torch.ones(len(x)))
    assert h.var().item() == pytest.approx(variance, rel=0.1)


def test_the_normalisers_differ_by_a_factor_per_sample():
    g = torch.Generator().manual_seed(0)
    x, teacher, fake = torch.randn(3, 5, 2, generator=g, dtype=torch.float64)
    sigma, h = torch.linspace(0.1, 4, 5, dtype=torch.float64), torch.rand(5, generator=g, dtype=torch.float64)
    x.requires_grad_()
    none, level, dmd = (
        torch.autograd.grad(matching_loss(x, teacher, fake, h, sigma, kind, 0.7).sum(), x)[0]
        for kind in ("none", "level", "dmd")
    )
    variance = sigma[:, None] ** 2
    torch.testing.assert_close(none, h[:, None] * (fake - teacher) / variance / 2)
    posterior = (1 / variance + 1 / 0.7**2) ** -0.5  # deviation of x0 given x_t, for Gaussian data
    torch.testing.assert_close(level, none * variance / posterior)
    distance = (x - teacher).abs().mean(1, keepdim=True).detach() + 1e-6
    torch.testing.assert_close(dmd, none * variance / distance)


# Bad input, counts, resuming


def test_a_saturated_ratio_network_is_counted_once():
    class Certain(nn.Module):
        def __init__(self):
            super().__init__()
            self.logit = nn.Parameter(torch.tensor(40.0))

        def forward(self, x, sigma):
            return self.logit.expand(len(x), 1)

    made = learner(ratio=Certain(), gan=0.0, learning_rates=(1e-3, 1e-3, 1e-6))
    fitted = fit(made, 10)
    assert int(made.weights.seen) == int(made.weights.clipped) == 2 * 64
    assert "128 of 128 log-ratios" in made.saturation()
    assert fitted.metrics[4]["divergence/clipped"] == 1
    assert learner().saturation() is None


@pytest.mark.parametrize(
    ("options", "said"),
    [({"normaliser": "dmd2"}, "normaliser"), ({"every": 1}, "every=1"), ({"r1_kind": "x"}, "r1_kind")],
)
def test_settings_that_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        learner(**options)


def test_weights_refuse_what_has_no_curvature_and_say_so_of_nan():
    with pytest.raises(ValueError, match="curvature"):
        RatioWeights(divergence("tv"), NOISE)
    with pytest.raises(ValueError, match="1 of 2 log-ratios are nan"):
        RatioWeights(divergence("jeffreys"), NOISE)(torch.tensor([0.0, math.nan]), torch.ones(2))


@pytest.mark.parametrize("kind", ["noised", "clean"])
def test_r1_joins_the_discriminators_terms(kind):
    made = learner(r1=1.0, r1_kind=kind)
    names = [term.name for term in made.terms(made.draw(0), 0)]
    assert names == ["denoise", "discriminate", "r1"]


def test_one_step_student_calls_the_denoiser_once_at_the_largest_level():
    denoiser = Denoiser(Mlp((2,), 16), 2.0)
    z = torch.randn(5, 2)
    torch.testing.assert_close(OneStep(denoiser, 4.0)(z), denoiser(4 * z, torch.full((5,), 4.0)))


def test_forward_kl_learns_both_modes_and_reverse_kl_one():
    """A short run of the whole loop: widths part within 200 student steps."""
    widths = {}
    for name in ("forward_kl", "reverse_kl"):
        made = learner(
            name,
            batch=256,
            gan=0.0,
            warmup=100,
            learning_rates=(2e-2, 3e-3, 3e-3),
            weights=RatioWeights(divergence(name), NOISE, clip=(0.02, 50.0)),
        )
        fit(made, 1100, log_every=500)
        widths[name] = made.student.a.item()
    assert widths["forward_kl"] > 1.05 * widths["reverse_kl"]
