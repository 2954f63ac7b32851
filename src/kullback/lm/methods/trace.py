"""TRACE: a policy gradient everywhere, and on the few tokens that decided a divergence to oneself reading a hint.

    L(y) = 1/|y| [ sum_{t not in S} g_t + (1 - fade) sum_{t in S} g_t ] + kl * fade * 1/|y| sum_{t in S} D_t
    g_t  = -min( ratio_t A, clip(ratio_t, 1 - low, 1 + high) A ),    ratio_t = model(y_t) / old(y_t)
    D_t  = D( hinted(. | x, label, y_<t), model(. | x, y_<t) )
    S    = marked tokens of y: the key spans where y is right, the spans of its error where it is wrong

An annotator marks S and gives a label; the label alone reaches the target, which is a copy of the student. A, the old
policy and the target are detached; y is a sample. fade is 1 for `hold` steps, then falls to 0 over `decay`: from there
on this is GRPO and neither annotator nor target is called. Groups of equal reward have A = 0, and keep their D.

Forward KL lifts a token that the target supports by target(v), however rare the model holds it; reverse KL's gradient
vanishes with model(v), and so suits suppressing a confident error. Any divergence may stand in either place.

Paper -> here:  K_y -> key,  E_y -> error,  pi_A -> annotator,  q_t -> hinted,  lambda_k / w_0 -> fade,  w_0 -> kl,
TRACE-FKL -> key=forward_kl,  TRACE-RKL -> key=null and error=reverse_kl,  "pointwise clip" -> clip_terms.
Source: arXiv 2605.10194; the layout of the whole loss is pieced together from its description.
Differs from the paper: (1) clip_terms is off, the paper's is 0.05: it turns forward KL's lift of a rare token round;
(2) rows are averaged as `aggregate` says, by default each row first; (3) any divergence; (4) a row whose verifier
failed is left out, one whose annotator failed has no spans.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from kullback.divergence import divergence
from kullback.lm import Batch, answer, match, readers, targets
from kullback.lm.annotators import Rule, annotator, sum_terms
from kullback.lm.moment import Moment
from kullback.lm.players import INITIAL, AdapterOff, Copy
from kullback.lm.readers import Reader
from kullback.lm.rewarded import GroupMethod
from kullback.lm.targets import Target
from kullback.run.controllers import Controller, Ramp
from kullback.run.terms import Mean, Term


@final
@dataclass(frozen=True, kw_only=True)
class TRACE(GroupMethod):
    """Policy gradient on verifiable rewards, and self-distillation from a hint on the tokens that decided.

    Args:
        annotator: who marks the tokens: "rule" (worked sums), "model" (the student as it is now), the URL of a chat
            endpoint, or path/to/file.py:function.
        annotator_model: the name that an endpoint knows its model by.
        timeout: seconds that an endpoint or a function has for a row.
        cap: largest share of an answer that is marked.
        template: the last turn as the target reads it, from {prompt} and {hint}, the label.
        key: the divergence on key spans of right answers; None for none.
        error: the divergence on spans of wrong answers' errors; None for none.
        kl: coefficient of both.
        clip_terms: largest term of a divergence's sum over the vocabulary, in nats; None leaves them whole.
        fade: what is left of `kl`, and what the policy gradient lacks on the spans; the schedule writes it.
        hold: steps before fade begins to fall.
        decay: steps in which it falls to 0; None leaves it at 1.
        sync: steps after which the target's weights are the student's again; None keeps those of the start.
    """

    annotator: Any = answer("source", "rule")
    annotator_model: str | None = answer("source", None)
    timeout: float = answer("source", 60.0)
    cap: float = answer("source", 0.25)
    template: str = answer("target", "{prompt}\nHint: {hint}")
    key: str | None = answer("signal", "forward_kl")
    error: str | None = answer("signal", None)
    kl: float = answer("signal", 0.5)
    clip_terms: float | None = answer("signal", None)
    aggregate: Mean = answer("weight", "row")
    fade: float = answer("weight", 1.0)
    hold: int = answer("schedule", 10)
    decay: int | None = answer("schedule", 30)
    sync: int | None = answer("schedule", 10)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key is None and self.error is None:
            raise ValueError("signal.key and signal.error are both null, so nothing is routed: use method grpo")
        for which in self.routes.values():
            divergence(which)
        if self.kl < 0:
            raise ValueError(f"signal.kl={self.kl:g} must be at least 0")
        if self.sync is not None and self.sync < 1:
            raise ValueError(f"schedule.sync={self.sync} must be at least 1, or null for never")
        if not 0 <= self.fade <= 1:
            raise ValueError(f"weight.fade={self.fade:g} must be from 0 to 1; signal.kl is the coefficient")
        self._reader()
        self._target()

    @property
    def routes(self) -> dict[str, str]:
        """The divergence by kind of span."""
        return {name: which for name, which in (("key", self.key), ("error", self.error)) if which is not None}

    @property
    def active(self) -> bool:
        """Whether anything is routed now; otherwise this is GRPO."""
        return self.kl > 0 and self.fade > 0

    def begin(self, at: Moment) -> None:
        super().begin(at)
        if self.kl == 0:
            return
        if self.sync is not None and isinstance(at.players.get("hinted"), AdapterOff):
            raise ValueError(
                f"schedule.sync={self.sync} copies the student's weights, which adapters (train.lora) do not allow: "
                "set schedule.sync=null, and the target stays the model without them"
            )
        if isinstance(annotator(self.annotator, model=self.annotator_model, timeout=self.timeout), Rule):
            problem = at.task.train[0]
            try:
                sum_terms(problem.messages[-1]["content"])
            except ValueError as error:
                raise ValueError(
                    f"source.annotator='rule' reads sums worked out step by step, as in embedded:arithmetic; "
                    f"task={at.task.name!r}: {error}; use model, an endpoint, or a function of your own"
                ) from error

    def players(self) -> dict[str, Any]:
        return {"hinted": INITIAL if self.kl > 0 else None}

    def readers(self) -> list[Reader]:
        return [self._reader()] if self.active else []

    def targets(self) -> dict[str, Target]:
        return {"hinted": self._target()} if self.active else {}

    def _reader(self) -> Reader:
        who = annotator(self.annotator, model=self.annotator_model, timeout=self.timeout)
        return readers.spans(who, cap=self.cap, right=self.key is not None, wrong=self.error is not None)

    def _target(self) -> Target:
        return targets.reading("hinted", hint="label", template=self.template)

    def weight(self, step: Batch) -> dict[str, Tensor]:
        rollout, accuracy = step.rollout, step.rollout.rewards["accuracy"]
        reward = self.reward(rollout)
        trained = step["scored"] & ~reward.isnan()[:, None]
        columns = self.shown(rollout, reward) | {
            "advantage": self.advantage(reward, rollout)[:, None] * step["scored"],
            "trained": trained,
            "rest": torch.ones_like(trained, dtype=torch.float32),
        }
        if self.active:
            marked = readers.marked(rollout) & trained
            rows = {"key": accuracy >= 1, "error": accuracy < 1}
            for name in self.routes:
                spans = columns[name] = marked & rows[name][:, None]
                columns["rest"] = columns["rest"] - self.fade * spans
                columns[f"rollout/{name}"] = spans.float()
        return columns

    def signal(self, batch: Batch) -> list[Term]:
        per = self.per_row(batch)
        terms = [self.surrogate(batch, self.advantage_in_words(), weight="rest", coefficient=per)]
        for name, which in self.routes.items() if self.active else ():
            terms.append(
                match(
                    which,
                    batch,
                    target="hinted",
                    clip_terms=self.clip_terms,
                    name=name,
                    weight=name,
                    over="trained",
                    coefficient=self.kl * self.fade * per,
                )
            )
        return terms

    def schedule(self) -> list[Controller]:
        return [Ramp("weight.fade", self.fade, 0.0, steps=self.decay, hold=self.hold)] if self.decay is not None else []

    def after(self, step: int) -> list[Copy]:
        return [Copy("student", "hinted")] if self.active and self.sync is not None and step % self.sync == 0 else []
