"""Which divergence, through which gradient: the two helpers that write most signals.

With l = log target - log model, f the value and g the link of a divergence (ENGINE section 4):

    pathwise   differentiate D over the vocabulary at each prefix; right on anyone's text
    link       detached (baseline - g) times log model: a reward of -g; right on text the student wrote
    squared    a surrogate s(l) with ds / d log model = g - g(0); right on text the student wrote
"""

import re
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence import FDivergence, divergence
from kullback.lm.batch import Batch
from kullback.lm.predictions import FullPredictions, HiddenPredictions, Predictions, TopKPredictions, over_vocabulary
from kullback.lm.rollout import Origin
from kullback.run.terms import Mean, Term, multipliers

Route = Literal["pathwise", "link", "squared"]
Tail = Literal["bucket", "drop", "renormalise"]


def match(
    which: str | FDivergence,
    batch: Batch,
    *,
    target: str = "teacher",
    route: Route = "pathwise",
    temperature: float = 1.0,
    tail: Tail = "bucket",
    baseline: Literal["exact", "none"] | int = "exact",
    clip: tuple[float, float] | None = None,
    name: str | None = None,
    weight: str | None = None,
    over: str = "scored",
    mean: Mean | None = None,
    coefficient: float = 1.0,
) -> Term:
    """A divergence of the model from a target, per scored token, by any route and from any kind of target.

    Args:
        which: a name that `kb.divergence` parses, or a divergence.
        target: which of the method's targets.
        route: through what the gradient flows.
        temperature: divides both logits (pathwise only). The value is not multiplied by temperature ** 2.
        tail: what a top-k target says of the tokens it does not name (pathwise only).
        baseline: of the link route. "exact" subtracts E_model[-g] over the vocabulary, a number k its estimate from the
            student's k likeliest tokens, "none" nothing; all have the same expectation (card 05).
        clip: of the link route: PPO's limits on the ratio to the policy that wrote, below and above 1.
        name, weight, over, mean, coefficient: of the term.

    Raises:
        ValueError: the route has no right gradient on this text, or the target's kind does not serve it.
    """
    D = divergence(which)
    wanted = batch.targets.get(target)
    if wanted is None:
        raise ValueError(f"target={target!r} is not one of this method's: {', '.join(batch.targets) or 'it has none'}")
    mean = mean or batch.aggregate
    mask = batch[over].bool()
    model, wanted = batch.model.where(mask), wanted.where(mask)
    term = Term(name or f"match/{target}", torch.empty(0), weight, over, mean, coefficient)
    words = f"{D} = {_equation(D, target)}, {_scale(D)}"
    if route == "pathwise":
        weights = multipliers(batch.columns, over, mean, weight)[0][mask]
        value = pathwise(D, wanted, model, temperature=temperature, tail=tail, token_weight=weights)
        support = f"top-{wanted.top_k.k} + {tail}" if isinstance(wanted, TopKPredictions) else "full vocabulary"
        says = f"{words}, T = {temperature:g}; value: exact, {support}; gradient: pathwise, at fixed prefixes"
        return replace(term, value=model.grid(value), says=says)

    _need_own_text(batch, mask, route)
    if batch.sampling_temperature != 1.0:
        raise ValueError(
            f"signal.route={route!r} is right only for tokens drawn from the student itself: "
            f"source.sampling_temperature={batch.sampling_temperature:g} draws from another distribution; "
            "set it to 1, or use route=pathwise"
        )
    if temperature != 1.0:
        raise ValueError(
            f"signal.temperature={temperature:g}: route={route!r} works on log-probabilities of sampled tokens, "
            "which need 1"
        )
    model_log_prob, target_log_prob = model.token_log_probs(), wanted.token_log_probs()
    shown = model.grid(D.sampled(target_log_prob, model_log_prob.detach(), drawn_from="model"))
    if route == "squared":
        value = D.surrogate(target_log_prob, model_log_prob, route="squared", drawn_from="model")
        says = f"{words}; value: f at the sampled tokens, unbiased; gradient: squared, through the sampled tokens"
        return replace(term, value=model.grid(value), shown=shown, says=says)
    reward = -D.link(target_log_prob - model_log_prob.detach()) + expected_link(D, wanted, model, baseline)
    surrogate = policy(
        batch,
        advantage=model.grid(reward),
        log_probs=model.grid(model_log_prob),
        clip=clip,
        name=term.name,
        weight=weight,
        over=over,
        mean=mean,
    )
    kind = {"exact": "exact baseline", "none": "no baseline"}.get(
        str(baseline), f"baseline from the student's top {baseline}"
    )
    return replace(
        surrogate,
        coefficient=coefficient,
        shown=shown,
        says=f"{words}; value: f at the sampled tokens, unbiased; "
        f"gradient: link as a reward of the sampled tokens, {kind}",
    )


def policy(
    batch: Batch,
    *,
    advantage: str | Float[Tensor, "row completion"] = "advantage",
    log_probs: Float[Tensor, "row completion"] | None = None,
    clip: tuple[float, float] | None = (0.2, 0.2),
    name: str = "policy",
    weight: str | None = None,
    over: str = "scored",
    mean: Mean | None = None,
    coefficient: float = 1.0,
) -> Term:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), ratio = model / the policy that wrote.

    The old policy is the column "log_prob:student" where the method scores it, else the model itself, detached: then
    the ratio is 1 and its gradient that of A log model. A is detached.
    """
    A = (batch[advantage] if isinstance(advantage, str) else advantage).detach()
    A = A[:, None] if A.dim() == 1 else A
    new = batch.model.log_probs() if log_probs is None else log_probs
    old = batch.columns.get("log_prob:student", new).detach()
    ratio = (new - old).exp()
    value = -ratio * A
    says = "policy gradient"
    if clip is not None:
        low, high = clip
        value = torch.maximum(value, -ratio.clamp(1 - low, 1 + high) * A)
        says += f", ratio clipped to [{1 - low:g}, {1 + high:g}]"
    mean = mean or batch.aggregate
    return Term(name, value, weight, over, mean, coefficient, says=says)


def pathwise(
    D: FDivergence,
    target: Predictions,
    model: Predictions,
    *,
    temperature: float = 1.0,
    tail: Tail = "bucket",
    token_weight: Float[Tensor, "scored"] | None = None,
) -> Float[Tensor, "scored"]:
    """D at each scored position, differentiable in the model, whatever kind each side is.

    Raises:
        ValueError: the target knows only the written tokens, which determine no divergence over the vocabulary.
    """
    if isinstance(target, TopKPredictions):
        if temperature != 1:
            raise ValueError(
                f"signal.temperature={temperature:g} cannot soften a target of which only "
                f"target.top_k={target.top_k.k} tokens are known: set it to 1, or leave target.top_k out"
            )
        if isinstance(model, HiddenPredictions):
            head = model.head
            return D.linear_topk(
                target.top_k, model.hidden, head.matrix, model_bias=head.bias, model_logit_scale=head.scale,
                model_softcap=head.softcap, temperature=temperature, tail=tail, token_weight=token_weight,
            )  # fmt: skip
        assert isinstance(model, FullPredictions)
        return D.topk(target.top_k, model.logits_of(slice(None)), tail=tail, temperature=temperature)
    if not isinstance(target, FullPredictions) or not isinstance(model, FullPredictions):
        raise ValueError(
            f"route='pathwise' needs the target's vocabulary at each prefix, but its predictions are {target.kind!r}: "
            "use route='link', or a target with logits or top_k"
        )
    if isinstance(target, HiddenPredictions) and isinstance(model, HiddenPredictions):
        theirs, ours = target.head, model.head
        return D.linear(
            target.hidden, theirs.matrix, model.hidden, ours.matrix, target_bias=theirs.bias, model_bias=ours.bias,
            target_logit_scale=theirs.scale, model_logit_scale=ours.scale,
            target_softcap=theirs.softcap, model_softcap=ours.softcap,
            temperature=temperature, token_weight=token_weight, pad_vocab=True,
        )  # fmt: skip
    return D.categorical(
        target.logits_of(slice(None)), model.logits_of(slice(None)), temperature=temperature, pad_vocab=True
    )


@torch.no_grad()
def expected_link(
    D: FDivergence, target: Predictions, model: Predictions, baseline: Literal["exact", "none"] | int
) -> Float[Tensor, "scored"] | float:
    """E_model[g] at each position: over the vocabulary, over the model's k likeliest tokens renormalised, or 0."""
    if baseline == "none":
        return 0.0
    if not isinstance(model, FullPredictions) or not isinstance(target, FullPredictions):
        raise ValueError(
            f"signal.baseline={baseline!r} needs the teacher's probabilities of the student's tokens, "
            f"which its {target.kind!r} predictions do not have: set signal.baseline=none, or leave target.top_k out"
        )
    if baseline == "exact":
        return over_vocabulary(lambda theirs, ours, _: D.expected_link(theirs, ours), target, model)
    if isinstance(baseline, str) or baseline < 1:
        raise ValueError(
            f"signal.baseline={baseline!r}: write exact, none, or how many of the student's likeliest tokens to use"
        )
    top = model.top(baseline)
    return D.topk_expected_link(target.gather(top.token_ids), top.log_probs)


def _need_own_text(batch: Batch, mask: Tensor, route: str) -> None:
    foreign = int((mask & (batch.rollout.origin != Origin.STUDENT)).sum())
    if foreign:
        raise ValueError(
            f"signal.route={route!r} is right only for tokens the student sampled, "
            f"but {foreign} of {int(mask.sum())} scored tokens are somebody else's: "
            "use route=pathwise, or source.student_fraction=1"
        )


def _equation(D: FDivergence, target: str) -> str:
    """The divergence in the names of this objective."""
    return re.sub(r"\bmodel\b", "student", re.sub(r"\btarget\b", target, D.equation))


def _scale(D: FDivergence) -> str:
    curvature = D.second_derivative_at_one
    if not D.smooth:
        return "no second derivative at equality"
    return "unit scale (f''(1) = 1)" if abs(curvature - 1) < 1e-9 else f"textbook scale (f''(1) = {curvature:g})"
