"""Sampling: exact draws, independent of the company a row keeps."""

import pytest
import torch

from kullback.lm.generate import generate, pick
from tests.lm.small import random_model

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [20]]
END = [3, 7, 19, 23, 51, 64, 77, 89]


def uniforms(rows: int, width: int = 20) -> torch.Tensor:
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def one_by_one(
    model: torch.nn.Module, prompt: list[int], row: torch.Tensor, temperature: float
) -> tuple[list[int], list[float]]:
    """Without a cache, without a batch: the whole text is read again for every token."""
    tokens, scores = [], []
    for u in row:
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1].double()
        if temperature == 0:
            token, score = int(logits.argmax()), 0.0
        else:
            p = (logits / temperature).softmax(-1)
            token = int((p.cumsum(-1) <= u * p.sum()).sum())
            score = float(p[token].log())
        tokens.append(token)
        scores.append(score)
        if token in END:
            break
    return tokens, scores


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("samples", [1, 3])
@torch.no_grad()
def test_batched_text_is_the_text_of_each_row_alone(temperature: float, samples: int) -> None:
    model = random_model(3)
    u = uniforms(len(PROMPTS) * samples)
    written = generate(model, PROMPTS, u, end_ids=END, samples=samples, temperature=temperature)
    for row in range(len(u)):
        tokens, scores = one_by_one(model, PROMPTS[row // samples], u[row], temperature)
        assert written.completions[row] == tokens
        assert written.log_probs[row] == pytest.approx(scores, abs=1e-4)
        assert written.finished[row] == (tokens[-1] in END)
    assert any(written.finished)


def test_how_many_rows_share_a_cache_does_not_matter() -> None:
    model = random_model(3)
    u = uniforms(8)
    together = generate(model, PROMPTS, u, end_ids=END, samples=2)
    apart = generate(model, PROMPTS, u, end_ids=END, samples=2, rows_at_once=2)
    assert together.completions == apart.completions


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, -torch.inf, 1.0])
    count = 40_000
    u = torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens, scores = pick(logits.expand(count, -1), u, 0.8)
    p = (logits / 0.8).softmax(-1)
    frequency = torch.bincount(tokens, minlength=5) / count
    assert float((frequency - p).abs().max()) < 4 * 0.5 / count**0.5
    assert frequency[3] == 0
    torch.testing.assert_close(scores, p.log()[tokens])


def test_the_ends_of_the_unit_interval_pick_tokens_that_can_occur() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    assert pick(logits, torch.tensor([0.0]), 1.0)[0].item() == 1
    assert pick(logits, torch.tensor([1 - 2**-53], dtype=torch.float64), 1.0)[0].item() == 2


def test_nan_logits_are_an_error() -> None:
    model = random_model(3)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN while sampling"):
        generate(model, PROMPTS, uniforms(4), end_ids=END)
