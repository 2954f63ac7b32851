"""MiniLLM: reverse KL between whole sequences, by policy gradient with what each token causes later.

    min over theta   KL( model(. | x) || target(. | x) )
    gradient = E_{y ~ model} sum_t [ grad KL_t  -  R_{t+1} grad log model(y_t) ],    R_t = sum_{u >= t} r_u,
    r_u = log target(y_u) - log model(y_u)

The first part is the reverse KL at the prefix, exact over the vocabulary; the second carries the rewards that follow
the token. R is detached and, with `per_token`, divided by the number of tokens it sums.

Paper -> here:  p -> target,  q_theta -> model,  R -> reward to go;  "single-step decomposition" -> the match term,
"long-term part" -> the later term,  "length normalisation" -> per_token.
Source: Gu et al., arXiv 2306.08543, equations 4 to 6.
Differs from the paper: (1) no teacher-mixed sampling and no pre-training loss; (2) one update per draw, so the
importance ratio is 1; (3) the later term has the mean over the prompt's other samples as a baseline when there are any.
"""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from kullback.lm import Batch, Distillation, answer, match, policy, sources
from kullback.lm.weights import leave_one_out, suffix_sum
from kullback.run.terms import Term


@final
@dataclass(frozen=True, kw_only=True)
class MiniLLM(Distillation):
    """Sequence-level reverse KL to a teacher, on the student's own text.

    Args:
        per_token: divide the reward to go by the tokens it sums, which keeps long answers from being shunned.
        later: coefficient of the later term; 0 is plain on-policy reverse KL.
    """

    per_token: bool = answer("signal", True)
    later: float = answer("signal", 1.0)

    @property
    def scores(self) -> tuple[str, ...]:
        return ("log_prob:teacher", "log_prob:student")

    def source(self) -> sources.Source:
        return sources.student()

    def weight(self, step: Batch) -> dict[str, Tensor]:
        scored = step["scored"].float()
        reward = (step["log_prob:teacher"] - step["log_prob:student"]) * scored
        after = suffix_sum(reward) - reward
        if self.per_token:
            after = after / (suffix_sum(scored) - scored).clamp(min=1)
        return {"later": (after - leave_one_out(after, step.rollout.group)) * scored}

    def signal(self, batch: Batch) -> list[Term]:
        terms = [match("reverse_kl", batch)]
        if self.later > 0:
            terms.append(policy(batch, advantage="later", clip=None, name="later", coefficient=self.later))
        return terms
