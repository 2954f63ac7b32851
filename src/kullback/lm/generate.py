"""Sampling with transformers: one prefill per prompt, finished rows leave the batch, every draw reproducible.

A token is the inverse of its distribution function at a uniform number that belongs to the row, so what a row says does
not depend on which rows it is sampled with, in which order, or when the others finish.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

DROP_SHARE = 0.125  # copying the cache costs about a decoding step, so it waits until this share of rows is done


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
    """Tokens at the quantiles `uniform` in [0, 1), and their log-probabilities; temperature 0 takes the likeliest."""
    logits = logits.float()
    if temperature == 0:
        token = logits.argmax(-1)
        return token, torch.zeros_like(token, dtype=torch.float32)
    log_p = (logits / temperature).log_softmax(-1)
    cumulative = log_p.double().exp().cumsum(-1)
    threshold = uniform.to(cumulative) * cumulative[:, -1]
    token = torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return token, log_p.gather(-1, token[:, None])[:, 0]


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
) -> Written:
    """Write `samples` completions for each prompt, each at most `uniforms.shape[1]` tokens.

    Args:
        uniforms: in [0, 1), one per token; row `i * samples + j` is sample j of prompt i.
        temperature: divides the logits; 0 is greedy.
        rows_at_once: how many rows share a cache; prompts of like length go together.

    Raises:
        ValueError: the model's logits are NaN.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    per_call = max(rows_at_once // samples, 1)
    completions: list[list[int]] = [[] for _ in range(len(prompts) * samples)]
    log_probs: list[list[float]] = [[] for _ in completions]
    finished = [False] * len(completions)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), per_call):
            some = order[start : start + per_call]
            rows = [i * samples + j for i in some for j in range(samples)]
            tokens, scores, ended = _decode(
                model,
                [prompts[i] for i in some],
                uniforms[rows],
                end_ids=end_ids,
                samples=samples,
                temperature=temperature,
            )
            for row, line, line_scores, done in zip(
                rows, tokens.tolist(), scores.tolist(), ended.tolist(), strict=True
            ):
                length = line.index(-1) if -1 in line else len(line)
                completions[row], log_probs[row], finished[row] = line[:length], line_scores[:length], done
    finally:
        model.train(was_training)
    return Written(completions, log_probs, finished)


def _decode(
    model: Any,
    prompts: list[list[int]],
    uniforms: Float[Tensor, "row completion"],
    *,
    end_ids: list[int],
    samples: int,
    temperature: float,
) -> tuple[Int[Tensor, "row completion"], Float[Tensor, "row completion"], Tensor]:
    device = next(model.parameters()).device
    width, (rows, limit) = max(map(len, prompts)), uniforms.shape
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):  # padding on the left, so that every row goes on at the same column
        ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = torch.tensor(prompt), 1
    position = (mask.cumsum(1) - 1).clamp(min=0).to(device)
    ids, mask = ids.to(device), mask.to(device)

    out = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1)
    cache, logits = out.past_key_values, out.logits[:, -1]
    if samples > 1:
        cache.batch_repeat_interleave(samples)
        logits, mask = logits.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
    position = mask.sum(1, keepdim=True)
    uniforms, ends = uniforms.to(device), torch.tensor(end_ids, device=device)

    tokens = torch.full((rows, limit), -1, device=device)
    scores = torch.zeros(rows, limit, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    here = torch.arange(rows, device=device)  # which row each line of the cache belongs to
    for t in range(limit):
        if logits.isnan().any():
            raise ValueError(
                "the model's logits are NaN while sampling: its weights are damaged, or the run has diverged"
            )
        token, score = pick(logits, uniforms[here, t], temperature)
        open_rows = ~ended[here]
        tokens[here[open_rows], t], scores[here[open_rows], t] = token[open_rows], score[open_rows]
        ended[here] |= torch.isin(token, ends)
        alive = ~ended[here]
        if t == limit - 1 or not alive.any():
            break
        if float(alive.float().mean()) <= 1 - DROP_SHARE:
            keep = alive.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            here, mask, position, token = here[keep], mask[keep], position[keep], token[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        out = model(
            input_ids=token[:, None], attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        )
        logits, position = out.logits[:, -1], position + 1
    return tokens, scores, ended
