"""Numbers per token of two next-token distributions, all of them in one pass over the vocabulary."""

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence import divergence
from kullback.lm.predictions import FullPredictions, over_vocabulary

DIVERGENCES = {
    "forward_kl": "forward_kl",
    "reverse_kl": "reverse_kl",
    "jsd": "jsd(0.5)",
    "squared_hellinger": "squared_hellinger",
}


@torch.no_grad()
def token_statistics(
    model: FullPredictions, target: FullPredictions | None = None, *, divergences: tuple[str, ...] = tuple(DIVERGENCES)
) -> dict[str, Float[Tensor, "scored"]]:
    """What two distributions m (model) and t (target) say at each scored position, exactly and without gradient.

        entropy = -sum_v m_v log m_v             log_prob = log m(written token)        and the same of t
        forward_kl = sum_v t_v log(t_v / m_v)    reverse_kl = sum_v m_v log(m_v / t_v)
        jsd = (KL(t || a) + KL(m || a)) / 2,  a = (t + m) / 2      squared_hellinger = 1 - sum_v sqrt(t_v m_v)
        agreement = 1 where both find the same token likeliest, else 0

    Chunk after chunk of positions; no [scored, vocab] tensor is kept.

    Args:
        target: None leaves out what needs two.
        divergences: which of `DIVERGENCES`, or any names `kb.divergence` parses. Columns that only one head has are
            padding and take no part in them.

    Returns:
        "entropy" and "log_prob"; with a target also "target_entropy", "target_log_prob", "agreement" and the
        divergences by name. Nats, except agreement; float32.

    Raises:
        ValueError: the logits of one side are NaN, saying which.
    """
    if target is None:
        names = ["entropy", "log_prob"]

        def alone(ours: Tensor, at: slice) -> Tensor:
            return torch.stack(_of_one(ours.log_softmax(-1), model.tokens[at], "model"), -1)

        table = over_vocabulary(alone, model)
    else:
        names = ["entropy", "log_prob", "target_entropy", "target_log_prob", "agreement", *divergences]
        measures = [divergence(DIVERGENCES.get(name, name)) for name in divergences]

        def both(theirs: Tensor, ours: Tensor, at: slice) -> Tensor:
            t, m = theirs.log_softmax(-1), ours.log_softmax(-1)
            columns = [*_of_one(m, model.tokens[at], "model"), *_of_one(t, model.tokens[at], "target")]
            if t.shape != m.shape:
                shared = min(t.shape[-1], m.shape[-1])
                t, m = theirs[:, :shared].log_softmax(-1), ours[:, :shared].log_softmax(-1)
            columns.append((t.argmax(-1) == m.argmax(-1)).to(m.dtype))
            return torch.stack([*columns, *(D.from_log_probs(t, m) for D in measures)], -1)

        table = over_vocabulary(both, target, model)
    return dict(zip(names, table.unbind(-1), strict=True))


def _of_one(log_p: Float[Tensor, "n vocab"], tokens: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Entropy, and the log-probability of the written tokens."""
    entropy = -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)  # 0 * -inf would be NaN
    if bad := int(entropy.isnan().sum()):
        raise ValueError(
            f"the {side}'s logits are NaN at {bad} of {len(entropy)} positions: its weights are damaged, or the run "
            "has diverged"
        )
    return entropy, log_p.gather(-1, tokens[:, None])[:, 0]
