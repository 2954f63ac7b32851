"""One-step distillation of diffusion models, under any divergence.

    distil("digits", "forward_kl", "runs/digits")

trains a teacher, a one-step student, the student's own score and a discriminator, and leaves a run directory with
pictures. The parts: `data`, `noise`, `networks`, `teacher`, `weights` and `f_distill`; the loop is
`kullback.run.learner.fit`. `exact` is the same for a Gaussian student, without sampling.
"""

from kullback.diffusion.api import Distilled, distil, distil_each
from kullback.diffusion.by_name import from_diffusers
from kullback.diffusion.data import Data, Images, Mixture, digits, folder, load, ring, two_modes
from kullback.diffusion.f_distill import FDistill, matching_loss
from kullback.diffusion.measure import coverage, energy_distance, modes
from kullback.diffusion.networks import (
    Affine,
    Discriminator,
    Mlp,
    OneStep,
    TeacherHead,
    Unet,
    new_denoiser,
    pretrained,
)
from kullback.diffusion.noise import Denoiser, Noise, Scheduled
from kullback.diffusion.teacher import DenoiserTraining, sample
from kullback.diffusion.weights import RatioWeights

__all__ = [
    "Affine",
    "Data",
    "Denoiser",
    "DenoiserTraining",
    "Discriminator",
    "Distilled",
    "FDistill",
    "Images",
    "Mixture",
    "Mlp",
    "Noise",
    "OneStep",
    "RatioWeights",
    "Scheduled",
    "TeacherHead",
    "Unet",
    "coverage",
    "digits",
    "distil",
    "distil_each",
    "energy_distance",
    "folder",
    "from_diffusers",
    "load",
    "matching_loss",
    "modes",
    "new_denoiser",
    "pretrained",
    "ring",
    "sample",
    "two_modes",
]
