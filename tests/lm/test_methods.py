"""What single methods promise, on small cases that can be enumerated."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch

import kullback as kb
from kullback.divergence import peers
from kullback.lm import Batch, find_method
from kullback.lm.batch import base_columns
from kullback.lm.chat import prompt_ids
from kullback.lm.engine import Engine
from kullback.lm.predictions import LogitPredictions
from kullback.lm.rollout import Origin, build_rollout
from kullback.lm.weights import leave_one_out, suffix_sum
from kullback.run.terms import denominator, numerator
from tests.lm.small import gradient, make, make_moment

VOCAB, LENGTH = 3, 3


def table(seed: int) -> torch.Tensor:
    """Logits of a language model over VOCAB tokens for every prefix of up to LENGTH - 1 tokens."""
    prefixes = sum(VOCAB**t for t in range(LENGTH))
    return torch.randn(prefixes, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def row_of(prefix: tuple[int, ...]) -> int:
    before = sum(VOCAB**t for t in range(len(prefix)))
    return before + sum(token * VOCAB**place for place, token in enumerate(reversed(prefix)))


def rows_of(sequence: tuple[int, ...]) -> list[int]:
    return [row_of(sequence[:t]) for t in range(LENGTH)]


def sequence_log_prob(logits: torch.Tensor, sequence: tuple[int, ...]) -> torch.Tensor:
    log_p = logits.log_softmax(-1)
    return torch.stack([log_p[row, token] for row, token in zip(rows_of(sequence), sequence, strict=True)]).sum()


def test_minillm_descends_the_reverse_kl_of_whole_sequences() -> None:
    """Every sequence weighted by its probability: both terms together are the exact gradient of KL(model || target)."""
    theirs, ours = table(0), table(1).requires_grad_()
    sequences = list(itertools.product(range(VOCAB), repeat=LENGTH))
    log_p = torch.stack([sequence_log_prob(ours, s) for s in sequences])
    log_q = torch.stack([sequence_log_prob(theirs, s) for s in sequences])
    (exact,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), ours)

    method = find_method("minillm")(teacher="given", per_token=False, aggregate="row_sum")  # type: ignore[call-arg]
    found = torch.zeros_like(ours)
    for sequence in sequences:
        rollout = build_rollout([[0]], [list(sequence)], [[int(Origin.STUDENT)] * LENGTH])
        tokens, index = torch.tensor(sequence), torch.tensor(rows_of(sequence))
        model = LogitPredictions(rollout.scored, tokens, ours[index])
        teacher = LogitPredictions(rollout.scored, tokens, theirs[index])
        columns = base_columns(rollout) | {
            "log_prob:student": model.log_probs().detach(),
            "log_prob:teacher": teacher.log_probs(),
        }
        step = Batch(rollout, columns, aggregate="row_sum")
        step = dataclasses.replace(
            step, columns=columns | method.weight(step), predictions=model, targets={"teacher": teacher}
        )
        loss = sum(
            (
                term.coefficient * numerator(term, step.columns) / denominator(step.columns, *term.key)
                for term in method.signal(step)
            ),
            torch.zeros(()),
        )
        found += sequence_log_prob(ours.detach(), sequence).exp() * torch.autograd.grad(loss, ours)[0]
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-7)

    shortened = dataclasses.replace(method, later=0.0)
    assert len(shortened.signal(step)) == 1  # what remains is plain on-policy distillation


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_gkd_is_the_peers_divergence_of_the_same_beta(beta: float) -> None:
    ours = kb.divergence(make("gkd", beta=beta).divergence)  # type: ignore[attr-defined]
    theirs = peers.trl_gkd(beta)
    logits = torch.randn(2, 5, 9, dtype=torch.float64)
    torch.testing.assert_close(ours.categorical(*logits), theirs.categorical(*logits))


def test_gkd_in_unit_scale_joins_the_kls() -> None:
    logits = torch.randn(2, 5, 9, dtype=torch.float64)
    for beta, end in ((1e-5, "forward_kl"), (1 - 1e-5, "reverse_kl")):
        near = kb.divergence(make("gkd", beta=beta, unit=True).divergence).categorical(*logits)  # type: ignore[attr-defined]
        torch.testing.assert_close(near, kb.divergence(end).categorical(*logits), rtol=1e-3, atol=1e-5)


def test_word_kd_without_a_teacher_s_say_is_the_data_alone() -> None:
    sft = make("sft")
    loss, plain = gradient(Engine(sft, make_moment(sft)))
    half = make("word_kd", mix=0.5)
    engine = Engine(half, make_moment(half))
    (micro,) = engine.prepare(0)
    engine.loss(micro)
    assert engine.metrics()["term/nll"] == pytest.approx(loss, rel=1e-5)
    assert float(plain.abs().max()) > 0


def test_identical_models_are_at_rest() -> None:
    """Teacher = student: value and gradient are zero for every distillation through a divergence, sampled ones too."""
    for name, changes in (
        ("on_policy_distillation", {}),
        ("gkd", {}),
        ("four_cells", {}),
        ("vopd", {}),
        ("vopd", {"divergence": "jsd(0.3)"}),
    ):
        method = make(name, **changes)
        at = make_moment(method)
        at.players["teacher"] = at.players["student"]
        loss, found = gradient(Engine(method, at))
        assert abs(loss) < 1e-5
        assert float(found.abs().max()) < 1e-4


def test_a_teacher_with_a_prompt_of_its_own_reads_it() -> None:
    method = make("word_kd", mix=0.0, teacher_system="Add carefully.")
    engine = Engine(method, make_moment(method))
    (micro,) = engine.prepare(0)
    seen: Any = engine.targets["teacher"].predict(micro.rollout, engine.at)
    teacher, tokenizer = engine.at.model("teacher"), engine.at.tokenizer
    log_probs = seen.log_probs()
    for i in range(3):
        prompt = prompt_ids(tokenizer, micro.rollout.notes[i]["messages"], system="Add carefully.")
        length = int(micro.rollout.lengths[i])
        completion = micro.rollout.completions[i, :length]
        logits = teacher(input_ids=torch.tensor([prompt + completion.tolist()])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(
            log_probs[i, :length], logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0], rtol=1e-4, atol=1e-4
        )
    plain = make("word_kd", mix=0.0)
    assert gradient(Engine(plain, make_moment(plain)))[0] != pytest.approx(float(engine.loss(micro).detach()), rel=1e-3)


def test_suffix_sums_and_baselines() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0], [1.0, 0.0, 0.0], [3.0, 3.0, 3.0]])
    assert suffix_sum(values).tolist() == [[7.0, 6.0, 4.0], [1.0, 0.0, 0.0], [9.0, 6.0, 3.0]]
    assert leave_one_out(values, torch.tensor([0, 0, 1])).tolist() == [
        [1.0, 0.0, 0.0],
        [1.0, 2.0, 4.0],
        [0.0, 0.0, 0.0],
    ]
    assert leave_one_out(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([5, 5, 5])).tolist() == [4.0, 3.5, 1.5]


def test_mixtures_of_sources_have_their_shares() -> None:
    method = make("on_policy_distillation", student_fraction=0.25, otherwise="dataset")
    at = make_moment(method)
    at.prompts_per_step = 400
    rollout = method.source().draw(at)
    share = float((rollout.origin == Origin.STUDENT).any(1).float().mean())
    assert share == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 400) ** 0.5)
    assert len(set(rollout.group.tolist())) == 400


def test_a_writing_teacher_reads_its_own_prompt_and_the_student_does_not() -> None:
    plain, prompted = (make("sequence_kd", teacher_system=system) for system in (None, "Add carefully."))
    first, second = (Engine(method, make_moment(method)).draw().rollout for method in (plain, prompted))
    assert first.prompts == second.prompts
    assert first.completions.shape != second.completions.shape or not torch.equal(first.completions, second.completions)


def test_what_would_do_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target\.top_k=4 .* would do nothing: only the teacher's text is used"):
        make("sequence_kd", top_k=4)
