"""Card 16: the tabular policy's exact measures, where each arm distils, and what one step does to the rare token."""

import pytest
import torch

from kullback.papers import p16_trace as paper

FAVOURED = paper.SETTINGS[1]


def test_measures_are_those_of_many_answers():
    for setting in paper.SETTINGS:
        logits = paper.start(setting) + 0.3 * torch.randn(
            paper.POSITIONS, paper.TOKENS, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        answers, written, right = paper.write(logits, 40_000, torch.Generator().manual_seed(1))
        found = paper.measure(logits)
        assert found["success"] == pytest.approx(float(right.double().mean()), abs=0.01)
        assert found["length"] == pytest.approx(float(written.sum(1).double().mean()), abs=0.1)
        assert found["p_b"] == pytest.approx(float((answers[:, paper.KEYS[0]] == paper.B).double().mean()), abs=0.005)
    torch.testing.assert_close(paper.teacher().exp().sum(-1), torch.ones(paper.POSITIONS, dtype=torch.float64))


def test_an_answer_is_right_when_it_does_not_end_and_both_keys_hold():
    answers, written, right = paper.write(paper.start(paper.SETTINGS[0]), 2000, torch.Generator().manual_seed(0))
    for row, mask, good in zip(answers.tolist(), written.tolist(), right.tolist(), strict=True):
        end = row.index(paper.END) + 1 if paper.END in row else paper.POSITIONS
        assert sum(mask) == end  # the END itself is written
        assert good == (paper.END not in row and all(row[key] in (paper.A, paper.B) for key in paper.KEYS))


@pytest.mark.parametrize("arm", paper.ARMS)
def test_where_each_arm_distils(arm):
    draw = torch.Generator().manual_seed(0)
    _, written, right = paper.write(paper.start(FAVOURED), 200, draw)
    mask = paper.spans(arm, right, written, draw)
    if arm == "all tokens":
        assert torch.equal(mask, written)
        return
    assert not mask[~right].any()  # key spans of wrong answers never enter
    assert (mask[right].sum(1) == (0 if arm == "GRPO" else len(paper.KEYS))).all()
    keys = mask[right][:, list(paper.KEYS)]
    assert keys.all() if arm.startswith("TRACE") else not keys.all()
    if arm == "inverted mask":
        assert not keys.any()


def test_after_the_fade_trace_is_grpo():
    logits = paper.start(FAVOURED)
    leaf = (logits + 0.1).requires_grad_()
    losses = [paper.loss(leaf, logits, arm, 40, torch.Generator().manual_seed(0)) for arm in ("TRACE", "GRPO")]
    assert torch.equal(*losses)
    during = paper.loss(leaf, logits, "TRACE", 0, torch.Generator().manual_seed(0))
    assert not torch.equal(during, losses[1])


def test_one_step_lifts_the_rare_token_on_key_spans_alone_and_the_clip_turns_it_round(monkeypatch):
    """The card: +0.065 with key spans; GRPO, other masks and the clip all below 0."""
    monkeypatch.setattr(paper, "FIRST_STEPS", 100)
    lift = paper.lifts.__wrapped__  # not from the cache of whole runs
    lifts = {arm: torch.tensor(lift(FAVOURED.name, arm)).mean().item() for arm in paper.ARMS if arm != "all tokens"}
    assert lifts["TRACE"] == pytest.approx(0.065, abs=0.03)
    assert all(value < 0 for arm, value in lifts.items() if arm != "TRACE")
