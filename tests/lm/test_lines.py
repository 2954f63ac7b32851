"""Rows that share lines and prompts say what they say alone, and models that cannot keep them apart are found out."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from kullback.lm import forwards
from kullback.lm.forwards import cheapest, read
from kullback.lm.lines import best_lines, cost_of, in_lines, reads_lines
from kullback.lm.rollout import Rollout, build_rollout

PROMPTS = [[7, 8, 9], [7, 8, 9], [5], [7, 8, 9], [5], [11, 12, 13, 14, 15, 16]]
COMPLETIONS = [[4, 5], [6], [7, 9, 8, 5], [4, 5, 6, 7, 8, 9, 10], [9, 4], [21, 22, 23]]
LENGTHS = [len(ids) for ids in COMPLETIONS]


def rows() -> Rollout:
    return build_rollout(PROMPTS, COMPLETIONS, [[1] * n for n in LENGTHS])


def model_of(**options: Any) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.3,
        **options,
    )
    return Qwen3ForCausalLM(config).double().eval()


@given(
    rows=st.lists(st.tuples(st.sampled_from([(1,), (2, 3), (4, 5, 6)]), st.integers(1, 30)), min_size=1, max_size=40),
    more=st.integers(0, 60),
)
def test_every_row_has_one_place_and_no_line_is_too_long(rows: list[tuple[tuple[int, ...], int]], more: int) -> None:
    prompts, lengths = [list(prompt) for prompt, _ in rows], [length for _, length in rows]
    widest = max(len(prompt) + length - 1 for prompt, length in rows)
    lines = in_lines(prompts, lengths, widest + more)
    units = [unit for line in lines for unit in line]
    assert sorted(row for unit in units for row in unit) == list(range(len(rows)))
    assert all(len({tuple(prompts[row]) for row in unit}) == 1 for unit in units)
    sizes = [sum(len(prompts[unit[0]]) + sum(lengths[row] - 1 for row in unit) for unit in line) for line in lines]
    assert max(sizes) <= widest + more
    cost, best = best_lines(prompts, lengths, 64)
    assert cost <= cost_of(len(in_lines(prompts, lengths, widest)), widest, 64)
    assert sorted(row for line in best for unit in line for row in unit) == list(range(len(rows)))


@pytest.mark.parametrize("width", [9, 14, 40])
def test_lines_change_neither_values_nor_gradients(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rollout = model_of(), rows()
    lines = in_lines(PROMPTS, LENGTHS, width)
    assert len(lines) < len(PROMPTS)
    assert any(len(unit) > 1 for line in lines for unit in line)
    found = []
    for calls in ([([i], None) for i in range(len(PROMPTS))], [(list(range(len(PROMPTS))), lines)]):
        monkeypatch.setattr(forwards, "cheapest", lambda *args, calls=calls, **kwargs: calls)
        model.zero_grad()
        seen = read(model, rollout)
        (seen.log_probs() ** 2).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((seen.tokens, seen.hidden.detach(), gradient))
    for alone, together in zip(*found, strict=True):  # Qwen3 takes its norms in float32, whatever the weights are
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6 * float(alone.abs().max()))


def test_samples_of_one_prompt_read_it_once() -> None:
    model = model_of()
    prompts, lengths = [list(range(20))] * 8, [6] * 8
    ((piece, lines),) = cheapest(model, prompts, lengths, small=False, lines=True)
    assert piece == list(range(8))
    assert max(len(unit) for line in lines or [] for unit in line) > 1
    assert all(found is None for _, found in cheapest(model, prompts, lengths, small=False, lines=False))
    plain = cheapest(model, [[i, i + 1] for i in range(8)], lengths, small=False, lines=True)
    assert plain == [(list(range(8)), None)]  # all of one length: nothing is padded, nothing is shared


def test_a_model_that_sees_its_neighbours_is_found_out() -> None:
    class Deaf(Qwen3ForCausalLM):
        """Drops a mask that is not one number per token, as older architectures do."""

        def forward(self, attention_mask: Any = None, **inputs: Any) -> Any:
            return super().forward(attention_mask=None if attention_mask.dim() == 4 else attention_mask, **inputs)

    class Strict(Qwen3ForCausalLM):
        def forward(self, attention_mask: Any = None, **inputs: Any) -> Any:
            _, _ = attention_mask.shape
            return super().forward(attention_mask=attention_mask, **inputs)

    model = model_of()
    assert reads_lines(model)
    assert not reads_lines(Deaf(model.config).double())
    assert not reads_lines(Strict(model.config).double())
    assert not reads_lines(model_of(attn_implementation="eager"))
    assert not reads_lines(model_of(use_sliding_window=True, sliding_window=4, max_window_layers=0))


def test_the_question_leaves_the_model_as_it_was() -> None:
    model = model_of().train()
    state = torch.get_rng_state()
    assert reads_lines(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
