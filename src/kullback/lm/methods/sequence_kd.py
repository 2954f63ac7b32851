"""Sequence-level knowledge distillation: fine-tune on what the teacher writes.

    min over theta   - E_{y ~ teacher(. | x)}  sum_t log model(y_t | x, y_<t)

In expectation this is KL(teacher || student) between whole sequences, up to the teacher's entropy. Only text passes
from one to the other. Each problem is answered once and its answers are read again.

Paper -> here:  p -> teacher,  q -> model.
Source: Kim and Rush, arXiv 1606.07947, section 3.2.
Differs from the paper: (1) answers are samples; a sampling temperature of 0 gives its mode approximation, by greedy
decoding instead of beam search.
"""

from dataclasses import dataclass
from typing import final

from kullback.lm import Batch, Distillation, sources, targets
from kullback.run.terms import Term


@final
@dataclass(frozen=True, kw_only=True)
class SequenceKD(Distillation):
    """Fine-tune on the teacher's own answers."""

    def __post_init__(self) -> None:
        if self.top_k is not None or self.cache is not None:
            raise ValueError(
                f"target.top_k={self.top_k} and target.cache={self.cache!r} would do nothing: "
                "only the teacher's text is used; leave them out, or use method: word_kd"
            )

    def source(self) -> sources.Source:
        return sources.teacher(system=self.teacher_system)

    def targets(self) -> dict[str, targets.Target]:
        return {}

    def signal(self, batch: Batch) -> list[Term]:
        return [
            Term(
                "nll",
                -batch.model.log_probs(),
                says="negative log-likelihood of the teacher's tokens, nats; value and gradient: exact",
            )
        ]
