"""DPH-RL: policy gradient on what is not mastered yet, and a divergence that holds on to what is, by replay.

    min over theta   - E_{open, y_1..n ~ old} mean_t min( ratio_t A_i, clip(ratio_t, 1 - low, 1 + high) A_i )
                     + coefficient * mean over replayed tokens of  f(u_t) / u_t,    u = initial / model
    A_i = (r_i - mean of the group) / (deviation of the group + epsilon),    ratio_t = model(y_t) / old(y_t)

Before the first step the initial student answers every training problem `attempts` times. Those with `threshold` right
answers are mastered; of each, `answers` more are drawn and the right ones kept with their log-probabilities. These are
replayed for ever, and are all that is known of the initial student: no reference model is read. A, the old policy and
the stored log-probabilities are detached. Replayed tokens get the divergence only, rollouts the policy gradient only.

Paper -> here:  pi_ref -> initial,  its u -> 1 / u,  forward -> forward_kl,  js_low_var -> 2*jsd(0.5),
alpha a -> alpha(a),  c -> coefficient = c / 8,  G -> samples,  D_pef and D_exp -> mastered and open problems.
Source: Li et al., arXiv 2509.07430 (as in the official code).
Differs from the paper: (1) each term is a mean of its own, where the code pools rollouts and replay, 8 to 1; (2)
`cap` acts on every divergence, not on forward KL alone; (3) text is drawn with the whole distribution: with its top-p
of 0.9 replay would not come from the initial student; (4) problems whose further answers are all wrong are left out;
(5) the definition form of Jensen-Shannon, which needs a live reference, is left out; (6) kept answers are right ones,
so the target is the initial student given success.
"""

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor

from kullback.divergence import divergence
from kullback.lm import Batch, answer, sources
from kullback.lm.moment import Moment
from kullback.lm.replay import beside, collect, held, unmastered
from kullback.lm.rewarded import GroupMethod
from kullback.lm.rollout import Origin
from kullback.run.terms import Term


@final
@dataclass(frozen=True, kw_only=True)
class DPHRL(GroupMethod):
    """Verifiable rewards on problems not mastered yet, and any divergence to the initial student on the others.

    Args:
        attempts: answers to each training problem before the first step.
        threshold: right ones among them that make a problem mastered.
        answers: further answers to a mastered problem, of which the right ones are kept.
        judge: the grade that is 1 where such an answer is right.
        replay: kept answers in a step, over all processes.
        divergence: a name `kb.divergence` parses; its target is the initial student.
        coefficient: of the divergence; 0 is policy gradient on the open problems alone.
        centred: use the generator with f'(1) = 0; false, with forward_kl, is plain rehearsal (its gradient is that of
            the negative log-likelihood).
        cap: value of a replayed token, in nats, above which it pulls no more; None sets no limit.
    """

    attempts: int = answer("source", 8)
    threshold: int = answer("source", 8)
    answers: int = answer("source", 1)
    judge: str = answer("source", "accuracy")
    replay: int = answer("source", 64)
    dual: float | None = answer("signal", 3.0)
    divergence: str = answer("signal", "forward_kl")
    coefficient: float = answer("signal", 0.1)
    centred: bool = answer("signal", True)
    cap: float | None = answer("signal", 10.0)
    epsilon: float = answer("weight", 1e-6)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.threshold <= self.attempts:
            raise ValueError(
                f"source.threshold={self.threshold} counts right answers among source.attempts={self.attempts}: "
                "choose 1 to that many"
            )
        if self.answers < 1:
            raise ValueError(f"source.answers={self.answers} must be at least 1")
        if self.coefficient < 0:
            raise ValueError(f"signal.coefficient={self.coefficient:g} must be at least 0")
        if self.coefficient > 0 and self.replay < 1:
            raise ValueError(
                f"source.replay={self.replay} leaves signal.coefficient={self.coefficient:g} nothing to act on: "
                "raise it, or set the coefficient to 0"
            )
        if not self.centred and divergence(self.divergence).plain_slope == 0:
            raise ValueError(
                f"signal.centred=false would do nothing: the textbook generator of {self.divergence} is centred; "
                "forward_kl has another"
            )
        if self.cap is not None and self.cap <= 0:
            raise ValueError(f"signal.cap={self.cap:g} must be above 0, or null for none")

    def begin(self, at: Moment) -> None:
        super().begin(at)
        collect(at, attempts=self.attempts, threshold=self.threshold, answers=self.answers, judge=self.judge)

    def writer(self) -> sources.Source:
        return unmastered(super().writer())

    def source(self) -> sources.Source:
        return beside(super().source(), self.replay if self.coefficient > 0 else 0)

    def weight(self, step: Batch) -> dict[str, Tensor]:
        rollout, scored = step.rollout, step["scored"]
        replayed = (rollout.origin == Origin.DATASET) & scored
        fresh = (scored & ~replayed).any(1)
        reward = self.reward(rollout)
        shown = {name: values.masked_fill(~fresh, math.nan) for name, values in self.shown(rollout, reward).items()}
        return shown | {
            "advantage": self.advantage(reward, rollout),
            "explore": scored & ~replayed & ~reward.isnan()[:, None],
            "replay": replayed,
        }

    def signal(self, batch: Batch) -> list[Term]:
        terms = [self.surrogate(batch, self.advantage_in_words(), over="explore")]
        if self.coefficient > 0:
            terms.append(held(self.divergence, batch, centred=self.centred, cap=self.cap, coefficient=self.coefficient))
        return terms
