"""Post-training language models: whose text, match what, which divergence, how much each token counts, what changes."""

from kullback.lm import parts, readers, sampling, sources, targets
from kullback.lm.batch import Batch
from kullback.lm.method import Distillation, Method, answer, find_method, methods
from kullback.lm.rollout import Origin, Rollout
from kullback.lm.signals import match, policy

__all__ = [
    "Batch",
    "Distillation",
    "Method",
    "Origin",
    "Rollout",
    "answer",
    "find_method",
    "match",
    "methods",
    "parts",
    "policy",
    "readers",
    "sampling",
    "sources",
    "targets",
]
