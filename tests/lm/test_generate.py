"""Sampling: exact draws, independent of the company a row keeps."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kullback.lm import decode
from kullback.lm.generate import BLOCK, generate, pick
from tests.lm.small import make, make_moment, random_model

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


@contextmanager
def calls(model: torch.nn.Module) -> Iterator[list[tuple[int, int]]]:
    """The shapes of all inputs that the model is given: (rows, tokens)."""
    shapes: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


@pytest.mark.parametrize("room", [1, 3, decode.ROOM])  # columns of the cache that are made at a time
@pytest.mark.parametrize("rows_at_once", [1, 3, 5, 8])
@torch.no_grad()
def test_new_rows_take_the_places_of_finished_ones(
    rows_at_once: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "ROOM", room)
    model, u, samples = random_model(3), uniforms(16), 4
    together = generate(model, PROMPTS, u, end_ids=END, samples=samples)
    with calls(model) as shapes:
        written = generate(model, PROMPTS, u, end_ids=END, samples=samples, rows_at_once=rows_at_once)
    assert written.completions == together.completions
    for scores, expected in zip(written.log_probs, together.log_probs, strict=True):
        assert scores == pytest.approx(expected, abs=1e-5)
    assert max(rows for rows, _ in shapes) <= rows_at_once
    if rows_at_once > 1:  # a row's first token comes from a prefill, all others from steps that rows share
        steps = sum(tokens == 1 for _, tokens in shapes)
        assert steps < sum(map(len, written.completions)) - 16


def test_rows_join_while_others_are_being_written() -> None:
    model, u = random_model(3), uniforms(16)
    written = generate(model, PROMPTS, u, end_ids=END, samples=4)
    lengths = [len(written.completions[row]) for row in (12, 13, 14, 15, *range(4, 8), *range(4), *range(8, 12))]
    with calls(model) as shapes:
        generate(model, PROMPTS, u, end_ids=END, samples=4, rows_at_once=4)
    waves = sum(max(lengths[i : i + 4]) - 1 for i in range(0, 16, 4))
    prefills = sum(tokens > 1 for _, tokens in shapes)
    assert len(shapes) - prefills < waves


def test_equal_prompts_are_read_once() -> None:
    model, u = random_model(3), uniforms(8)
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[0], PROMPTS[0]]
    with calls(model) as shapes:
        written = generate(model, prompts, u, end_ids=END, samples=2)
    assert shapes[0] == (2, 5)
    for row in range(8):
        assert written.completions[row] == one_by_one(model, prompts[row // 2], u[row], 1.0)[0]


@pytest.mark.parametrize("kinds", [["sliding_attention"] * 2, ["sliding_attention", "full_attention"]])
@torch.no_grad()
def test_layers_that_forget_are_sampled_alike(kinds: list[str]) -> None:
    model = random_model(3, use_sliding_window=True, sliding_window=4, layer_types=kinds)
    u = uniforms(8)
    for rows_at_once in (3, 8):
        written = generate(model, PROMPTS, u, end_ids=END, samples=2, rows_at_once=rows_at_once)
        for row in range(8):
            assert written.completions[row] == one_by_one(model, PROMPTS[row // 2], u[row], 1.0)[0]


@torch.no_grad()
def test_log_probs_are_those_of_a_forward_over_the_text() -> None:
    model, u = random_model(3), uniforms(12)
    written = generate(model, PROMPTS, u, end_ids=END, samples=3, temperature=0.7, rows_at_once=5)
    for row, (text, scores) in enumerate(zip(written.completions, written.log_probs, strict=True)):
        prompt = PROMPTS[row // 3]
        logits = model(input_ids=torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(text)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scores), expected, rtol=0, atol=1e-5)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every graph that is given to the compiler, whose own work would take too long here."""
    found: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return found


@pytest.mark.parametrize("room", [3, decode.ROOM])
def test_compiled_steps_write_the_same_text(room: int, graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "ROOM", room)
    model, u = random_model(3), uniforms(16)
    expected = generate(model, PROMPTS, u, end_ids=END, samples=4)
    for rows_at_once in (16, 5, 1):
        written = generate(model, PROMPTS, u, end_ids=END, samples=4, rows_at_once=rows_at_once, compile_decode=True)
        assert written.completions == expected.completions
        for scores, plain in zip(written.log_probs, expected.log_probs, strict=True):
            assert scores == pytest.approx(plain, abs=1e-5)
    assert 1 <= len(graphs) <= 3  # not one for each number of rows and columns
    assert model.config._attn_implementation == "sdpa"


def test_the_setting_reaches_the_sources(graphs: list[Any]) -> None:
    plain, compiled = (make_moment(make("minillm"), compile_decode=wanted) for wanted in (False, True))
    expected = plain.method.source().draw(plain)
    assert not graphs
    assert torch.equal(compiled.method.source().draw(compiled).completions, expected.completions)
    assert graphs


def test_models_whose_steps_cannot_be_compiled_are_refused() -> None:
    forgets = random_model(3, use_sliding_window=True, sliding_window=4, layer_types=["sliding_attention"] * 2)
    with pytest.raises(ValueError, match=r"compile_decode=True: .* layers that forget \(DynamicSlidingWindowLayer\)"):
        generate(forgets, PROMPTS, uniforms(4), end_ids=END, compile_decode=True)
    eager = random_model(3)
    eager.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"compile_decode=True: .* 'eager' .*attn_implementation='sdpa'"):
        generate(eager, PROMPTS, uniforms(4), end_ids=END, compile_decode=True)


def test_nothing_to_write() -> None:
    model = random_model(3)
    assert generate(model, [], uniforms(0), end_ids=END).completions == []
    assert generate(model, PROMPTS, uniforms(4, 0), end_ids=END).completions == [[]] * 4


@given(
    vocab=st.integers(1, 3 * BLOCK + 1),
    seed=st.integers(0, 2**31),
    u=st.floats(0, 1, exclude_max=True),
    scale=st.floats(0.1, 20),
)
def test_a_token_is_where_the_distribution_function_passes_the_uniform(
    vocab: int, seed: int, u: float, scale: float
) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(1, vocab, generator=draw)
    logits[0, torch.rand(vocab, generator=draw) < 0.3] = -torch.inf
    logits[0, seed % vocab] = 0.0
    token = int(pick(logits, torch.tensor([u], dtype=torch.float64), 1.0)[0])
    p = logits[0].double().softmax(-1)
    assert p[token] > 0
    assert p[:token].sum() <= u + 1e-6
    assert p[: token + 1].sum() >= u - 1e-6


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
