"""A step on made-up text before anything is loaded: it finds what cannot work, and says the objective in words."""

from dataclasses import replace
from typing import get_args

import torch

from kullback.divergence import divergence
from kullback.lm.batch import Batch, base_columns
from kullback.lm.engine import with_fields
from kullback.lm.method import Method
from kullback.lm.predictions import LogitPredictions
from kullback.lm.rollout import Origin, Rollout, build_rollout
from kullback.run.controllers import Controller, Ramp
from kullback.run.terms import Mean, Term, denominator, numerator

ROWS, TOKENS, VOCAB = 4, 8, 11


def rehearse(method: Method, controllers: tuple[Controller, ...] = ()) -> list[Term]:
    """Run `weight` and `signal` on four rows of eight tokens with random predictions; return the terms.

    Raises:
        ValueError: the objective cannot run, is not finite, trains nothing, or has a setting without effect.
    """
    if method.aggregate not in get_args(Mean) or method.aggregate == "weight":
        raise ValueError(f"weight.aggregate={method.aggregate!r} is not known: write token, row or row_sum")
    _check_fields(method, controllers)
    for end in _ends(method, controllers):
        _terms(end, may_idle=True)  # a ramp from 0 trains nothing at first
    return _terms(method)


def _ends(method: Method, controllers: tuple[Controller, ...]) -> list[Method]:
    """The method with the fields that its controllers write first, and that its ramps write last."""
    every = [*method.schedule(), *controllers]
    first = {name: value for controller in every for name, value in controller.start()[1].items()}
    last = {name: ramp.last for ramp in every if isinstance(ramp, Ramp) for name in ramp.writes}
    return [with_fields(method, values) for values in (first, first | last) if values]


def _terms(method: Method, may_idle: bool = False) -> list[Term]:
    """The terms on the made-up step, checked."""
    draw = torch.Generator().manual_seed(0)
    rollout = method.source().rehearse(_made_up_rows(method, draw))
    for reader in method.readers():
        rollout = reader.rehearse(rollout)
    step = Batch(
        rollout, base_columns(rollout), aggregate=method.aggregate, sampling_temperature=method.sampling_temperature
    )
    columns = dict(step.columns) | {score: _made_up_score(score, rollout, draw) for score in method.scores}
    step = replace(step, columns=columns)
    made = method.weight(step)
    step = replace(step, columns=columns | made)

    scored = rollout.scored
    logits = torch.randn(int(scored.sum()), VOCAB, generator=draw).requires_grad_()
    other = torch.randn(len(logits), VOCAB, generator=draw)
    tokens = rollout.completions[scored]
    targets = {
        name: target.rehearse(LogitPredictions(scored, tokens, other)) for name, target in method.targets().items()
    }
    predictions = LogitPredictions(scored, tokens, logits)
    parts = {name: predictions.grid(logits[:, 0]) for name in method.parts()}
    terms = method.signal(replace(step, predictions=predictions, targets=targets, parts=parts))
    if not terms:
        raise ValueError(f"{type(method).__name__}.signal returns no term: there is nothing to minimise")
    loss = torch.zeros(())
    for index, term in enumerate(terms):
        terms[index] = term = replace(term, mean=term.mean or method.aggregate)
        count = denominator(step.columns, *term.key)
        if not term.value.requires_grad:
            raise ValueError(f"term {term.name!r} has no gradient in the student: its value must come from batch.model")
        loss = loss + term.coefficient * numerator(term, step.columns) / count.clamp(min=1e-30)
    if not loss.isfinite():
        raise ValueError(
            f"the objective is {float(loss)} on random predictions: {'; '.join(term.says for term in terms)}"
        )
    (gradient,) = torch.autograd.grad(loss, logits)
    if not gradient.isfinite().all():
        raise ValueError(
            f"the objective's gradient is not finite on random predictions: {'; '.join(term.says for term in terms)}"
        )
    if float(gradient.abs().max()) == 0.0 and not may_idle:
        raise ValueError(
            "the objective's gradient is zero: with these settings nothing would be trained; raise a coefficient"
        )
    return terms


def objective(method: Method, terms: list[Term], controllers: tuple[Controller, ...] = ()) -> str:
    """The objective in words and symbols, a line for each part."""
    symbols = " + ".join(
        f"{term.coefficient:g} * {term.name}" if term.coefficient != 1 else term.name for term in terms
    )
    lines = [f"minimise   {symbols}"]
    for term in terms:
        says = term.says or "a term of the method's own"
        lines.append(f"{term.name}: {says}; {term.averaged}")
    lines.append(f"on         {method.source().says}")
    for name, target in method.targets().items():
        says = target.says if target.says.startswith(name) else f"{name}: {target.says}"
        lines.append(f"target     {says}; frozen, no gradient")
    for controller in [*method.schedule(), *controllers]:
        reads = f"reads {', '.join(controller.reads)}" if controller.reads else "reads nothing"
        lines.append(f"schedule   {controller} writes {', '.join(controller.writes)}, {reads}")
    return "\n".join(lines)


def _check_fields(method: Method, controllers: tuple[Controller, ...]) -> None:
    source = method.source()
    if method.samples < 1 or method.max_prompt < 1 or method.max_completion < 1:
        raise ValueError(
            "source.samples, max_prompt and max_completion must be at least 1, "
            f"got {method.samples}, {method.max_prompt}, {method.max_completion}"
        )
    if source.writes == {Origin.DATASET} and method.samples != 1:
        raise ValueError(f"source.samples={method.samples} would do nothing: all text is the data set's; set it to 1")
    if source.writes == {Origin.DATASET} and method.sampling_temperature != 1:
        raise ValueError(
            f"source.sampling_temperature={method.sampling_temperature:g} would do nothing: no model writes text here"
        )
    if method.sampling_temperature < 0:
        raise ValueError(f"source.sampling_temperature={method.sampling_temperature:g} must be at least 0")
    known = {f"{field.metadata['question']}.{name}" for name, field in type(method).__dataclass_fields__.items()}
    for controller in [*method.schedule(), *controllers]:
        for name in controller.writes:
            if name not in known:
                raise ValueError(f"schedule.{name}: this method has no such field; it has {', '.join(sorted(known))}")


def _made_up_rows(method: Method, draw: torch.Generator) -> Rollout:
    writers = sorted(method.source().writes)
    completions = torch.randint(VOCAB, (ROWS, TOKENS), generator=draw).tolist()
    lengths = [TOKENS, TOKENS - 3, TOKENS, TOKENS - 1]
    return build_rollout(
        [[1, 2, 3]] * ROWS,
        [row[:length] for row, length in zip(completions, lengths, strict=True)],
        [[int(writers[i % len(writers)])] * length for i, length in enumerate(lengths)],
        log_probs=[[-1.0] * length for length in lengths],
        group=[0, 0, 1, 1],
        rewards=[{"accuracy": float(i % 2)} for i in range(ROWS)],
        notes=[{"problem_id": str(i // 2), "messages": [], "source": "made up"} for i in range(ROWS)],
    )


def _made_up_score(score: str, rollout: Rollout, draw: torch.Generator) -> torch.Tensor:
    kind, _, names = score.partition(":")
    if kind not in ("log_prob", "entropy", "value"):
        divergence(kind)
        if names.count(",") != 1:
            raise ValueError(
                f"score {score!r}: a divergence is between two players, target first: '{kind}:teacher,student'"
            )
    numbers = torch.rand(rollout.completions.shape, generator=draw)
    return torch.where(rollout.scored, -numbers if kind == "log_prob" else numbers, 0.0)
