"""Numbers per token of next-token distributions, all of them in one pass over the vocabulary."""

from collections.abc import Iterable, Mapping

from jaxtyping import Float
from torch import Tensor

from kullback.divergence import statistics
from kullback.divergence.statistics import Side
from kullback.lm.predictions import FullPredictions, HiddenPredictions

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "squared_hellinger")


def token_statistics(
    model: FullPredictions, target: FullPredictions | None = None, *, divergences: tuple[str, ...] = DIVERGENCES
) -> dict[str, Float[Tensor, "scored"]]:
    """What two distributions m (model) and t (target) say at each scored position, exactly and without gradient.

        entropy = -sum_v m_v log m_v             log_prob = log m(written token)        and the same of t
        forward_kl = sum_v t_v log(t_v / m_v)    reverse_kl = sum_v m_v log(m_v / t_v)
        jsd = (KL(t || a) + KL(m || a)) / 2,  a = (t + m) / 2      squared_hellinger = 1 - sum_v sqrt(t_v m_v)
        agreement = 1 where both find the same token likeliest, else 0

    Chunk after chunk of positions; no [scored, vocab] tensor is made.

    Args:
        target: None leaves out what needs two.
        divergences: any names `kb.divergence` parses, "overlap(k)", "bhattacharyya" or "bhattacharyya_coefficient" (see
            `kullback.divergence.statistics`). Columns that only one head has are padding and take no part in them.

    Returns:
        "entropy" and "log_prob"; with a target also "target_entropy", "target_log_prob", "agreement" and the
        divergences by name. Nats, except agreement, overlap and coefficient; float32 or wider.

    Raises:
        ValueError: the logits of one side are NaN, saying which.
    """
    if target is None:
        names: tuple[str, ...] = ("entropy", "log_prob")
        sides = {"model": side(model)}
    else:
        names = ("entropy", "log_prob", "target_entropy", "target_log_prob", "agreement", *divergences)
        sides = {"model": side(model), "target": side(target)}
    return statistics.measure(sides, {name: statistics.asked(name) for name in names}, model.tokens)


def token_scores(players: Mapping[str, FullPredictions], scores: Iterable[str]) -> dict[str, Float[Tensor, "scored"]]:
    """Several scores of the same tokens at once: the logits of each player are made once, whatever is asked of it.

    Args:
        players: predictions of the same tokens by name.
        scores: "log_prob:student", "entropy:teacher", "hellinger:reference,student" (target first): a kind that
            `token_statistics` knows, and the names it is of.

    Returns:
        By score. Nats, except shares; without gradient.

    Raises:
        ValueError: a kind that means nothing, or of too many or too few; logits that are NaN, saying whose.
    """
    wanted = {score: (kind, *names.split(",")) for score in scores for kind, _, names in [score.partition(":")]}
    if not wanted:
        return {}
    sides = {name: side(predictions) for name, predictions in players.items()}
    return statistics.measure(sides, wanted, next(iter(players.values())).tokens)


def side(predictions: FullPredictions) -> Side:
    """Predictions as the one pass reads them."""
    if not isinstance(predictions, HiddenPredictions):
        return Side(predictions.vocab, lambda rows: predictions.logits_of(rows).detach())
    head = predictions.head
    return statistics.linear_side(
        predictions.hidden, head.matrix.to(predictions.hidden.dtype), head.bias, head.scale, head.softcap
    )
