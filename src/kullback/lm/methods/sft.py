"""Supervised fine-tuning: raise the likelihood of the data set's replies.

    min over theta   - E_{(x, y) in data}  sum_t log model(y_t | x, y_<t)

It is forward KL to the data: the target puts all its mass on the written token.
"""

from dataclasses import dataclass
from typing import final

from kullback.lm import Batch, Method, sources
from kullback.run.terms import Term


@final
@dataclass(frozen=True, kw_only=True)
class SFT(Method):
    """Train on the data set's replies; only assistant tokens count."""

    def source(self) -> sources.Source:
        return sources.dataset()

    def signal(self, batch: Batch) -> list[Term]:
        return [
            Term(
                "nll",
                -batch.model.log_probs(),
                says="negative log-likelihood of the written tokens, nats; value and gradient: exact",
            )
        ]
