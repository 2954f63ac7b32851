"""Exponential tilting and root finding over finite outcome sets, for the theory and for language models alike."""

from kullback.estimate.roots import expand, find_root
from kullback.estimate.tilting import (
    beta_for_kl,
    beta_for_mean,
    check_laws,
    cumulants,
    ends,
    expectation,
    legendre,
    log_partition,
    tilt,
    tilted_kl,
    variance,
)

__all__ = [
    "beta_for_kl",
    "beta_for_mean",
    "check_laws",
    "cumulants",
    "ends",
    "expand",
    "expectation",
    "find_root",
    "legendre",
    "log_partition",
    "tilt",
    "tilted_kl",
    "variance",
]
