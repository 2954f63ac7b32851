"""One-step distillation of diffusion models, under any divergence.

    distil("digits", "forward_kl", "runs/digits")

trains a teacher, a one-step student, the student's own score and a discriminator, and leaves a run directory with
pictures. The parts: `data`, `noise`, `networks`, `teacher`, `weights` and `f_distill`; the loop is
`kullback.run.learner.fit`.
"""

from kullback.diffusion.api import Distilled, distil
from kullback.diffusion.data import Data, Images, Mixture, digits, folder, load, ring, two_modes
from kullback.diffusion.f_distill import FDistill, matching_loss
from kullback.diffusion.networks import Discriminator, Mlp, OneStep, TeacherHead, Unet, pretrained, unet
from kullback.diffusion.noise import Denoiser, Noise, Scheduled
from kullback.diffusion.teacher import DenoiserTraining, sample
from kullback.diffusion.weights import RatioWeights

__all__ = [
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
    "digits",
    "distil",
    "folder",
    "load",
    "matching_loss",
    "pretrained",
    "ring",
    "sample",
    "two_modes",
    "unet",
]
