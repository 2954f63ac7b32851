"""Noise, data, networks and the whole `distil`: EDM's identities, exact scores, and one clear error for bad input."""

import math

import pytest
import torch
from torch import nn

from kullback.diffusion import (
    Denoiser,
    Images,
    Noise,
    Scheduled,
    TeacherHead,
    Unet,
    distil,
    folder,
    load,
    ring,
    sample,
    two_modes,
    unet,
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


def test_a_whole_run_leaves_a_directory_and_goes_on(tmp_path):
    options = {"steps": 12, "batch": 16, "width": 8, "warmup": 2, "save_every": 5, "log_every": 1}
    run = distil("two_modes", "jsd(0.5)", tmp_path / "run", **options)
    assert run.sample(5).shape == (5, 2)
    for name in ("samples.png", "model/student.safetensors", "metrics.jsonl", "recipe.yaml", "objective.txt"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert [row["step"] for row in run.metrics] == list(range(1, 13))
    with pytest.raises(ValueError, match="is already there"):
        distil("two_modes", "jsd(0.5)", tmp_path / "run", **options)


def test_a_teacher_is_trained_for_images(tmp_path):
    images = Images(torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    run = distil(images, "forward_kl", tmp_path / "run", steps=6, teacher_steps=3, batch=8, width=8, warmup=0)
    assert run.sample(3).shape == (3, 1, 4, 4)
    assert not any(p.requires_grad for p in run.teacher.parameters())


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
    teacher = Denoiser(Unet(unet(**SMALL, time_embedding_type=embedding)), 0.5).requires_grad_(False)
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
