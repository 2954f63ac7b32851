"""f-distill: a one-step generator by matching noised marginals under any f-divergence.

    x_t = G(z) + sigma eps,    r = target_t(x_t) / model_t(x_t),    h(r) = r^2 f''(r)
    grad D_f(target_t, model_t) = -E[ h(r) (score_target - score_model)(x_t) . d x_t / d theta ]

h, r and both scores are constants; the gradient flows through x_t alone, and all samples are the student's. The
target's score is the frozen teacher's, the model's that of `fake`, a denoiser trained along on the student's samples.
log r is the logit of a discriminator of noised data against noised samples. Reverse KL (h = 1) is DMD2.

Paper -> here:  p_t -> target,  q_t -> model,  psi -> fake,  D -> ratio,  lambda_GAN -> gan.
Source: Xu et al., arXiv 2502.15681; the loop, loss and constants as in its released code.
Differs: (1) `normaliser` "none" or "level", which make the update the gradient of a divergence; "dmd" is the paper's.
It divides each sample by its own distance to the teacher's answer, and moves every fixed point. (2) bins in log sigma.
(3) no EMA-0 default and no classifier-free guidance.
"""

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from kullback.diffusion.data import Data
from kullback.diffusion.noise import Denoiser, Noise, Scheduled, expand
from kullback.diffusion.teacher import Teacher, follow
from kullback.diffusion.weights import RatioWeights
from kullback.run.learner import Player
from kullback.run.seeds import generator
from kullback.run.terms import Term

Normaliser = Literal["none", "level", "dmd"]
R1 = Literal["noised", "clean"]


def matching_loss(
    x: Float[Tensor, "row *shape"],
    teacher_x0: Float[Tensor, "row *shape"],
    fake_x0: Float[Tensor, "row *shape"],
    h: Float[Tensor, "row"],
    sigma: Float[Tensor, "row"],
    normaliser: Normaliser = "none",
    deviation: float = 1.0,
) -> Float[Tensor, "row"]:
    """A surrogate with the gradient w (fake_x0 - teacher_x0) / size in x; its value means nothing.

    score_target - score_model = (teacher_x0 - fake_x0) / sigma^2, so that

    - "none", w = h / sigma^2: the gradient of the divergence, over the size of a sample;
    - "level", w = h / c_out: the same, with each level's divergence weighted by sigma^2 / c_out. c_out =
      sigma deviation / sqrt(sigma^2 + deviation^2) is about the error of x0 there, so all levels pull alike;
    - "dmd", w = h / mean |x - teacher_x0|: each sample by its own error; no gradient of any divergence.

    Everything but x is detached.

    Args:
        deviation: of the data, for "level".
    """
    level = sigma.to(x)
    if normaliser == "none":
        w = h / level**2
    elif normaliser == "level":
        w = h * (level**2 + deviation**2).sqrt() / (level * deviation)
    else:
        w = h / ((x - teacher_x0).abs().flatten(1).mean(1) + 1e-6)
    goal = (x - expand(w, x) * (fake_x0 - teacher_x0)).detach()
    return 0.5 * (x - goal).square().flatten(1).mean(1)


class FDistill:
    """The learner. `fit(FDistill(...), steps)` trains it.

    Args:
        student: z [row, ...] -> x0 [row, ...]. Latents are standard normal, of the data's shape.
        teacher: (x_t, sigma) -> E[x0 | x_t], frozen. A mixture is one.
        fake: a `Denoiser` or `Scheduled`, best a copy of the teacher: the model's score.
        ratio: (x_t, sigma) -> logits [row, heads], high for data; a `Discriminator` or a `TeacherHead`.
        data: what the discriminator takes for real. With a teacher that is not perfect, r is data / model.
        weights: from log-ratios to h; holds the divergence.
        noise: which levels are drawn.
        normaliser: see `matching_loss`.
        gan: coefficient of the non-saturating GAN term, mean softplus(-logit) over the student's samples.
        every: the student moves in one step of so many, `fake` and `ratio` in the others.
        warmup: steps before the student's first.
        r1, r1_kind: coefficient of the squared change of the logit under a perturbation of 0.1: of the noised real
            sample, or ("clean", as released) of the un-noised one against the noised one's logit.
        learning_rates: (student, fake, ratio); `last_learning_rate`: where the student's ends.
        ema: of the student's average; 0 keeps none.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        fake: nn.Module,
        ratio: nn.Module,
        data: Data,
        weights: RatioWeights,
        noise: Noise,
        *,
        normaliser: Normaliser = "none",
        gan: float = 1e-3,
        every: int = 5,
        warmup: int = 0,
        r1: float = 0.0,
        r1_kind: R1 = "noised",
        batch: int = 512,
        learning_rates: tuple[float, float, float] = (1e-3, 3e-3, 3e-3),
        last_learning_rate: float | None = None,
        ema: float = 0.0,
        seed: int = 0,
    ) -> None:
        if normaliser not in ("none", "level", "dmd"):
            raise ValueError(f'normaliser={normaliser!r} is unknown; choose "none", "level" or "dmd"')
        if r1_kind not in ("noised", "clean"):
            raise ValueError(f'r1_kind={r1_kind!r} is unknown; choose "noised" or "clean"')
        if every < 2 or batch < 2 or warmup < 0:
            raise ValueError(f"every={every}, batch={batch}, warmup={warmup}: needs at least 2, 2 and 0")
        if fake is teacher:
            raise ValueError("fake is the teacher itself: give it a copy, which follows the student")
        self.student, self.teacher, self.fake, self.ratio = student, teacher, fake, ratio
        self.data, self.weights, self.noise, self.normaliser = data, weights, noise, normaliser
        self.gan, self.every, self.warmup, self.r1, self.r1_kind = gan, every, warmup, r1, r1_kind
        self.batch, self.learning_rates, self.last_learning_rate, self.seed = (
            batch,
            learning_rates,
            last_learning_rate,
            seed,
        )
        self.ema, self.deviation = ema, data.deviation
        self.average = copy.deepcopy(student) if ema else None
        if isinstance(teacher, nn.Module):
            teacher.requires_grad_(False)

    @property
    def generator(self) -> nn.Module:
        """What to draw from: the average if there is one."""
        return self.average if self.average is not None else self.student

    def players(self) -> Mapping[str, Player]:
        student, fake, ratio = self.learning_rates
        players = {
            "student": Player(self.student, student, self.last_learning_rate),
            "fake": Player(self.fake, fake),
            "ratio": Player(self.ratio, ratio),
            "weights": Player(self.weights),
        }
        return players | ({"average": Player(self.average)} if self.average is not None else {})

    def moves(self, step: int) -> tuple[str, ...]:
        if step >= self.warmup and (step - self.warmup) % self.every == self.every - 1:
            return ("student",)
        return ("fake", "ratio")

    def draw(self, step: int) -> dict[str, Tensor]:
        g = generator(self.seed, "f-distill", step)
        shape = (self.batch, *self.data.shape)
        batch = {
            "latent": torch.randn(shape, generator=g),
            "noise": torch.randn(shape, generator=g),
            "sigma": self.noise.sample(self.batch, g),
        }
        if "student" not in self.moves(step):
            batch |= {
                "real": self.data.sample(self.batch, g),
                "real_noise": torch.randn(shape, generator=g),
                "real_sigma": self.noise.sample(self.batch, g),
            }
            if self.r1:
                batch["nudge"] = 0.1 * torch.randn(shape, generator=g)
        return batch

    def terms(self, batch: Any, step: int) -> list[Term]:
        return self.student_terms(batch) if "student" in self.moves(step) else self.score_terms(batch)

    def student_terms(self, batch: Mapping[str, Tensor]) -> list[Term]:
        """What moves the student. Shown: the divergence at the discriminator's ratios, not the surrogate's value."""
        sigma = batch["sigma"]
        x = self.student(batch["latent"])
        noised = x + expand(sigma, x) * batch["noise"]
        with torch.no_grad():
            teacher_x0, fake_x0 = self.teacher(noised, sigma), self.fake(noised, sigma)
        logits = self.ratio(noised if self.gan else noised.detach(), sigma)
        before = self.weights.clipped.item()
        h, log_ratio = self.weights(logits.mean(1), sigma)
        loss = matching_loss(x, teacher_x0, fake_x0, h, sigma, self.normaliser, self.deviation)
        seen = {
            "clipped": x.new_tensor((self.weights.clipped.item() - before) / len(x)),
            "weight_std": h.std(),
            "log_ratio": log_ratio.mean(),
        }
        terms = [Term("divergence", loss, shown=self.weights.divergence.value(log_ratio), seen=seen)]
        if self.gan:
            terms.append(Term("gan", softplus(-logits).mean(1), coefficient=self.gan))
        return terms

    def score_terms(self, batch: Mapping[str, Tensor]) -> list[Term]:
        """What moves the model's score and the discriminator; the student's samples are constants."""
        sigma, real_sigma = batch["sigma"], batch["real_sigma"]
        with torch.no_grad():
            x = self.student(batch["latent"])
        noised = x + expand(sigma, x) * batch["noise"]
        error = (self.fake(noised, sigma) - x).square().flatten(1).mean(1)
        if isinstance(self.fake, Denoiser | Scheduled):
            error = error * self.fake.loss_weight(sigma)
        real = batch["real"].to(x)
        noised_real = real + expand(real_sigma, x) * batch["real_noise"]
        fake_logits, real_logits = self.ratio(noised, sigma), self.ratio(noised_real, real_sigma)
        told = softplus(fake_logits).mean(1) + softplus(-real_logits).mean(1)
        terms = [Term("denoise", error), Term("discriminate", told)]
        if self.r1:
            moved = (noised_real if self.r1_kind == "noised" else real) + batch["nudge"]
            change = (real_logits - self.ratio(moved, real_sigma)).square().mean(1)
            terms.append(Term("r1", change, coefficient=self.r1))
        return terms

    def after(self, step: int) -> None:
        if self.average is not None and "student" in self.moves(step):
            follow(self.average, self.student, self.ema)

    def saturation(self) -> str | None:
        """One sentence with the count, where more than half of all log-ratios were cut; else None."""
        clipped, seen = int(self.weights.clipped), int(self.weights.seen)
        if clipped * 2 <= seen:
            return None
        return (
            f"ratio network: {clipped} of {seen} log-ratios lay beyond clip={self.weights.clip}, so their weights do "
            "not tell them apart; lower its learning rate, add r1, or widen the clip"
        )
