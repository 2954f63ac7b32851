"""Learning from pairs: (link of a divergence) x (outer loss) x (length rule), and what such methods share.

    g = log model(y) - log reference(y)      of a whole completion, nats
    s(g) = link(-g)                          of D(reference, model)
    loss = outer( coefficient * [ s(g_chosen) - s(g_rejected) ] )

The model that maximises E r - coefficient * D(reference, model) has r = coefficient * s(g) + a constant of the prompt,
which cancels in a pair: so the reward never has to be fitted. That needs a link that falls to -inf where the model's
probability goes to 0; otherwise the optimum gives responses up and their reward cannot be read from it.

Source: f-DPO, arXiv 2309.16240, equation 4 and theorem 1; DPO, 2305.18290; IPO, 2310.12036; hinge, 2305.10425; chi-PO,
2407.13399, algorithm 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from kullback.divergence import FDivergence, divergence
from kullback.lm import sampling
from kullback.lm.batch import Batch
from kullback.lm.method import Method, Together, answer
from kullback.lm.moment import Moment
from kullback.lm.pairs import grade_of, judged, pairs, written_by
from kullback.lm.sources import Source
from kullback.run.terms import Term

Outer = Literal["logistic", "hinge", "squared_hinge", "ipo"]
Length = Literal["sum", "mean"]

OUTERS: dict[str, Callable[[Tensor, float], Tensor]] = {  # of the margin and the coefficient
    "logistic": lambda margin, _: softplus(-margin),
    "hinge": lambda margin, _: (1 - margin).clamp(min=0),
    "squared_hinge": lambda margin, _: (1 - margin).clamp(min=0) ** 2,
    "ipo": lambda margin, coefficient: ((margin - 0.5) / coefficient) ** 2,
}


def score(
    D: FDivergence, log_ratio: Float[Tensor, "*shape"], *, limit: float = 20.0, pull: float = 1.0
) -> Float[Tensor, "*shape"]:
    """s(g) = link(-g), continued as a straight line beyond |g| = limit, so that any g has a finite score and gradient.

    The line's slope is that of the curve at the limit, at most `pull`. For chi2_kl that is exp(clamp(g)) + g up to
    2e-9. Near the limit it is what keeps a forward-KL score, -exp(-g), from an overflow.

    Args:
        log_ratio: g = log model - log reference, nats; differentiable.
    """
    inside = log_ratio.clamp(-limit, limit)
    with torch.no_grad():
        slope = D.curvature(-inside).clamp(max=pull)
    return D.link(-inside) + slope * (log_ratio - inside)


def check_closed_form(D: FDivergence, field: str = "signal.divergence") -> None:
    """
    Raises:
        ValueError: the divergence has no closed form for pairs.
    """
    if not D.has_closed_form:
        raise ValueError(
            f"{field}={str(D)!r} has no closed form for pairs: its link stops at {D.link_at_infinity:g} where the "
            "model's probability goes to 0, so responses that the optimum gives up have no reward to compare; add a "
            f"KL, {str(D)!r} + reverse_kl, or use reverse_kl, forward_kl, jsd(0.5), alpha(a) with 0 <= a <= 1"
        )


def preference(
    batch: Batch,
    which: str | FDivergence,
    coefficient: float,
    *,
    outer: Outer = "logistic",
    length: Length = "sum",
    smoothing: float = 0.0,
    clip: float | None = None,
    limit: float = 20.0,
    pull: float = 1.0,
    name: str = "preference",
) -> Term:
    """The loss of each pair, at its chosen row; the reference is detached.

    Needs the columns "log_prob:reference", "side" and "pairs", which `PairMethod` makes. Sums are in float64.

    Args:
        which: D(reference, model); its link falls to -inf.
        outer: "logistic", log(1 + e^-m) of the margin m (Bradley-Terry); "hinge", max(0, 1 - m), or its square;
            "ipo", (m - 1/2)^2 / coefficient^2.
        length: "mean" divides a response's score by its tokens, as TRL's ipo and sigmoid_norm do.
        smoothing: share of pairs whose label is taken to be wrong (conservative DPO).
        clip: R; the margin is cut at +-2 R, where a pair stops to pull. None does not cut.
        limit, pull: of `score`.

    The metrics show the share of pairs ordered right, their margin, the rewards coefficient * s, log-ratios in nats,
    the share of pairs with a response beyond the limit and of those that the clip cut, on either side.
    """
    D = divergence(which)
    check_closed_form(D)
    rollout, chosen = batch.rollout, batch["pairs"]
    tokens = batch["scored"]
    theirs = batch["log_prob:reference"].detach()
    difference = torch.where(tokens, batch.model.log_probs().double() - theirs.double(), 0.0)
    log_ratio = difference.sum(1)
    s = score(D, log_ratio, limit=limit, pull=pull)
    if length == "mean":
        s = s / tokens.sum(1).clamp(min=1)
    _, index = torch.unique(rollout.group, return_inverse=True)

    def of_pair(values: Tensor) -> Tensor:
        """The sum over the two rows of a pair, at both."""
        return torch.zeros(len(values), dtype=values.dtype, device=values.device).index_add(0, index, values)[index]

    margin = coefficient * of_pair(s * batch["side"])
    cut = margin if clip is None else margin.clamp(-2 * clip, 2 * clip)
    loss = OUTERS[outer](cut, coefficient)
    if smoothing > 0:
        loss = (1 - smoothing) * loss + smoothing * OUTERS[outer](-cut, coefficient)
    with torch.no_grad():
        other = of_pair(log_ratio) - log_ratio
        seen = {
            "accuracy": (margin > 0).double(),
            "margin": margin,
            "reward_chosen": coefficient * s,
            "reward_rejected": coefficient * s - margin,
            "log_ratio_chosen": log_ratio,
            "log_ratio_rejected": other,
            "beyond_limit": (torch.maximum(log_ratio.abs(), other.abs()) > limit).double(),
        }
        if clip is not None:
            seen |= {"clipped_right": (margin > 2 * clip).double(), "clipped_wrong": (margin < -2 * clip).double()}
    says = f"{outer} loss of {coefficient:g} * (s of chosen - s of rejected), s = link of {D} to the reference"
    says += ", per token" if length == "mean" else ", summed over tokens"
    says += f", cut at {2 * clip:g}" if clip is not None else ""
    return Term(
        name,
        loss,
        over="pairs",
        mean="token",
        says=f"{says}; value and gradient: exact",
        seen={key: torch.where(chosen, values.detach(), 0.0) for key, values in seen.items()},
    )


@dataclass(frozen=True, kw_only=True)
class PairMethod(Method):
    """A method that learns from pairs, relative to a reference.

    Args:
        pairs: "dataset", the columns chosen and rejected; or the best and the worst of `samples` completions, written
            by the "student" afresh at every step or by the "reference" once.
        judge: the grade that chooses, "accuracy", "finished" or another that the task's verifier returns.
        redraws: how often a prompt whose completions all have the same grade is replaced by another.
        reference: the model the divergence is to: "initial", a path or a hub name.
    """

    pairs: Literal["dataset", "student", "reference"] = answer("source", "dataset")
    judge: str = answer("source", "accuracy")
    redraws: int = answer("source", 0)
    reference: Any = answer("target", "initial")

    def __post_init__(self) -> None:
        if self.pairs not in ("dataset", "student", "reference"):
            raise ValueError(f"source.pairs={self.pairs!r} is not known: write dataset, student or reference")
        if self.pairs != "dataset" and self.samples < 2:
            raise ValueError(
                f"source.samples={self.samples} leaves nothing to choose from: source.pairs={self.pairs} needs 2 or "
                "more"
            )
        for field in ("judge", "redraws") if self.pairs == "dataset" else ():
            if getattr(self, field) != type(self).__dataclass_fields__[field].default:
                raise ValueError(
                    f"source.{field}={getattr(self, field)!r} would do nothing: the data set says which is better; "
                    "leave it out, or set source.pairs=student"
                )
        if self.pairs == "reference" and self.redraws:
            raise ValueError(
                f"source.redraws={self.redraws} with source.pairs=reference would pass over the same ties in every "
                "epoch: set it to 0, or raise source.samples"
            )
        if self.reference is None:
            raise ValueError("target.reference=None: the link is of the ratio to a reference: set it to initial")

    @property
    def scores(self) -> tuple[str, ...]:
        return ("log_prob:reference",)

    @property
    def together(self) -> Together:
        return "group"

    def begin(self, at: Moment) -> None:
        if self.pairs != "dataset" and self.judge != "finished" and at.task.verifier is None:
            raise ValueError(
                f"task={at.task.name!r} grades nothing, so no pair can be judged: give it answers or a verifier, or "
                "pairs of its own with source.pairs=dataset"
            )

    def players(self) -> dict[str, Any]:
        return {"reference": self.reference}

    def source(self) -> Source:
        if self.pairs == "dataset":
            return pairs()
        written = written_by(self.pairs, self.judge)
        return judged(sampling.informative(written, grade_of(self.judge), self.redraws), by=self.judge)

    def weight(self, step: Batch) -> dict[str, Tensor]:
        rollout, device = step.rollout, step["scored"].device
        sides = torch.tensor([note["side"] for note in rollout.notes], dtype=torch.float64, device=device)
        total = torch.where(step["scored"], step["log_prob:reference"], 0.0).sum(1)
        bad = (~total.isfinite()).nonzero()[:, 0].tolist()
        if bad:
            note = rollout.notes[bad[0]]
            raise ValueError(
                f"problem {note['problem_id']!r}: the reference gives its "
                f"{ {1: 'chosen', -1: 'rejected'}.get(note['side'], 'undecided') } response log-probability "
                f"{float(total[bad[0]]):g}, so the ratio to it means nothing; drop the pair, or use a reference that "
                "can write it"
            )
        return {
            "side": sides,
            "pairs": (sides > 0) & step["rows"],
            "rollout/decided": torch.where(sides != 0, 1.0, 0.0).float(),
        }


def refuse_coefficient(value: float, field: str = "signal.coefficient") -> None:
    """
    Raises:
        ValueError: it is not positive and finite.
    """
    if not 0 < value < math.inf:
        raise ValueError(
            f"{field}={value:g} must be positive and finite: it multiplies the divergence, like DPO's beta"
        )


@torch.no_grad()
def calibration_error(
    confidence: Float[Tensor, "pair"], correct: Float[Tensor, "pair"], bins: int = 10
) -> tuple[float, Float[Tensor, "bin 3"]]:
    """Expected calibration error over equal bins of [0, 1]: sum_b (n_b / N) |accuracy_b - confidence_b|.

    Returns it with (share, mean confidence, accuracy) of each bin, nan where it is empty. Paper 01's confidence is
    exp(mean log-probability of the chosen response's tokens), and a pair is correct where that mean is higher than the
    rejected one's.

    >>> round(calibration_error(torch.tensor([0.9, 0.9, 0.1]), torch.tensor([1.0, 0.0, 0.0]))[0], 4)
    0.3
    """
    confidence, correct = confidence.double(), correct.double()
    which = (confidence * bins).long().clamp(0, bins - 1)
    count = torch.bincount(which, minlength=bins).double()
    sums = [torch.zeros(bins, dtype=torch.float64).index_add(0, which, values) for values in (confidence, correct)]
    table = torch.stack([count / len(confidence), sums[0] / count, sums[1] / count], dim=1)
    return float((table[:, 0] * (table[:, 2] - table[:, 1]).abs()).nansum()), table
