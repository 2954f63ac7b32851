"""Numbers per token against torch.distributions, whatever the chunks, the kind of predictions and the padding."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import kullback as kb
from kullback.divergence import statistics
from kullback.lm.models import Head
from kullback.lm.predictions import HiddenPredictions, LogitPredictions
from kullback.lm.statistics import token_statistics

ROWS, VOCAB = 23, 17
SCORED = torch.ones(1, ROWS, dtype=torch.bool)


def logits(seed: int, vocab: int = VOCAB, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(ROWS, vocab, generator=torch.Generator().manual_seed(seed))


def wrap(values: torch.Tensor) -> LogitPredictions:
    return LogitPredictions(SCORED, torch.arange(ROWS) % VOCAB, values)


def oracle(target: torch.Tensor, model: torch.Tensor) -> dict[str, torch.Tensor]:
    t, m = Categorical(logits=target.double()), Categorical(logits=model.double())
    middle, written = Categorical(probs=(t.probs + m.probs) / 2), torch.arange(ROWS) % VOCAB
    return {
        "entropy": m.entropy(),
        "log_prob": m.log_prob(written),
        "target_entropy": t.entropy(),
        "target_log_prob": t.log_prob(written),
        "agreement": (t.probs.argmax(-1) == m.probs.argmax(-1)).double(),
        "forward_kl": kl_divergence(t, m),
        "reverse_kl": kl_divergence(m, t),
        "jsd": (kl_divergence(t, middle) + kl_divergence(m, middle)) / 2,
        "squared_hellinger": 1 - (t.probs * m.probs).sqrt().sum(-1),
    }


@pytest.mark.parametrize("chunk", [1, 4 * VOCAB, 1 << 24])
def test_all_numbers_are_those_of_torch_distributions(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "ENTRIES", chunk)
    monkeypatch.setattr(statistics, "LEAST_ROWS", 1)
    found = token_statistics(wrap(logits(1)), wrap(logits(0)))
    expected = oracle(logits(0), logits(1))
    assert set(found) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(
            found[name].double(), values, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: name + m
        )


def test_alone_it_says_what_one_distribution_says() -> None:
    found, expected = token_statistics(wrap(logits(1))), oracle(logits(1), logits(1))
    assert set(found) == {"entropy", "log_prob"}
    for name, values in found.items():
        torch.testing.assert_close(values.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_hidden_states_of_different_widths_give_what_their_logits_give() -> None:
    draw = torch.Generator().manual_seed(3)
    sides = []
    for width in (5, 9):
        hidden, weight = torch.randn(ROWS, width, generator=draw), torch.randn(VOCAB, width, generator=draw)
        sides.append(
            (HiddenPredictions(SCORED, torch.arange(ROWS) % VOCAB, hidden, Head(weight, None)), hidden @ weight.T)
        )
    (target, target_logits), (model, model_logits) = sides
    for name, values in oracle(target_logits, model_logits).items():
        found = token_statistics(model, target)[name].double()
        torch.testing.assert_close(found, values, rtol=1e-4, atol=1e-5)


def test_a_model_is_no_way_from_itself_even_with_a_padded_head() -> None:
    padded = torch.cat([logits(1), torch.zeros(ROWS, 3)], -1)
    found = token_statistics(wrap(padded), wrap(logits(1)))
    for name in ("forward_kl", "reverse_kl", "jsd", "squared_hellinger"):
        assert float(found[name].abs().max()) == 0.0
    assert float(found["agreement"].min()) == 1.0


def test_any_divergence_can_be_asked_for() -> None:
    target, model = logits(0), logits(1)
    found = token_statistics(wrap(model), wrap(target), divergences=("0.3*forward_kl + 0.7*reverse_kl",))
    kl = oracle(target, model)
    expected = 0.3 * kl["forward_kl"] + 0.7 * kl["reverse_kl"]
    torch.testing.assert_close(found["0.3*forward_kl + 0.7*reverse_kl"].double(), expected, rtol=1e-4, atol=1e-5)
    alpha = token_statistics(wrap(model), wrap(target), divergences=("alpha(0.3)",))["alpha(0.3)"]
    torch.testing.assert_close(alpha, kb.divergence("alpha(0.3)").categorical(target, model))


def test_impossible_tokens_are_no_nan_and_damaged_logits_are_named() -> None:
    model, target = logits(1), logits(0)
    model[:, 0] = -torch.inf
    found = token_statistics(wrap(model), wrap(target))
    assert found["entropy"].isfinite().all()
    assert found["forward_kl"].isposinf().all()  # the target says what the model cannot
    assert found["reverse_kl"].isfinite().all()
    target[5] = torch.nan
    with pytest.raises(ValueError, match=r"target's logits are NaN at 1 of 23"):
        token_statistics(wrap(model), wrap(target))
    with pytest.raises(ValueError, match=r"model's logits are NaN at 1 of 23"):
        token_statistics(wrap(target))


def test_nothing_carries_a_gradient() -> None:
    found = token_statistics(wrap(logits(1).requires_grad_()), wrap(logits(0).requires_grad_()))
    assert not any(values.requires_grad for values in found.values())
