"""Sampling with transformers: one prefill per prompt, finished rows make way for new ones, every draw reproducible.

A token is the inverse of its distribution function at a uniform number that belongs to the row, so what a row says does
not depend on which rows it is sampled with, in which order, or when the others finish.

transformers' own continuous batching (`generate_batch`) is made for GPUs. On one core of a CPU it wrote 445 tokens of
the embedded teacher a second, this 29,000.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kullback.lm.decode import Decoding

REFILL_SHARE = 0.25  # new rows are read when this share of the places is free: a prefill costs more than a step
BLOCK = 512  # tokens whose probability is summed before any of them is looked at


@dataclass(frozen=True)
class Written:
    """Completions, prompt after prompt, `samples` rows each.

    `log_probs` are the sampler's own: of its distribution at its temperature, in nats.
    """

    completions: list[list[int]]
    log_probs: list[list[float]]
    finished: list[bool]  # ended by itself, not by the limit


def pick(
    logits: Float[Tensor, "row vocab"], uniform: Float[Tensor, "row"], temperature: float
) -> tuple[Tensor, Tensor]:
    """Tokens at the quantiles `uniform` in [0, 1), and their log-probabilities; temperature 0 takes the likeliest.

    NaN logits give a NaN log-probability.
    """
    logits = logits.float()
    if temperature == 0:
        highest, token = logits.max(-1)
        return token, torch.zeros_like(highest).masked_fill(highest.isnan(), torch.nan)
    log_p = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
    rows, vocab = log_p.shape
    size = min(BLOCK, vocab)
    p = log_p.new_zeros(rows, -(-vocab // size), size)
    p.flatten(1)[:, :vocab] = log_p.exp()
    # two levels: one running sum over a large vocabulary in float64 takes longer than the softmax
    blocks = p.sum(-1, dtype=torch.float64).cumsum(-1)
    block, target = _first_above(blocks, uniform.to(blocks) * blocks[:, -1])
    before = torch.nn.functional.pad(blocks, (1, 0)).gather(1, block[:, None])[:, 0]
    inside, _ = _first_above(p[torch.arange(rows, device=p.device), block].double().cumsum(-1), target - before)
    token = block * size + inside
    return token, log_p.gather(-1, token[:, None])[:, 0]


def _first_above(
    cumulative: Float[Tensor, "row n"], target: Float[Tensor, "row"]
) -> tuple[Int[Tensor, "row"], Float[Tensor, "row"]]:
    """Where `cumulative` first exceeds the target, which rounding must not have taken to its end or beyond it."""
    target = torch.minimum(target, cumulative[:, -1] * (1 - 2**-52))
    place = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return place.clamp(max=cumulative.shape[1] - 1), target  # NaN has no place


@torch.no_grad()
def generate(
    model: Any,
    prompts: list[list[int]],
    uniforms: Float[Tensor, "row completion"],
    *,
    end_ids: list[int],
    samples: int = 1,
    temperature: float = 1.0,
    rows_at_once: int = 1024,
    compile_decode: bool = False,
) -> Written:
    """Write `samples` completions for each prompt, each at most `uniforms.shape[1]` tokens.

    Args:
        uniforms: in [0, 1), one per token; row `i * samples + j` is sample j of prompt i.
        temperature: divides the logits; 0 is greedy.
        rows_at_once: how many rows share a cache at most; prompts of like length go together.
        compile_decode: steps of several rows are compiled, at their first call.

    Raises:
        ValueError: the model's logits are NaN; its steps cannot be compiled.
    """
    limit = uniforms.shape[1]
    waiting = sorted(
        range(len(prompts) * samples), key=lambda row: (len(prompts[row // samples]), prompts[row // samples])
    )
    if not waiting or not limit:
        return Written([[] for _ in waiting], [[] for _ in waiting], [False for _ in waiting])
    places = min(rows_at_once, len(waiting))
    batch = Decoding(model, places, max(map(len, prompts)), limit, compile_decode)
    device = batch.device
    uniforms, ends = uniforms.to(device), torch.tensor(end_ids, device=device)
    tokens = torch.full(uniforms.shape, -1, device=device)
    scores = torch.zeros(uniforms.shape, device=device)
    here = torch.zeros(0, dtype=torch.long, device=device)  # which row each line of the batch belongs to
    at = here  # the place of its next token
    logits: Tensor | None = None
    was_training = model.training
    model.eval()
    try:
        while waiting or len(here):
            free = min(batch.room, len(waiting))
            if free and (free == len(waiting) or free >= REFILL_SHARE * places):
                new, waiting = waiting[:free], waiting[free:]
                first = batch.join([prompts[row // samples] for row in new])
                logits = first if logits is None else torch.cat([logits, first])
                here, at = torch.cat([here, torch.tensor(new, device=device)]), torch.cat([at, at.new_zeros(free)])
            assert logits is not None
            token, score = pick(logits, uniforms[here, at], temperature)
            tokens[here, at], scores[here, at] = token, score
            at = at + 1
            alive = ~torch.isin(token, ends) & (at < limit)
            count, damaged = torch.stack([alive.sum(), score.isnan().sum()]).tolist()  # the only wait for the device
            if damaged:
                raise ValueError(
                    "the model's logits are NaN while sampling: its weights are damaged, or the run has diverged"
                )
            if count < len(here):
                order = batch.keep(alive, count, len(waiting))
                here, at, token = here[order], at[order], token[order]
            logits = batch.step(token) if count else None
    finally:
        model.train(was_training)
    written = (tokens >= 0).sum(1).tolist()
    completions = [line[:n] for line, n in zip(tokens.tolist(), written, strict=True)]
    return Written(
        completions,
        [line[:n] for line, n in zip(scores.tolist(), written, strict=True)],
        [line[-1] in end_ids for line in completions],
    )
