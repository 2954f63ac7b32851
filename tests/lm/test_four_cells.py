"""Card 09, section 5, by enumeration of all strings of tiny tabular models in float64.

A row is a whole string, weighted with the probability that the writer of the prefixes gives it; a model is a table of
logits for every prefix. So each cell's objective and gradient are exact, through the method's own term.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kullback as kb
from kullback.lm.batch import Batch, base_columns
from kullback.lm.methods.four_cells import FourCells
from kullback.lm.predictions import LogitPredictions, TopKPredictions
from kullback.lm.rollout import Origin, build_rollout
from kullback.lm.schedules import EntropyGate

SYMBOLS = 3
CELLS = [(prefix, weight) for prefix in ("teacher", "student") for weight in (0.0, 1.0)]


class Tabular(LogitPredictions):
    """Logits that stay in float64."""

    def logits_of(self, chunk: slice) -> Tensor:
        return self.logits[chunk]

    def token_log_probs(self) -> Tensor:
        return self.logits.log_softmax(-1).gather(-1, self.tokens[:, None])[:, 0]


def tables(length: int, seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(SYMBOLS**t, SYMBOLS, generator=draw, dtype=torch.float64) for t in range(length)]


def strings(length: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(SYMBOLS)] * length).view(-1, length)


def token_logits(model: list[Tensor]) -> Tensor:
    """[string, position, symbol]."""
    prefix, columns = torch.zeros(SYMBOLS ** len(model), dtype=torch.long), []
    for t, table in enumerate(model):
        columns.append(table[prefix])
        prefix = prefix * SYMBOLS + strings(len(model))[:, t]
    return torch.stack(columns, 1)


def log_prob(model: list[Tensor]) -> Tensor:
    """[string, position]: of each token after what stands before it."""
    return token_logits(model).log_softmax(-1).gather(-1, strings(len(model))[..., None])[..., 0]


def cell(teacher: list[Tensor], student: list[Tensor], prefix: Any, weight: float) -> Tensor:
    """The cell's objective: sum over strings of P_prefix(string) * sum over t of the term's value."""
    rows = strings(len(teacher))
    origin = Origin.TEACHER if prefix == "teacher" else Origin.STUDENT
    rollout = build_rollout([[1]] * len(rows), rows.tolist(), [[int(origin)] * rows.shape[1]] * len(rows))
    scored, tokens = rollout.scored, rollout.completions[rollout.scored]
    theirs, ours = (Tabular(scored, tokens, token_logits(model).flatten(0, 1)) for model in (teacher, student))
    (term,) = FourCells(teacher="given", prefix=prefix, reverse_weight=weight).signal(
        Batch(rollout, base_columns(rollout), ours, {"teacher": theirs})
    )
    writer = log_prob(teacher if prefix == "teacher" else student).sum(1).exp().detach()
    return (writer[:, None] * term.value).sum()


def sequence_kl(first: list[Tensor], second: list[Tensor]) -> Tensor:
    one, other = log_prob(first).sum(1), log_prob(second).sum(1)
    return (one.exp() * (one - other)).sum()


def gradient(value: Tensor, student: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, student, retain_graph=True)])


def models(length: int = 4) -> tuple[list[Tensor], list[Tensor]]:
    teacher, student = tables(length, 0), tables(length, 1)
    return teacher, [table.requires_grad_() for table in student]


def test_the_chain_rule_couples_prefix_and_direction() -> None:
    """Check 1: each sequence KL is the sum over positions of its own token KL on its own prefixes."""
    teacher, student = models()
    torch.testing.assert_close(
        cell(teacher, student, "teacher", 0.0), sequence_kl(teacher, student), rtol=0, atol=1e-10
    )
    torch.testing.assert_close(
        cell(teacher, student, "student", 1.0), sequence_kl(student, teacher), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_logit_gradients_are_the_card_s(weight: float) -> None:
    """Checks 2 and 7: q - p forward, q (log q - log p - D_rev) reverse, and lambda multiplies the reverse term."""
    (theirs,), (ours,) = models(1)
    p, q = theirs[0].softmax(-1), ours[0].detach().softmax(-1)
    log_ratio = q.log() - p.log()
    forward, reverse = q - p, q * (log_ratio - (q * log_ratio).sum())
    found = gradient(cell([theirs], [ours], "student", weight), [ours])
    torch.testing.assert_close(found, weight * reverse + (1 - weight) * forward, rtol=0, atol=1e-14)


@pytest.mark.parametrize("prefix", ["teacher", "student"])
def test_the_mixture_is_linear_and_half_way_it_is_half_of_jeffreys(prefix: str) -> None:
    """Check 2."""
    teacher, student = models(3)
    forward, reverse = (cell(teacher, student, prefix, weight) for weight in (0.0, 1.0))
    torch.testing.assert_close(cell(teacher, student, prefix, 0.3), 0.3 * reverse + 0.7 * forward, rtol=0, atol=1e-13)
    torch.testing.assert_close(cell(teacher, student, prefix, 0.5), (forward + reverse) / 2, rtol=0, atol=1e-13)
    method = FourCells(teacher="given", reverse_weight=0.5)
    log_ratio = torch.linspace(-5, 5, 11, dtype=torch.float64)
    halves = (0.5 * kb.divergence("jeffreys")).value(log_ratio)
    torch.testing.assert_close(kb.divergence(method.divergence).value(log_ratio), halves)


@pytest.mark.parametrize(("prefix", "weight"), [*CELLS, ("teacher", 0.4), ("student", 0.4)])
def test_at_the_teacher_every_cell_is_zero_with_zero_gradient(prefix: str, weight: float) -> None:
    """Check 3."""
    teacher, _ = models(3)
    student = [table.clone().requires_grad_() for table in teacher]
    value = cell(teacher, student, prefix, weight)
    assert abs(float(value.detach())) < 1e-14
    assert float(gradient(value, student).abs().max()) < 1e-14


def test_only_teacher_forward_is_the_gradient_of_a_sequence_divergence() -> None:
    """Checks 4 and 5."""
    teacher, student = models()
    forward, reverse = (
        gradient(sequence_kl(teacher, student), student),
        gradient(sequence_kl(student, teacher), student),
    )
    found = {at: gradient(cell(teacher, student, *at), student) for at in CELLS}
    torch.testing.assert_close(found["teacher", 0.0], forward, rtol=0, atol=1e-13)
    for at in CELLS[1:]:
        for whole in (forward, reverse):
            assert float((found[at] - whole).norm() / whole.norm()) > 0.1


def test_student_reverse_keeps_the_term_of_the_token_alone() -> None:
    """Check 4: the sequence gradient has the rewards of all later tokens too, the cell only u = t."""
    teacher, student = models()
    scores, ratio = log_prob(student), (log_prob(student) - log_prob(teacher)).detach()
    writer = scores.sum(1).exp().detach()[:, None]
    alone = gradient((writer * scores * ratio).sum(), student)
    later = gradient((writer * scores * ratio.flip(1).cumsum(1).flip(1)).sum(), student)
    torch.testing.assert_close(gradient(cell(teacher, student, "student", 1.0), student), alone, rtol=0, atol=1e-13)
    torch.testing.assert_close(gradient(sequence_kl(student, teacher), student), later, rtol=0, atol=1e-13)
    assert float((alone - later).norm() / later.norm()) > 0.1

    teacher, student = models(1)
    whole = gradient(sequence_kl(student, teacher), student)
    torch.testing.assert_close(gradient(cell(teacher, student, "student", 1.0), student), whole, rtol=0, atol=1e-14)


def test_which_way_the_kl_points() -> None:
    """Check 6: teacher mass where the student has none costs forward KL dearly, reverse KL hardly."""
    p, q = (
        torch.tensor([[0.5, 0.5 - 1e-9, 1e-9]]).double().log(),
        torch.tensor([[1 - 1e-9, 1e-9 / 2, 1e-9 / 2]]).double().log(),
    )
    assert float(cell([p], [q], "student", 0.0)) > 9
    assert float(cell([p], [q], "student", 1.0)) < 0.7


def test_a_truncated_teacher_gives_finite_reverse_kl() -> None:
    """Check 9: what a top-k teacher does not name is a bucket, not -inf; a token ruled out gives inf, not NaN."""
    (theirs,), (ours,) = models(1)
    theirs[0, 2] = -math.inf
    assert float(cell([theirs], [ours], "student", 1.0).detach()) == math.inf

    rollout = build_rollout([[1]], [[0]], [[int(Origin.STUDENT)]])
    full = Tabular(rollout.scored, torch.tensor([0]), tables(1, 0)[0])
    kept = TopKPredictions(full.scored, full.tokens, full.top(1), full.token_log_probs())
    model = Tabular(rollout.scored, torch.tensor([0]), ours)
    batch = Batch(rollout, base_columns(rollout), model, {"teacher": kept})
    (term,) = FourCells(teacher="given", reverse_weight=1.0, top_k=1).signal(batch)
    assert torch.isfinite(term.value).all()
    assert torch.isfinite(torch.autograd.grad(term.value.sum(), ours)[0]).all()


def test_the_gate_climbs_while_the_student_is_undecided_and_then_stays() -> None:
    """Check 8: it reads the probe, which is the student's own text on held-out problems, and nothing of the batch."""
    (gate,) = FourCells(teacher="given", lengths=(4, 8, 16), minimum_entropy=0.5).schedule()
    assert gate == EntropyGate((4, 8, 16), 0.5)
    assert (gate.reads, gate.writes, gate.when) == (("probe/entropy",), ("source.max_completion",), "probe")
    state, written = gate.start()
    lengths = [written["source.max_completion"]]
    for entropy in (0.9, 0.5, 0.6):
        state, written = gate.update(state, 0, {"probe/entropy": entropy, "rollout/entropy": 0.0})
        lengths.append(written["source.max_completion"])
    assert lengths == [4, 8, 16, 16]

    state, _ = gate.start()
    lengths = []
    for entropy in (0.9, 0.4, 0.9, 0.9):
        state, written = gate.update(state, 0, {"probe/entropy": entropy})
        lengths.append(written["source.max_completion"])
    assert lengths == [8, 8, 8, 8]  # the last stable length, for good


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule\.lengths"):
        FourCells(teacher="given", minimum_entropy=0.5)
    with pytest.raises(ValueError, match="forward KL"):
        FourCells(teacher="given", reverse_weight=1.5)
