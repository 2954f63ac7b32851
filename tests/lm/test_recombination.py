"""Parts recombine: sources, targets, divergences, routes, weights and schedules of any method, drawn at random.

What is accepted takes two steps with finite loss and gradients, and says in words what it minimises; what is refused is
refused by the rehearsal, with a reason, before a model is asked for anything.
"""

import random
from collections import Counter
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, final

import pytest
import torch
from torch import Tensor

import kullback as kb
from kullback.lm import Batch, Method, answer, match, policy, sampling, sources, targets
from kullback.lm.advantages import group_advantage, shaped_reward
from kullback.lm.engine import Engine
from kullback.lm.rehearse import objective, rehearse
from kullback.lm.weights import leave_one_out, suffix_sum
from kullback.run.controllers import Controller, parse_schedule
from kullback.run.terms import MEANS, Term
from tests.lm.small import make_moment

ACCEPTED, LEAST = 200, 5

SOURCES = {
    "dataset": lambda m: sources.dataset(),
    "student": lambda m: sources.student(),
    "teacher": lambda m: sources.teacher(),
    "teacher with a system prompt": lambda m: sources.teacher(system="be terse"),
    "mixture": lambda m: sources.mix((0.5, sources.student()), (0.5, sources.dataset())),
    "three": lambda m: sources.mix((0.4, sources.student()), (0.3, sources.teacher()), (0.3, sources.dataset())),
    "redrawn": lambda m: sampling.informative(sources.student(), reward=m.reward, turns=1),
}
TARGETS: dict[str, Any] = {
    "teacher": lambda: targets.frozen("teacher"),
    "teacher with a system prompt": lambda: targets.frozen("teacher", system="be terse"),
    "top 5": lambda: targets.frozen("teacher", top_k=5),
    "reference": lambda: targets.frozen("reference"),
}
DIVERGENCES = [*kb.divergences(), "unit(jsd(0.2))", "0.7*forward_kl + 0.3*reverse_kl", "skew(reverse_kl, 0.1)"]
SIGNALS = ("pathwise", "link", "squared", "ratio", "policy", "cross-entropy", "match and policy")
WEIGHTS = ("none", "entropy", "distance", "advantage sign", "position", "row")
AGGREGATES = ("token", "row", "row_sum", "weight")
SCHEDULES = {
    "none": None,
    "coefficient": ("signal.coefficient", "linear(1.0 -> 0.5, steps=2)"),
    "temperature": ("signal.temperature", "linear(2.0 -> 1.0, steps=2)"),
    "completion": ("source.max_completion", "linear(6 -> 10, steps=2)"),
}


@final
@dataclass(frozen=True, kw_only=True)
class Recombined(Method):
    """One answer to each question, each by name."""

    text: str = answer("source")
    seen: str = answer("target")
    divergence: str = answer("signal")
    through: str = answer("signal")
    coefficient: float = answer("signal", 1.0)
    temperature: float = answer("signal", 1.0)
    counts: str = answer("weight", "none")

    def reward(self, rollout: Any) -> Tensor:
        return shaped_reward(rollout.rewards, {"accuracy": 1.0, "finished": 0.5})

    @property
    def scores(self) -> tuple[str, ...]:
        wanted = {"entropy": ("entropy:student",), "distance": ("squared_hellinger:reference,student",)}
        return wanted.get(self.counts, ()) + (("log_prob:student",) if "policy" in self.through else ())

    def players(self) -> dict[str, Any]:
        return {"teacher": "given", "reference": "initial"}

    def source(self) -> sources.Source:
        return SOURCES[self.text](self)

    def targets(self) -> dict[str, targets.Target]:
        return {"seen": TARGETS[self.seen]()}

    def weight(self, step: Batch) -> dict[str, Tensor]:
        length = step["scored"].float()
        reward = torch.nan_to_num(step.rollout.rewards.get("accuracy", torch.zeros(len(length))))
        reward = reward + torch.linspace(0, 1, len(reward))  # never equal
        made = {"advantage": group_advantage(reward, torch.zeros_like(step.rollout.group))}
        if self.counts == "entropy":
            made["counts"] = step["entropy:student"].clamp(min=0) + 0.1
        elif self.counts == "distance":
            made["counts"] = step["squared_hellinger:reference,student"].clamp(min=0) + 0.1
        elif self.counts == "advantage sign":
            made["counts"] = (1 + leave_one_out(reward, step.rollout.group)[:, None].abs()) * length
        elif self.counts == "position":
            made["counts"] = suffix_sum(length)
        elif self.counts == "row":
            made["counts"] = torch.linspace(0.5, 1.5, len(length))[:, None] * length
        return made

    def signal(self, batch: Batch) -> list[Term]:
        weight = None if self.counts == "none" else "counts"
        mean = "weight" if self.aggregate == "token" and weight else None  # type: ignore[comparison-overlap]
        shared: dict[str, Any] = {"weight": weight, "mean": mean, "coefficient": self.coefficient}
        gradient = policy(batch, **shared)
        if self.through == "policy":
            return [gradient]
        if self.through == "cross-entropy":
            return [Term("nll", -batch.model.log_probs(), says="negative log-likelihood", **shared)]
        route: Any = "pathwise" if "match" in self.through else self.through
        term = match(self.divergence, batch, target="seen", route=route, temperature=self.temperature, **shared)
        return [term, gradient] if "match" in self.through else [term]


def drawn(draw: random.Random) -> tuple[Recombined, tuple[Controller, ...], dict[str, str]]:
    """A method, its controllers, and the parts by name."""
    parts = {
        "source": draw.choice(list(SOURCES)),
        "target": draw.choice(list(TARGETS)),
        "divergence": draw.choice(DIVERGENCES),
        "signal": draw.choice(SIGNALS),
        "weight": draw.choice(WEIGHTS),
        "aggregate": draw.choice(AGGREGATES),
        "schedule": draw.choice(list(SCHEDULES)),
    }
    chosen = SCHEDULES[parts["schedule"]]
    method = Recombined(
        text=parts["source"],
        seen=parts["target"],
        divergence=parts["divergence"],
        through=parts["signal"],
        counts=parts["weight"],
        aggregate=parts["aggregate"],  # type: ignore[arg-type]
        samples=draw.choice((1, 2)),
        temperature=draw.choice((1.0, 1.0, 2.0)),
        max_completion=60 if parts["source"] in ("dataset", "mixture", "three") else 8,
    )
    return method, () if chosen is None else (parse_schedule(*chosen),), parts


def test_random_recombinations_run_or_are_refused_with_a_reason() -> None:
    draw = random.Random(0)
    accepted: Counter[tuple[str, str]] = Counter()
    refused: Counter[str] = Counter()
    for trial in count():
        if sum(n for (question, _), n in accepted.items() if question == "source") >= ACCEPTED:
            break
        assert trial < 10 * ACCEPTED, f"too few combinations are possible: {refused.most_common(5)}"
        method, controllers, parts = drawn(draw)
        try:
            terms = rehearse(method, controllers)
        except ValueError as error:
            refused[str(error)] += 1
            continue
        accepted.update(parts.items())
        says_what_it_does(method, terms, controllers, parts)
        takes_two_steps(method, controllers, parts)
    every = {
        "source": SOURCES, "target": TARGETS, "divergence": DIVERGENCES, "signal": SIGNALS, "weight": WEIGHTS,
        "aggregate": [a for a in AGGREGATES if a != "weight"], "schedule": SCHEDULES,
    }  # fmt: skip
    rare = {(q, name): accepted[q, name] for q, names in every.items() for name in names if accepted[q, name] < LEAST}
    assert not rare, rare
    assert all(len(reason) > 30 and "\n" not in reason for reason in refused), refused
    assert len(refused) >= 5, refused  # text of others, temperatures, top-k baselines, weights, samples


def says_what_it_does(method: Recombined, terms: list[Term], controllers: Any, parts: dict[str, str]) -> None:
    words = objective(method, terms, controllers)
    assert method.source().says in words
    assert method.targets()["seen"].says in words
    if parts["signal"] in ("pathwise", "link", "squared", "ratio", "match and policy"):
        assert str(kb.divergence(method.divergence)) in words
    if parts["signal"] in ("pathwise", "match and policy"):
        assert f"T = {method.temperature:g}" in words
    for term in terms:
        assert term.mean is not None
        assert MEANS[term.mean].format(over=f"{term.over} tokens", weight=term.weight) in words
    if parts["schedule"] != "none":
        assert SCHEDULES[parts["schedule"]][0] in words  # type: ignore[index]


def takes_two_steps(method: Recombined, controllers: Any, parts: dict[str, str]) -> None:
    at = make_moment(method)
    at.prompts_per_step = 3
    engine = Engine(method, at, micro_batches=2, controllers=controllers)
    student = at.model("student")
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    for update in range(2):
        optimizer.zero_grad()
        for micro in engine.prepare(update):
            loss = engine.loss(micro)
            assert loss.isfinite(), parts
            loss.backward()
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        assert all(bool(gradient.isfinite().all()) for gradient in gradients), parts
        optimizer.step()
        assert all(value == value for name, value in engine.metrics().items() if name.startswith("term/")), parts


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text": "dataset", "through": "link"}, "somebody else's"),
        ({"text": "dataset", "samples": 2}, "would do nothing"),
        ({"seen": "top 5", "temperature": 2.0}, "cannot soften"),
        ({"text": "student", "through": "squared", "temperature": 2.0}, "need 1"),
        ({"aggregate": "weight"}, "is not known"),
        ({"divergence": "jsd(0)"}, "zero for every pair"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(changes: dict[str, Any], reason: str) -> None:
    method = Recombined(text="student", seen="teacher", divergence="jsd", through="pathwise")
    with pytest.raises(ValueError, match=reason):
        rehearse(replace(method, **changes))
