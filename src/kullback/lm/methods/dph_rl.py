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

from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from kullback.divergence import divergence
from kullback.lm import Batch, Method, answer, policy, sampling, sources
from kullback.lm.advantages import Baseline, Scale, group_advantage, informative, shaped_reward
from kullback.lm.moment import Moment
from kullback.lm.replay import beside, collect, held, unmastered
from kullback.lm.rollout import Origin, Rollout
from kullback.run.terms import Term


@final
@dataclass(frozen=True, kw_only=True)
class DPHRL(Method):
    """Verifiable rewards on problems not mastered yet, and any divergence to the initial student on the others.

    Args:
        rewards: weights of the grades whose sum is maximised; None is {accuracy: 1}.
        updates: optimiser steps over one draw.
        redraws: how often a prompt whose answers all have the same reward is replaced by another.
        attempts: answers to each training problem before the first step.
        threshold: right ones among them that make a problem mastered.
        answers: further answers to a mastered problem, of which the right ones are kept.
        judge: the grade that is 1 where such an answer is right.
        replay: kept answers in a step, over all processes.
        clip: how far below and above 1 the ratio is followed.
        dual: a second limit where A < 0: the loss of a token is at most dual * |A|.
        divergence: a name `kb.divergence` parses; its target is the initial student.
        coefficient: of the divergence; 0 is policy gradient on the open problems alone.
        centred: use the generator with f'(1) = 0; false, with forward_kl, is plain rehearsal (its gradient is that of
            the negative log-likelihood).
        cap: value of a replayed token, in nats, above which it pulls no more; None sets no limit.
        baseline: "group" mean, "leave_one_out" or "none".
        scale: divide by the standard deviation of the "group", of the "batch", or "none".
        epsilon: added to it.
    """

    samples: int = answer("source", 8)
    updates: int = answer("source", 1)
    redraws: int = answer("source", 0)
    attempts: int = answer("source", 8)
    threshold: int = answer("source", 8)
    answers: int = answer("source", 1)
    judge: str = answer("source", "accuracy")
    replay: int = answer("source", 64)
    clip: tuple[float, float] = answer("signal", (0.2, 0.28))
    dual: float | None = answer("signal", 3.0)
    divergence: str = answer("signal", "forward_kl")
    coefficient: float = answer("signal", 0.1)
    centred: bool = answer("signal", True)
    cap: float | None = answer("signal", 10.0)
    rewards: dict[str, float] | None = answer("weight", None)
    baseline: Baseline = answer("weight", "group")
    scale: Scale = answer("weight", "group")
    epsilon: float = answer("weight", 1e-6)

    def __post_init__(self) -> None:
        if not 1 <= self.threshold <= self.attempts:
            raise ValueError(
                f"source.threshold={self.threshold} counts right answers among source.attempts={self.attempts}: "
                "choose 1 to that many"
            )
        if self.answers < 1 or self.updates < 1:
            raise ValueError(f"source.answers={self.answers} and source.updates={self.updates} must both be at least 1")
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
        if self.sampling_temperature != 1:
            raise ValueError(
                f"source.sampling_temperature={self.sampling_temperature:g}: the stored log-probabilities would be of "
                "another distribution than the one that is trained, and the divergence not 0 at the start; set it to 1"
            )
        if self.samples < 2 and self.baseline != "none":
            raise ValueError(
                f"source.samples={self.samples} leaves an answer nothing to be compared with: raise it, or set "
                "weight.baseline=none"
            )
        if self.baseline == "none" and self.scale == "group":
            raise ValueError("weight.baseline='none' with weight.scale='group' divides rewards by zero where all agree")
        if self.dual is not None and self.dual <= 1 + self.clip[1]:
            raise ValueError(f"signal.dual={self.dual:g} must be above the ratio's own limit, {1 + self.clip[1]:g}")

    @property
    def passes(self) -> int:
        return self.updates

    @property
    def scores(self) -> tuple[str, ...]:
        return ("log_prob:student",) if self.updates > 1 else ()

    def begin(self, at: Moment) -> None:
        if at.task.verifier is None:
            raise ValueError(f"task={at.task.name!r} grades nothing: give it answers or a verifier")
        collect(at, attempts=self.attempts, threshold=self.threshold, answers=self.answers, judge=self.judge)

    def source(self) -> sources.Source:
        written = unmastered(sources.student(grades=tuple(self.rewards or ())))
        fresh = sampling.informative(written, self._reward, self.redraws)
        return beside(fresh, self.replay if self.coefficient > 0 else 0)

    def weight(self, step: Batch) -> dict[str, Tensor]:
        rollout, scored = step.rollout, step["scored"]
        replayed = (rollout.origin == Origin.DATASET) & scored
        fresh = (scored & ~replayed).any(1)
        reward = self._reward(rollout)
        advantage = group_advantage(
            reward, rollout.group, baseline=self.baseline, scale=self.scale, epsilon=self.epsilon
        )
        nothing = reward.new_tensor(float("nan"))
        return {
            "advantage": advantage,
            "explore": scored & ~replayed & ~reward.isnan()[:, None],
            "replay": replayed,
            "rollout/reward": reward,
            "rollout/informative": informative(reward, rollout.group).float().where(fresh, nothing),
            "rollout/unknown": reward.isnan().float().where(fresh, nothing),
        }

    def signal(self, batch: Batch) -> list[Term]:
        surrogate = policy(batch, clip=self.clip, dual=self.dual, over="explore")
        terms = [replace(surrogate, says=f"{surrogate.says}; A = reward against its group's")]
        if self.coefficient > 0:
            terms.append(held(self.divergence, batch, centred=self.centred, cap=self.cap, coefficient=self.coefficient))
        return terms

    def _reward(self, rollout: Rollout) -> Tensor:
        return shaped_reward(rollout.rewards, self.rewards)
