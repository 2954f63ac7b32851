"""`distil`: data in, a one-step generator out, everything in one run directory. `distil_each`: one per divergence."""

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from kullback.diffusion.data import Data, Images, Mixture, load
from kullback.diffusion.f_distill import FDistill, Normaliser
from kullback.diffusion.measure import coverage, energy_distance, modes
from kullback.diffusion.networks import (
    Affine,
    Discriminator,
    Mlp,
    OneStep,
    check_denoiser,
    new_denoiser,
    pretrained,
)
from kullback.diffusion.noise import Denoiser, Noise, Scheduled
from kullback.diffusion.pictures import LOG_RATIO, weight_curve
from kullback.diffusion.report import SAMPLES, write_report
from kullback.diffusion.teacher import DenoiserTraining, sample
from kullback.diffusion.weights import RatioWeights
from kullback.divergence import FDivergence, divergence
from kullback.run.directory import RunDirectory
from kullback.run.learner import fit
from kullback.run.seeds import derive, generator

CALLS = 35  # of the teacher for one sample: Heun over 18 levels


@dataclass(frozen=True)
class Distilled:
    """A finished distillation.

    Attributes:
        evaluation: {"student", "untrained", "teacher": {name: {"value", "standard_error"}}}; the untrained student is
            the teacher's network in one call.
    """

    directory: Path
    student: nn.Module
    teacher: nn.Module
    shape: tuple[int, ...]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]

    @torch.no_grad()
    def sample(self, count: int, seed: int = 0) -> Float[Tensor, "row *shape"]:
        """One call of the network for each sample."""
        return self.student(torch.randn(count, *self.shape, generator=generator(seed, "student samples")))


def distil(
    data: str | Path | Data,
    divergence_: str | FDivergence,
    output: str | Path,
    *,
    steps: int = 12_000,
    teacher: nn.Module | str | None = None,
    teacher_steps: int = 10_000,
    network: Mapping[str, Any] | str = "mlp",
    scheduler: str | None = None,
    student: Literal["network", "affine"] = "network",
    width: int = 256,
    batch: int = 256,
    normaliser: Normaliser = "level",
    gan: float = 1e-3,
    clip: tuple[float, float] = (0.1, 20.0),
    noise: Noise | None = None,
    every: int = 5,
    warmup: int = 200,
    learning_rates: tuple[float, float, float] = (5e-4, 1e-3, 1e-3),
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
        output: the run directory: metrics, checkpoints, `model/student.safetensors`, `samples.png` and report.html.
        steps: of the student's loop; the student moves in every `every`-th.
        teacher: (x_t, sigma) -> E[x0 | x_t], or a diffusers pipeline for `pretrained`. By default one is trained for
            `teacher_steps` in output/teacher, and a mixture, whose score is known, is its own.
        network, scheduler, width: of a new teacher, see `new_denoiser`; student and model's score start as copies of
            the teacher.
        student: the network itself in one call, or "affine", which is too small for more than one mode.
        normaliser: see `matching_loss`; with "none" the smallest noise has nearly all the weight, too much for images.
        learning_rates: (student, fake, discriminator).
        save_every: steps between checkpoints, the teacher's and the student's.

    Raises:
        ValueError: unreadable data or images of several sizes, an unknown divergence, an output that is taken, or a
            resumed run whose settings differ.
        ImportError: data or network need the extra `diffusion`; the message says how to install it.
        KeyboardInterrupt: stopped between two steps; a checkpoint is written and `resume=True` goes on.
    """
    D = divergence(divergence_) if isinstance(divergence_, str) else divergence_
    source, noise = load(data), noise or Noise(0.02, 20.0)
    weights = RatioWeights(D, noise, clip=clip)
    if student not in ("network", "affine"):
        raise ValueError(f'student={student!r} is unknown; choose "network" or "affine"')
    recipe = {
        "method": "f_distill",
        "data": str(data) if isinstance(data, str | Path) else type(data).__name__,
        "divergence": str(D),
        "steps": steps,
        "teacher": teacher if isinstance(teacher, str) else type(teacher).__name__ if teacher else None,
        "teacher_steps": teacher_steps,
        "network": dict(network) if isinstance(network, Mapping) else network,
        "scheduler": scheduler,
        "student": student,
        "width": width,
        "batch": batch,
        "normaliser": normaliser,
        "gan": gan,
        "clip": clip,
        "noise": [noise.low, noise.high, noise.draw],
        "every": every,
        "warmup": warmup,
        "learning_rates": learning_rates,
        "ema": ema,
        "seed": seed,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "networks"))
        start = new_denoiser(network, scheduler, source.shape, source.deviation, width)
        ratio = Discriminator(Mlp(source.shape, width, out=1), source.deviation)
    given = _given_teacher(teacher, source)
    directory = RunDirectory.create(output, resume=resume, overwrite=overwrite)
    fitting = {"resume": resume, "save_every": save_every, "log_every": log_every}
    place = None if given is not None else RunDirectory.create(directory.path / "teacher", resume, overwrite)
    _begin(directory, recipe, resume)
    directory.write_objective(
        f"D(target, model) = {D.equation}, averaged over noise levels {noise.low:g} to {noise.high:g} ({noise.draw});\n"
        f"target: the teacher's noised samples, model: the one-step student's; gradient: the score difference weighted "
        f"by h(r) = r^2 f''(r), normaliser {normaliser}; GAN term {gan:g}"
    )
    directory.write_environment({"seed": seed})
    if given is None:
        assert place is not None
        assert isinstance(start, Denoiser | Scheduled)
        given = _train_teacher(start, source, teacher_steps, batch, seed, place, fitting)
    fake = start if isinstance(given, Mixture) else copy.deepcopy(given)
    first = Affine(source.shape, source.deviation) if student == "affine" else OneStep(fake, noise.high)
    untrained = copy.deepcopy(first)
    learner = FDistill(
        first,
        given,
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
        learning_rates=learning_rates,
        ema=ema,
        seed=seed,
    )
    _fit(learner, steps, directory, what=f"distil {D}", **fitting)
    if (told := learner.saturation()) is not None:
        warnings.warn(f"{directory.path}: {told}", stacklevel=2)
    directory.model.mkdir(exist_ok=True)
    _save(dict(learner.generator.state_dict()), directory.model / "student.safetensors")
    evaluation = _evaluate(learner, untrained, given, directory)
    write_report([directory.path], directory.report_file)
    return Distilled(directory.path, learner.generator, given, source.shape, directory.metrics(), evaluation)


def distil_each(
    data: str | Path | Data,
    divergences: Sequence[str | FDivergence],
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> list[Distilled]:
    """One student for each divergence in output/NAME, of one teacher, and one report of all of them in `output`.

    Args and raises: as `distil`. The teacher is trained once, with the first student, in its directory.

    Raises:
        ValueError: none or two equal divergences.
    """
    family = [divergence(name) if isinstance(name, str) else name for name in divergences]
    if not family or len({str(D) for D in family}) < len(family):
        raise ValueError(f"divergences={[str(D) for D in family]}: name at least one, and none twice")
    for D in family:  # before the first trains for minutes
        RatioWeights(D, Noise())
    done: list[Distilled] = []
    for D in family:
        if done:
            options["teacher"] = done[0].teacher
        place = Path(output) / folder_name(D)
        done.append(distil(data, D, place, resume=resume, overwrite=overwrite, **options))
    write_report([run.directory for run in done], Path(output) / "report.html")
    return done


def folder_name(D: FDivergence) -> str:
    """The divergence's name as a folder: letters, digits, points and hyphens."""
    return "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in str(D)).strip("-")


def _given_teacher(teacher: nn.Module | str | None, source: Data) -> nn.Module | None:
    """The teacher that needs no training, tried on the data's shape; None where one is to be trained."""
    if teacher is None:
        return source if isinstance(source, Mixture) else None
    made = pretrained(teacher) if isinstance(teacher, str) else teacher
    check_denoiser(made, source.shape, f"teacher={teacher if isinstance(teacher, str) else type(teacher).__name__}")
    return made


def _begin(directory: RunDirectory, recipe: Mapping[str, Any], resume: bool) -> None:
    """Write the recipe; a resumed run must have begun with the same, but for the number of steps."""
    recipe = json.loads(json.dumps(recipe))
    before = (directory.recipe() or {}) if resume else {}
    for key in before.keys() - {"steps"}:
        if before[key] != recipe.get(key):
            raise ValueError(
                f"{key}={recipe.get(key)!r}: the run in {directory.path} was begun with {before[key]!r}; "
                "set it back, or start over with another output or overwrite"
            )
    if not resume:
        (directory.path / SAMPLES).unlink(missing_ok=True)
    directory.write_recipe(recipe)


def _train_teacher(
    denoiser: Denoiser | Scheduled,
    source: Data,
    steps: int,
    batch: int,
    seed: int,
    place: RunDirectory,
    fitting: Mapping[str, Any],
) -> nn.Module:
    """A teacher trained on the data, in its own folder of the run, where a resumed run finds it."""
    training = DenoiserTraining(copy.deepcopy(denoiser), source, batch=batch, seed=seed)
    _fit(training, steps, place, what="teacher", **fitting)
    return training.average.requires_grad_(False)


def _fit(learner: Any, steps: int, directory: RunDirectory, **options: Any) -> None:
    if not fit(learner, steps, directory, **options).finished:
        raise KeyboardInterrupt(f"stopped; a checkpoint is in {directory.checkpoints}; resume=True goes on from it")


@torch.no_grad()
def _evaluate(
    learner: FDistill, untrained: nn.Module, teacher: nn.Module, directory: RunDirectory
) -> dict[str, dict[str, Any]]:
    """Draw from student, untrained student and teacher; keep samples and curve for the report, and measure them."""
    source, seed = learner.data, learner.seed
    count = 512 if len(source.shape) > 1 else 2000
    draw = generator(seed, "student samples")
    latent = torch.randn(count, *source.shape, generator=draw)
    drawn = {
        "student": learner.generator(latent),
        "untrained": untrained(latent),
        "teacher": sample(teacher, count, source.shape, learner.noise, seed=seed),
    }
    curve = {"log_ratio": LOG_RATIO, "weight": weight_curve(learner.weights.divergence)}
    _save(drawn | curve, directory.path / SAMPLES)
    if isinstance(source, Images):  # each image once: equal ones have no distance to their neighbours
        real = source.images[torch.randperm(len(source.images), generator=generator(seed, "measured"))[:count]]
    else:
        real = source.sample(count, generator(seed, "measured"))
    found: dict[str, dict[str, Any]] = {}
    for who, samples in drawn.items():
        values = {"energy distance": energy_distance(samples, real)}
        if len(real) > 5:
            values["coverage"] = coverage(real, samples)
        if isinstance(source, Mixture):
            covered, near = modes(samples, source)
            values |= {"modes": covered, "near a mode": near}
        found[who] = {name: {"value": value, "standard_error": None} for name, value in values.items()}
    clipped = int(learner.weights.clipped) / max(int(learner.weights.seen), 1)
    found["student"]["clipped"] = {"value": clipped, "standard_error": None}
    directory.write_evaluation(found)
    return found


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
