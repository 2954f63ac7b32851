"""Noise, data, networks and measures: EDM's identities, exact scores, and one clear error for bad input."""

import math
import re
import sys

import pytest
import torch
from torch import nn

from kullback.diffusion import (
    Affine,
    Denoiser,
    Noise,
    Scheduled,
    TeacherHead,
    Unet,
    coverage,
    distil,
    energy_distance,
    folder,
    from_diffusers,
    load,
    modes,
    new_denoiser,
    pretrained,
    ring,
    sample,
    two_modes,
)


class Remember(nn.Module):
    def forward(self, x, sigma):
        self.seen = x
        return torch.zeros_like(x)


@pytest.mark.parametrize("sigma", [0.01, 0.5, 3.0, 80.0])
def test_preconditioning_keeps_unit_variance(sigma):
    """Input and target of the network have variance 1 at every level: EDM's derivation of its coefficients."""
    g = torch.Generator().manual_seed(0)
    data = 0.7 * torch.randn(200_000, 1, generator=g, dtype=torch.float64)
    noised = data + sigma * torch.randn(data.shape, generator=g, dtype=torch.float64)
    network = Remember()
    skip = Denoiser(network, 0.7)(noised, torch.full((len(data),), sigma, dtype=torch.float64))
    assert network.seen.std().item() == pytest.approx(1, abs=0.01)
    c_out = sigma * 0.7 / math.sqrt(sigma**2 + 0.49)
    assert ((data - skip) / c_out).std().item() == pytest.approx(1, abs=0.01)
    weight = Denoiser(network, 0.7).loss_weight(torch.tensor([sigma], dtype=torch.float64))
    assert weight.item() * c_out**2 == pytest.approx(1)


def test_the_edm_grid():
    grid = Noise(0.002, 80.0).grid(18)
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    assert grid.tolist() == pytest.approx(expected)
    drawn = Noise(0.05, 3.0).sample(1000, torch.Generator().manual_seed(0))
    assert 0.05 <= drawn.min() < drawn.max() <= 3.0 + 1e-6


def test_the_score_of_a_mixture_is_the_gradient_of_its_log_density():
    mixture = two_modes().double()
    x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    sigma = torch.linspace(0.1, 3, 50, dtype=torch.float64)
    (slope,) = torch.autograd.grad(mixture.log_prob(x, sigma).sum(), x)
    torch.testing.assert_close(mixture.score(x, sigma), slope)
    torch.testing.assert_close(mixture(x, sigma), x + sigma[:, None] ** 2 * slope)


def test_the_sampler_reaches_the_mixture():
    drawn = sample(ring(), 2000, (2,), Noise(0.02, 20.0), steps=18)
    distance, which = torch.cdist(drawn, ring().means).min(1)
    assert (distance < 3.5 * 0.25).float().mean() > 0.98
    assert torch.bincount(which, minlength=8).min() > 170  # 250 expected, standard deviation 15


def test_images_of_mixed_sizes_are_one_error(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, size in (("a.png", (8, 8)), ("b.png", (8, 8)), ("c.png", (8, 9))):
        image.new("L", size).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"2 of 3 are 8x8 and c\.png is 8x9; resize or crop"):
        distil(tmp_path, "forward_kl", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "c.png").unlink()
    found = folder(tmp_path)
    assert found.shape == (1, 8, 8)
    assert found.images.unique().tolist() == [-1.0]
    (tmp_path / "d.png").write_text("no image")
    with pytest.raises(ValueError, match=r"d\.png is not an image"):
        folder(tmp_path)


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="neither one of two_modes, ring, digits nor a folder"):
        load("digitz")
    with pytest.raises(ValueError, match="no images there"):
        load(tmp_path)


def test_digits_are_images():
    pytest.importorskip("sklearn")
    found = load("digits")
    assert (len(found.images), found.shape) == (1797, (1, 8, 8))
    assert (found.images.min(), found.images.max()) == (-1, 1)


SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
}


@pytest.mark.parametrize("embedding", ["positional", "fourier"])
def test_a_unet_of_diffusers_is_a_network_and_its_middle_feeds_a_discriminator(embedding):
    pytest.importorskip("diffusers")
    teacher = Denoiser(Unet(from_diffusers("UNet2DModel")(**SMALL, time_embedding_type=embedding)), 0.5).requires_grad_(
        False
    )
    x, sigma = torch.randn(3, 1, 8, 8, requires_grad=True), torch.tensor([0.1, 1.0, 10.0])
    assert teacher(x, sigma).isfinite().all()
    head = TeacherHead(teacher, "network.unet.mid_block", x, sigma)
    logits = head(x, sigma)
    assert logits.shape == (3, 16)  # one for each place of the 4 x 4 map
    assert not any("unet" in name for name, _ in head.named_parameters())
    (grad,) = torch.autograd.grad(logits.sum(), x)
    assert grad.abs().sum() > 0  # the GAN term reaches the sample through the frozen features
    with pytest.raises(ValueError, match="no such submodule"):
        TeacherHead(teacher, "mid", x, sigma)


@pytest.mark.parametrize("predicts", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_a_network_of_a_scheduler_denoises_alike(predicts, name):
    """A network that knows x0 and answers as the scheduler's prediction type asks gives x0 back."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(prediction_type=predicts)
    truth = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([10, 200, 500, 900])

    class Oracle(nn.Module):
        def forward(self, noised, timestep):
            assert timestep.tolist() == steps.tolist()
            bar = scheduler.alphas_cumprod[timestep].reshape(-1, 1, 1, 1)
            eps = (noised - bar.sqrt() * truth) / (1 - bar).sqrt()
            return {"epsilon": eps, "sample": truth, "v_prediction": bar.sqrt() * eps - (1 - bar).sqrt() * truth}[
                predicts
            ]

    teacher = Scheduled(Oracle(), scheduler)
    sigma = teacher.sigmas[steps]
    x = truth + sigma.reshape(-1, 1, 1, 1) * torch.randn(truth.shape)
    torch.testing.assert_close(teacher(x, sigma), truth, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("predicts", ["epsilon", "sample", "v_prediction"])
def test_the_loss_of_a_scheduled_network_is_that_of_its_own_answer(predicts):
    """weight * error of x0 = error of the answer, for two answers that differ."""
    diffusers = pytest.importorskip("diffusers")

    class Says(nn.Module):
        def forward(self, noised, timestep):
            return self.answer

    teacher = Scheduled(Says(), diffusers.DDPMScheduler(prediction_type=predicts))
    sigma = teacher.sigmas[torch.tensor([10, 200, 500, 900])]
    x, *answers = torch.randn(3, 4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    found = []
    for teacher.network.answer in answers:
        found.append(teacher(x, sigma))
    error = (found[0] - found[1]).square().flatten(1).mean(1)
    own = (answers[0] - answers[1]).square().flatten(1).mean(1)
    torch.testing.assert_close(teacher.loss_weight(sigma) * error, own, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_a_pipeline_of_diffusers_is_a_teacher(tmp_path, scheduler):
    """Random weights, saved as diffusers saves them; both classes are read from their own settings."""
    pytest.importorskip("diffusers")
    network = from_diffusers("UNet2DModel")(**SMALL)
    network.save_pretrained(tmp_path / "unet")
    from_diffusers(scheduler, "scheduler")(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
    teacher = pretrained(str(tmp_path))
    assert teacher.predicts == "v_prediction"
    x, sigma = torch.randn(2, 1, 8, 8), teacher.sigmas[torch.tensor([100, 700])]
    alpha = (1 + sigma**2).rsqrt().reshape(-1, 1, 1, 1)
    v = network(alpha * x, torch.tensor([100, 700])).sample
    expected = alpha * (alpha * x) - (1 - alpha**2).sqrt() * v  # VP: x0 = alpha x_t - s v
    torch.testing.assert_close(teacher(x, sigma), expected, rtol=1e-4, atol=1e-5)


def test_a_new_network_and_scheduler_by_name():
    pytest.importorskip("diffusers")
    denoiser = new_denoiser("UNet2DModel", None, (1, 8, 8), 0.5, 32)
    assert isinstance(denoiser, Denoiser)
    assert denoiser.network.unet.config.block_out_channels == [8, 16]
    scheduled = new_denoiser({**SMALL, "name": "UNet2DModel"}, "DDIMScheduler", (1, 8, 8), 0.5, 32)
    assert isinstance(scheduled, Scheduled)
    assert scheduled.predicts == "epsilon"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("UNet2DModl", None, (1, 8, 8)), "network='UNet2DModl': diffusers has no network .* did you mean UNet2DModel"),
        (("UNet2DModel", "DDPMSchedular", (1, 8, 8)), "scheduler='DDPMSchedular': .* did you mean DDPMScheduler"),
        (("UNet2DModel", "FlowMatchEulerDiscreteScheduler", (1, 8, 8)), "has no alphas_cumprod; use DDPMScheduler"),
        (("UNet2DModel", None, (2,)), "network='UNet2DModel' is for images, but a sample has shape"),
        (("UNet2DModel", None, (1, 7, 9)), "network='UNet2DModel' does not take samples of shape"),
        (({**SMALL, "in_channels": 3}, None, (1, 8, 8)), "network='UNet2DModel' does not take samples of shape"),
        (("mlp", "DDPMScheduler", (2,)), "scheduler='DDPMScheduler' needs a network of diffusers"),
    ],
)
def test_networks_that_cannot_be(arguments, said):
    pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match=said):
        new_denoiser(*arguments, 0.5, 32)


@pytest.mark.parametrize(
    ("module", "asks"),
    [
        ("sklearn.datasets", lambda: load("digits")),
        ("diffusers", lambda: new_denoiser("UNet2DModel", None, (1, 8, 8), 0.5, 32)),
        ("diffusers", lambda: pretrained("somewhere")),
    ],
)
def test_a_missing_extra_is_named_with_how_to_install_it(monkeypatch, module, asks):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape('pip install "kullback[diffusion]"')):
        asks()


def test_an_affine_student():
    student = Affine((2, 3), 2.0, offset=torch.arange(6.0).reshape(2, 3))
    z = torch.randn(5, 2, 3)
    torch.testing.assert_close(student(z), 2 * z + torch.arange(6.0).reshape(2, 3))


# Measures


def test_modes_that_are_covered():
    at = two_modes().means
    samples = torch.cat([at[:1].repeat(95, 1), at[1:].repeat(4, 1), torch.tensor([[0.0, 9.0]])])
    assert modes(samples, two_modes()) == (2, pytest.approx(0.99))
    fewer = torch.cat([samples[:97], at[:1].repeat(3, 1)])  # 2 % of the samples at the mode of 30 %
    assert modes(fewer, two_modes())[0] == 1


def test_the_energy_distance_is_scipys():
    """scipy's is the root, and counts each sample's distance to itself."""
    stats = pytest.importorskip("scipy.stats")
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 1, generator=g), 0.5 + 2 * torch.randn(80, 1, generator=g)
    within = [torch.cdist(part, part).sum().item() / len(part) ** 2 for part in (x, y)]
    biased = energy_distance(x, y) + sum(w / (len(part) - 1) for w, part in zip(within, (x, y), strict=True))
    assert biased == pytest.approx(stats.energy_distance(x[:, 0], y[:, 0]) ** 2, rel=1e-5)
    assert abs(energy_distance(*torch.randn(2, 1000, 3, generator=g))) < 0.01


def test_coverage_by_counting():
    data = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    near = torch.tensor([[0.0], [1.0], [2.0], [10.0]]) + 0.1
    assert coverage(data, near, neighbours=1) == 1.0
    assert coverage(data, torch.tensor([[0.9]]), neighbours=1) == 0.5  # reach 1, 1, 1 and 8: 0 and 1; 2 is 1.1 away
    assert coverage(data, torch.tensor([[0.9]]), neighbours=2) == 0.75  # reach 2, 1, 2 and 9
    with pytest.raises(ValueError, match="no 5-th neighbour"):
        coverage(data, near)
