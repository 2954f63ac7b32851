"""`distil`: data in, a one-step generator out, everything in one run directory."""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from kullback.diffusion.data import Data, Mixture, load
from kullback.diffusion.f_distill import FDistill, Normaliser
from kullback.diffusion.networks import Discriminator, Mlp, OneStep, Unet, unet
from kullback.diffusion.noise import Denoiser, Noise
from kullback.diffusion.pictures import side_by_side
from kullback.diffusion.teacher import DenoiserTraining, sample
from kullback.diffusion.weights import RatioWeights
from kullback.divergence import FDivergence, divergence
from kullback.run.directory import RunDirectory
from kullback.run.learner import fit
from kullback.run.seeds import derive, generator


@dataclass(frozen=True)
class Distilled:
    """A finished distillation."""

    directory: Path
    student: nn.Module
    teacher: nn.Module
    shape: tuple[int, ...]
    metrics: list[dict[str, Any]]

    @torch.no_grad()
    def sample(self, count: int, seed: int = 0) -> Float[Tensor, "row *shape"]:
        """One call of the network for each sample."""
        return self.student(torch.randn(count, *self.shape, generator=generator(seed, "student samples")))


def distil(
    data: str | Path | Data,
    divergence_: str | FDivergence,
    output: str | Path,
    *,
    steps: int = 6000,
    teacher: nn.Module | None = None,
    teacher_steps: int = 4000,
    network: Mapping[str, Any] | str = "mlp",
    width: int = 128,
    batch: int = 256,
    normaliser: Normaliser = "none",
    gan: float = 1e-3,
    clip: tuple[float, float] = (0.1, 20.0),
    noise: Noise | None = None,
    every: int = 5,
    warmup: int = 200,
    learning_rates: tuple[float, float, float] | None = None,
    ema: float = 0.99,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    save_every: int = 1000,
    log_every: int = 20,
) -> Distilled:
    """Distil a diffusion teacher into a one-step student by f-distill.

    Args:
        data: "two_modes", "ring", "digits", a folder of images of one size, or your own `Data`.
        divergence_: a name `kullback.divergence` parses, or a divergence.
        output: the run directory: metrics, checkpoints, `model/student.safetensors` and `samples.png`.
        steps: of the student's loop; the student moves in every `every`-th.
        teacher: (x_t, sigma) -> E[x0 | x_t], see `pretrained`. By default one is trained for `teacher_steps`, and a
            mixture, whose score is known, is its own.
        network: "mlp", or the settings of a new diffusers UNet2DModel, for teacher, student and fake score.
        learning_rates: (student, fake, discriminator).

    Raises:
        ValueError: unreadable data or images of several sizes, an unknown divergence, an output that is taken.
        KeyboardInterrupt: stopped between two steps; a checkpoint is written and `resume=True` goes on.
    """
    D = divergence(divergence_) if isinstance(divergence_, str) else divergence_
    source = load(data)
    noise = noise or Noise(0.02, 20.0)
    weights = RatioWeights(D, noise, clip=clip)
    directory = RunDirectory.create(output, resume=resume, overwrite=overwrite)
    directory.write_recipe(
        {
            "method": "f_distill",
            "data": str(data) if isinstance(data, str | Path) else type(data).__name__,
            "divergence": str(D),
            "steps": steps,
            "network": network,
            "batch": batch,
            "normaliser": normaliser,
            "gan": gan,
            "clip": list(clip),
            "noise": [noise.low, noise.high, noise.draw],
            "seed": seed,
        }
    )
    directory.write_objective(
        f"D(target, model) = {D.equation}, averaged over noise levels {noise.low:g} to {noise.high:g} ({noise.draw});\n"
        f"target: the teacher's noised samples, model: the one-step student's; gradient: the score difference weighted "
        f"by h(r) = r^2 f''(r), normaliser {normaliser}; GAN term {gan:g}"
    )
    directory.write_environment({"seed": seed})

    def new(out: int | None = None) -> nn.Module:
        if isinstance(network, str):
            if network != "mlp":
                raise ValueError(f'network={network!r} is unknown; choose "mlp" or give settings of a UNet2DModel')
            return Mlp(source.shape, width, out)
        return Unet(unet(**network))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "networks"))
        fake: nn.Module = Denoiser(new(), source.deviation)
        ratio = Discriminator(Mlp(source.shape, width, out=1), source.deviation)
    if teacher is None:
        teacher = (
            source
            if isinstance(source, Mixture)
            else _trained(fake, source, teacher_steps, batch, seed, directory, resume)
        )
    if not isinstance(teacher, Mixture):
        fake = copy.deepcopy(teacher)
    student = OneStep(fake, noise.high)
    learner = FDistill(
        student,
        teacher,
        fake,
        ratio,
        source,
        weights,
        noise,
        normaliser=normaliser,
        gan=gan,
        every=every,
        warmup=warmup,
        batch=batch,
        learning_rates=learning_rates or (5e-4, 1e-3, 1e-3),
        ema=ema,
        seed=seed,
    )
    fitted = fit(
        learner, steps, directory, resume=resume, save_every=save_every, log_every=log_every, what=f"distil {D}"
    )
    if not fitted.finished:
        raise KeyboardInterrupt(f"stopped; a checkpoint is in {directory.checkpoints}; resume=True goes on from it")
    if (told := learner.saturation()) is not None:
        warnings.warn(told, stacklevel=2)
    directory.model.mkdir(exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in learner.generator.state_dict().items()},
        directory.model / "student.safetensors",
    )
    done = Distilled(Path(directory.path), learner.generator, teacher, source.shape, directory.metrics())
    points = 64 if len(source.shape) > 1 else 2000
    with torch.no_grad():
        shown = sample(teacher, points, source.shape, noise, seed=seed)
    panels = [("teacher, 35 calls each", shown), ("student, 1 call each", done.sample(points, seed))]
    side_by_side(panels, {str(D): D}).savefig(
        Path(directory.path) / "samples.png", dpi=110, metadata={"Software": None}
    )
    return done


def _trained(
    denoiser: nn.Module, source: Data, steps: int, batch: int, seed: int, directory: RunDirectory, resume: bool
) -> nn.Module:
    """A teacher trained on the data, in its own folder of the run, where a resumed run finds it."""
    assert isinstance(denoiser, Denoiser)
    training = DenoiserTraining(copy.deepcopy(denoiser), source, batch=batch, seed=seed)
    place = RunDirectory.create(Path(directory.path) / "teacher", resume=True, overwrite=not resume)
    if not resume:
        place.truncate_after(0)
    fitted = fit(training, steps, place, resume=resume, save_every=steps, log_every=20, what="teacher")
    if not fitted.finished:
        raise KeyboardInterrupt(f"stopped; a checkpoint is in {place.checkpoints}; resume=True goes on from it")
    return training.average.requires_grad_(False)
