"""Word-level knowledge distillation: match the teacher's next-token distribution along the data set's replies.

    min over theta   E_{(x, y) in data}  sum_t [ (1 - mix) KL(target(. | x, y_<t) || model)
                                                 - mix log model(y_t | x, y_<t) ]

Paper -> here:  q(. | x) -> target,  p(. | x) -> model,  alpha -> mix.
Source: Hinton, Vinyals and Dean, arXiv 1503.02531; Kim and Rush, arXiv 1606.07947, section 3.1.
Differs from the paper: (1) any divergence in place of forward KL; (2) no factor temperature ** 2.
"""

from dataclasses import dataclass
from typing import final

from kullback.lm import Batch, Distillation, answer, match, sources
from kullback.run.terms import Term


@final
@dataclass(frozen=True, kw_only=True)
class WordKD(Distillation):
    """Match a teacher token by token on the data set's replies.

    Args:
        divergence: a name `kb.divergence` parses.
        temperature: softens both distributions inside the divergence.
        mix: weight of the data set's own tokens, from 0 (teacher alone) to 1 (plain fine-tuning).
    """

    divergence: str = answer("signal", "forward_kl")
    temperature: float = answer("signal", 1.0)
    mix: float = answer("signal", 0.0)

    def __post_init__(self) -> None:
        if not 0 <= self.mix < 1:
            raise ValueError(f"signal.mix={self.mix:g} must be in [0, 1); at 1 the teacher has no say: use method: sft")

    def source(self) -> sources.Source:
        return sources.dataset()

    def signal(self, batch: Batch) -> list[Term]:
        terms = [match(self.divergence, batch, temperature=self.temperature, coefficient=1 - self.mix)]
        if self.mix > 0:
            terms.append(
                Term(
                    "nll",
                    -batch.model.log_probs(),
                    coefficient=self.mix,
                    says="negative log-likelihood, nats; value and gradient: exact",
                )
            )
        return terms
