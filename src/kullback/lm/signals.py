"""Which divergence, through which gradient: the two helpers that write most signals.

With l = log target - log model, f the value and g the link of a divergence (ENGINE section 4):

    pathwise   differentiate D over the vocabulary at each prefix; right on anyone's text
    link       detached (baseline - g) times log model: a reward of -g; right on text the student wrote
    squared    a surrogate s(l) with ds / d log model = g - g(0); right on text the student wrote
    ratio      f(l) times the live ratio of the model to the policy that wrote; right on text the student wrote

From the second pass over a draw the text is an older student's; the sampled routes are then weighted by the ratio.
"""

import re
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence import FDivergence, divergence
from kullback.lm.advantages import MAX_LOG_RATIO, Level
from kullback.lm.batch import Batch
from kullback.lm.predictions import FullPredictions, HiddenPredictions, Predictions, TopKPredictions, over_vocabulary
from kullback.lm.rollout import Origin
from kullback.run.terms import Mean, Term, multipliers

Route = Literal["pathwise", "link", "squared", "ratio"]
Tail = Literal["bucket", "drop", "renormalise"]

LOSS, REWARD = "route=squared (form=loss)", "route=link (form=reward)"
ESTIMATORS = {  # an estimate of a value, used as a loss or as a reward: its expected gradient, and what to write
    "k1_loss": f"the expected gradient of k1 as a loss is zero: write {LOSS} with divergence=reverse_kl",
    "k2_loss": f"k2 as a loss is right for reverse KL: write {LOSS} with divergence=reverse_kl, which is the same",
    "k3_loss": "the expected gradient of k3 as a loss is that of forward KL, KL(reference || model), not of the "
    f"reverse KL it estimates: write {LOSS} with divergence=forward_kl for the same numbers, or with reverse_kl for "
    "what was meant (route=ratio, form=ratio, if k3 is multiplied by the live ratio)",
    "k1_reward": f"k1 as a reward is right for reverse KL: write {REWARD} with divergence=reverse_kl, the same thing",
    "k2_reward": f"k2 as a reward has the gradient of no divergence: write {REWARD} with the divergence you mean",
    "k3_reward": "k3 as a reward has the gradient of reverse KL minus that of forward KL: "
    f"write {REWARD} with divergence=reverse_kl",
    "value_loss": "the value as a loss has another expected gradient than the divergence (zero for k1, reversed for "
    f"the plain Hellinger): write {LOSS} or {REWARD}",
    "value_reward": "minus the value as a reward has another expected gradient than the divergence, reversed for most: "
    f"write {REWARD}, whose reward is minus the link",
}


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
    corrected: bool = True,
    clip_terms: float | None = None,
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
        corrected: weigh the squared route by the (detached) ratio to the policy that wrote, where "log_prob:student" is
            scored; without it the gradient is right in the first pass over a draw only.
        clip_terms: no entry of the sum over the vocabulary counts more than this many nats (`clipped_sum`).
        name, weight, over, mean, coefficient: of the term.

    Raises:
        ValueError: the route has no right gradient on this text, or the target's kind does not serve it.
    """
    D = divergence(which)
    refuse_estimator(route, "signal.route")
    wanted = batch.targets.get(target)
    if wanted is None:
        raise ValueError(f"target={target!r} is not one of this method's: {', '.join(batch.targets) or 'it has none'}")
    mean = mean or batch.aggregate
    mask = batch[over].bool()
    model, wanted = batch.model.where(mask), wanted.where(mask)
    term = Term(name or f"match/{target}", torch.empty(0), weight, over, mean, coefficient)
    words = f"{D} = {_equation(D, target)}, {_scale(D)}"
    if route == "pathwise":
        weights = multipliers(batch.columns, over, mean, weight)[0]
        mask = wanted.scored & (weights != 0)  # what is not known or counts nothing costs nothing
        model, wanted, weights = model.where(mask), wanted.where(mask), weights[mask]
        if clip_terms is not None:
            value, cut = clipped_sum(D, wanted, model, clip_terms, temperature=temperature)
            term = replace(term, seen={"clipped": model.grid(cut)}, seen_over=weight)
            words += f", each term of its plain sum at most {clip_terms:g} nats"
        else:
            value = pathwise(D, wanted, model, temperature=temperature, tail=tail, token_weight=weights)
        support = f"top-{wanted.top_k.k} + {tail}" if isinstance(wanted, TopKPredictions) else "full vocabulary"
        says = f"{words}, T = {temperature:g}; value: exact, {support}; gradient: pathwise, at fixed prefixes"
        return replace(term, value=model.grid(value), says=says)

    if clip_terms is not None:
        raise ValueError(
            f"signal.clip_terms={clip_terms:g} cuts a sum over the vocabulary, which route={route!r} does not take"
        )
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
    if route == "ratio":
        ratio = _log_ratio(model.grid(model_log_prob).detach(), batch, mask).exp()
        pull = model.grid(
            D.link(target_log_prob - model_log_prob.detach()) * (model_log_prob - model_log_prob.detach())
        )
        says = f"{words}; value and gradient: f at the sampled tokens times the live ratio, unbiased"
        return replace(term, value=ratio * (shown + pull), says=says)  # d (ratio f) = ratio (f - u f') d log model
    if route == "squared":
        value = model.grid(D.surrogate(target_log_prob, model_log_prob, route="squared", drawn_from="model"))
        if corrected and "log_prob:student" in batch.columns:
            ratio = _log_ratio(model.grid(model_log_prob).detach(), batch, mask).exp()
            value, shown = value * ratio, shown * ratio
        says = f"{words}; value: f at the sampled tokens, unbiased; gradient: squared, through the sampled tokens"
        return replace(term, value=value, shown=shown, says=says)
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
    dual: float | None = None,
    level: Level = "token",
    name: str = "policy",
    weight: str | None = None,
    over: str = "scored",
    mean: Mean | None = None,
    coefficient: float = 1.0,
) -> Term:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), ratio = model / the policy that wrote.

    The old policy is the column "log_prob:student" where the method scores it, else the model itself, detached: then
    the ratio is 1 and its gradient that of A log model. A is detached; log-ratios are cut at 20 nats.

    Args:
        advantage: a column, or numbers; per row or per token.
        log_probs: of the written tokens, with gradient; None reads them from the model.
        clip: how far below and above 1 the ratio is followed; a larger `high` is DAPO's clip-higher.
        dual: where A < 0 the value stops at dual * |A|, so that one token that became much likelier cannot own the
            gradient (arXiv 1912.09729, equation 5; TRL's `delta`).
        level: "token", or "sequence": the ratio of a row is the geometric mean of its tokens', and clipped as a whole
            (GSPO-token, arXiv 2507.18071, equation 13; with one A per row it is GSPO).

    The metrics show, where the old policy is scored, the clipped share, the mean ratio and KL(old || model) by k3.
    """
    mask = batch[over].bool()
    A = (batch[advantage] if isinstance(advantage, str) else advantage).detach()
    A = torch.where(mask, A[:, None] if A.dim() == 1 else A, 0.0)
    new = batch.model.log_probs() if log_probs is None else log_probs
    log_ratio = _log_ratio(new, batch, mask)
    if level == "sequence":
        mean_log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = mean_log_ratio.detach() + log_ratio - log_ratio.detach()
    ratio = log_ratio.exp()
    value = plain = -ratio * A
    says = "policy gradient" + (", one ratio per row" if level == "sequence" else "")
    if clip is not None:
        low, high = clip
        value = torch.maximum(value, -ratio.clamp(1 - low, 1 + high) * A)
        says += f", ratio clipped to [{1 - low:g}, {1 + high:g}]"
    if dual is not None:
        value = torch.where(A < 0, torch.minimum(value, -dual * A), value)
        says += f", at most {dual:g} |A| where A < 0"
    seen = {}
    if "log_prob:student" in batch.columns:
        seen["ratio"] = ratio.detach()
        seen["old_kl"] = (ratio - 1 - log_ratio).detach()
        if clip is not None or dual is not None:
            seen["clipped"] = (value != plain).detach()
    return Term(name, value, weight, over, mean or batch.aggregate, coefficient, says=says, seen=seen)


def refuse_estimator(name: str, field: str) -> None:
    """Answer names of estimators that are asked for as a loss or a reward.

    Raises:
        ValueError: with the expected gradient, and what to write instead.
    """
    if name in ESTIMATORS:
        raise ValueError(f"{field}={name!r}: {ESTIMATORS[name]}")
    if name in ("k1", "k2", "k3", "value"):
        both = "; ".join(f"as a {use}, {ESTIMATORS[f'{name}_{use}']}" for use in ("loss", "reward"))
        raise ValueError(f"{field}={name!r} names an estimate of a value, not of a gradient: {both}")


def _log_ratio(new: Float[Tensor, "row completion"], batch: Batch, mask: Tensor) -> Float[Tensor, "row completion"]:
    """log of model / the policy that wrote; 0 where the latter is not scored or the mask is not set."""
    old = batch.columns.get("log_prob:student", new).detach()
    return torch.where(mask, new - old, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


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


def clipped_sum(
    D: FDivergence, target: Predictions, model: Predictions, limit: float, *, temperature: float = 1.0
) -> tuple[Float[Tensor, "scored"], Float[Tensor, "scored"]]:
    """sum_v min(term_v, limit) in nats, and at how many v the limit is felt.

        forward KL: term_v = q_v log(q_v / p_v),    reverse KL: term_v = p_v log(p_v / q_v),    q target, p model

    The plain forms, whose terms may be negative and are then kept: the sum may be below 0 and its minimum elsewhere
    than at p = q. A clipped term has no gradient, so of forward KL the tokens that lack most are pushed down: with U
    the entries left and Q their mass under q the gradient in the logits is p_v Q - q_v 1[v in U].

    Raises:
        ValueError: another divergence, or a target that is not known over the whole vocabulary.
    """
    if str(D) not in ("forward_kl", "reverse_kl"):
        raise ValueError(f"signal.clip_terms={limit:g} is defined for forward_kl and reverse_kl, not for {D}")
    if limit <= 0:
        raise ValueError(f"signal.clip_terms={limit:g} must be above 0, in nats")
    if not isinstance(target, FullPredictions) or not isinstance(model, FullPredictions):
        raise ValueError(
            f"signal.clip_terms={limit:g} needs the whole vocabulary of the target: leave target.top_k out"
        )

    def both(theirs: Tensor, ours: Tensor, _: slice) -> Tensor:
        size = min(theirs.shape[-1], ours.shape[-1])
        log_q, log_p = ((one[..., :size] / temperature).log_softmax(-1) for one in (theirs, ours))
        left, right = (log_q, log_p) if str(D) == "forward_kl" else (log_p, log_q)
        least = torch.finfo(left.dtype).min / 4  # -inf - -inf is NaN
        terms = left.exp() * (left.clamp_min(least) - right.clamp_min(least))
        return torch.stack([terms.clamp(max=limit).sum(-1), (terms > limit).sum(-1).to(terms.dtype)], -1)

    values, cut = over_vocabulary(both, target, model).unbind(-1)
    return values, cut.detach()


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
