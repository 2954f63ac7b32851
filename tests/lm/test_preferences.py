"""Learning from pairs: cards 01 and 39, checks by number; TRL's DPO on the same batch; the data's way into a pair."""

import dataclasses
import json
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kullback.divergence import divergence, peers
from kullback.lm import Batch, find_method
from kullback.lm.batch import base_columns
from kullback.lm.engine import Engine
from kullback.lm.methods.chi_po import mixed_chi2
from kullback.lm.pairs import best_and_worst, reward_model
from kullback.lm.preferences import OUTERS, calibration_error, preference, score
from kullback.lm.rehearse import rehearse
from kullback.lm.rollout import Origin, build_rollout
from kullback.lm.tasks import load_task
from kullback.lm.verifiers import from_callable
from kullback.run.terms import Term
from kullback.theory import tabular
from tests.lm.small import gradient, make, make_moment, random_model

ROWS = [
    {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1) + "!" * (a + b % 3)}
    for a in range(4)
    for b in range(3)
]
CLOSED = ("reverse_kl", "forward_kl", "2*jsd(0.5)", "alpha(0.3)", "alpha(0.7)", "jeffreys", "pearson_chi2", "chi2_kl")
TABLE = {  # card 01: s(g) up to a constant, and ds/dg
    "reverse_kl": (lambda g: g, torch.ones_like),
    "forward_kl": (lambda g: -torch.exp(-g), lambda g: torch.exp(-g)),
    "2*jsd(0.5)": (torch.nn.functional.logsigmoid, lambda g: torch.sigmoid(-g)),
    "alpha(0.3)": (lambda g: -torch.expm1(-0.3 * g) / 0.3, lambda g: torch.exp(-0.3 * g)),
    "alpha(0.7)": (lambda g: -torch.expm1(-0.7 * g) / 0.7, lambda g: torch.exp(-0.7 * g)),
    "chi2_kl": (lambda g: torch.exp(g) + g, lambda g: 1 + torch.exp(g)),
}


@dataclasses.dataclass
class Known:
    """A model of which only the log-probabilities of the written tokens are known."""

    values: torch.Tensor

    def log_probs(self) -> torch.Tensor:
        return self.values


def pairs_of(model: Any, reference: Any, lengths: tuple[int, ...] | None = None) -> Batch:
    """Pairs whose rows have these log-probabilities [pair, (chosen, rejected)], on the first token of each row."""
    reference = torch.as_tensor(reference, dtype=torch.float64).flatten()
    model = torch.as_tensor(model, dtype=torch.float64).flatten()
    rows = len(reference)
    lengths = lengths or (1,) * rows
    rollout = build_rollout(
        [[1]] * rows,
        [[5] * n for n in lengths],
        [[int(Origin.DATASET)] * n for n in lengths],
        group=[i // 2 for i in range(rows)],
        notes=[{"problem_id": str(i // 2), "side": 1 - 2 * (i % 2)} for i in range(rows)],
    )
    pad = max(lengths) - 1
    columns = base_columns(rollout)
    columns["log_prob:reference"] = torch.nn.functional.pad(reference[:, None], (0, pad))
    step = Batch(rollout, columns, predictions=Known(torch.nn.functional.pad(model[:, None], (0, pad))))  # type: ignore[arg-type]
    return dataclasses.replace(step, columns=columns | find_method("dpo")().weight(step))


def per_pair(term: Term) -> torch.Tensor:
    return term.value[::2]


# Card 01


@pytest.mark.parametrize("name", TABLE)
def test_scores_are_the_card_s_table(name: str) -> None:
    """Check 3: s up to a constant, and its derivative by autograd."""
    g = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    value, slope = TABLE[name]
    ours = score(divergence(name), g)
    theirs = value(g)
    torch.testing.assert_close(ours - ours[12], theirs - theirs[12])
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), g)[0], slope(g.detach()))


@pytest.mark.parametrize("pull", [0.5, 1e9])
@pytest.mark.parametrize("name", TABLE)
def test_beyond_its_limit_a_score_is_a_line(name: str, pull: float) -> None:
    """With the slope that the card's table has at that limit, on either side, but at most `pull`."""
    g = torch.tensor([-9.0, 9.0], dtype=torch.float64, requires_grad=True)
    ends = g.detach() / 3
    slope = TABLE[name][1](ends).clamp(max=pull)
    ours = score(divergence(name), g, limit=3.0, pull=pull)
    torch.testing.assert_close(ours, score(divergence(name), ends) + slope * (g.detach() - ends))
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), g)[0], slope)


def test_reverse_kl_is_dpo_and_alpha_joins_the_two_kls() -> None:
    """Check 1, in loss and gradient."""
    draw = torch.Generator().manual_seed(0)
    theirs = torch.randn(9, 2, generator=draw, dtype=torch.float64)
    ours = (theirs + torch.randn(9, 2, generator=draw, dtype=torch.float64)).requires_grad_()
    g = ours - theirs
    dpo = -torch.nn.functional.logsigmoid(0.3 * (g[:, 0] - g[:, 1]))
    found = per_pair(preference(pairs_of(ours, theirs), "reverse_kl", 0.3))
    torch.testing.assert_close(found, dpo, rtol=0, atol=3e-16)

    def both(name: str) -> torch.Tensor:
        loss = per_pair(preference(pairs_of(ours, theirs), name, 0.3))
        return torch.cat([loss.detach()[:, None], torch.autograd.grad(loss.sum(), ours)[0]], dim=1)

    torch.testing.assert_close(both("alpha(0.0001)"), both("reverse_kl"), rtol=0, atol=3e-4)
    torch.testing.assert_close(both("alpha(0.9999)"), both("forward_kl"), rtol=0, atol=3e-3)


@pytest.mark.parametrize("name", CLOSED)
def test_at_the_reference_the_loss_is_log_two(name: str) -> None:
    """Check 2; and card 39's check 1: chi-PO starts with twice DPO's gradient, 2*jsd(0.5) with half of it."""
    ours = torch.full((3, 2), -4.0, dtype=torch.float64, requires_grad=True)
    loss = per_pair(preference(pairs_of(ours, ours.detach()), name, 0.1))
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))
    (found,) = torch.autograd.grad(loss.sum(), ours)
    pull = 0.1 / 2 * divergence(name).second_derivative_at_one
    torch.testing.assert_close(found, torch.tensor([[-pull, pull]] * 3, dtype=torch.float64))
    assert divergence("2*jsd(0.5)").second_derivative_at_one == pytest.approx(0.5)
    assert divergence("chi2_kl").second_derivative_at_one == pytest.approx(2.0)


@pytest.mark.parametrize("name", CLOSED)
def test_the_loss_recovers_the_optimum(name: str) -> None:
    """Check 4 of card 01, 3 of card 39: with endless labelled pairs `preference` has no gradient at the optimum."""
    size, coefficient = 6, 0.7
    reference = tabular.random_policy(size, seed=1)
    reward = torch.randn(size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    best = tabular.optimum(reference, reward, name, coefficient=coefficient).log_probs
    implied = coefficient * score(divergence(name), best - reference)
    torch.testing.assert_close(implied - reward, (implied - reward)[0].expand(size), rtol=1e-8, atol=1e-8)

    index = torch.tensor([(a, b) for a in range(size) for b in range(size) if a != b])
    prefer = torch.sigmoid(reward[index[:, 0]] - reward[index[:, 1]])

    def loss(policy: torch.Tensor) -> torch.Tensor:
        term = preference(pairs_of(policy[index], reference[index]), name, coefficient)
        return (prefer * per_pair(term)).mean()

    assert float(tabular.gradient(loss, best).abs().max()) < 1e-10
    assert float(tabular.gradient(loss, reference).abs().max()) > 1e-3


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(-3, 3), st.sampled_from(CLOSED))
def test_what_the_loss_does_not_see(seed: int, shift: float, name: str) -> None:
    """Checks 6 and 7: c(x) on both models cancels, on the reference alone in DPO only; a swap flips the sign."""
    draw = torch.Generator().manual_seed(seed)
    theirs, ours = 2 * torch.randn(2, 4, 2, generator=draw, dtype=torch.float64)

    def margin(model: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        return preference(pairs_of(model, reference), name, 0.2).seen["margin"][::2]

    plain = margin(ours, theirs)
    torch.testing.assert_close(margin(ours + shift, theirs + shift), plain, rtol=1e-9, atol=1e-9)
    assert torch.equal(margin(ours.flip(1), theirs.flip(1)), -plain)
    moved = margin(ours, theirs + shift)
    if name == "reverse_kl":
        torch.testing.assert_close(moved, plain, rtol=1e-9, atol=1e-9)
    elif abs(shift) > 0.1:
        assert float((moved - plain).abs().max()) > 1e-6


@pytest.mark.parametrize("name", ["2*alpha(-1)", "neyman_chi2", "tv", "le_cam", "skew(forward_kl, 0.5)"])
def test_a_link_that_stops_is_refused(name: str) -> None:
    """Check 8: the limit of the link decides, not the name."""
    assert math.isfinite(divergence(name).link_at_infinity)
    with pytest.raises(ValueError, match=r"signal\.divergence=.*its link stops at -?[\d.]+ .*; add a KL"):
        find_method("dpo")(divergence=name)
    find_method("dpo")(divergence=f"{name} + reverse_kl")  # the fix it names


@pytest.mark.parametrize("name", [*CLOSED, "squared_hellinger", "jsd(0.1)", "jsd(0.9)"])
def test_a_link_without_a_floor_is_accepted(name: str) -> None:
    assert divergence(name).link(torch.tensor(300.0, dtype=torch.float64)) < -1.5 or name.startswith("jsd")
    terms = rehearse(find_method("dpo")(divergence=name))
    assert "s = link of" in terms[0].says


@pytest.mark.parametrize("outer", OUTERS)
@pytest.mark.parametrize("length", ["sum", "mean"])
@pytest.mark.parametrize("name", CLOSED)
def test_extreme_log_ratios_are_finite(name: str, length: Any, outer: Any) -> None:
    """From -1e4 to 1e4 on either side: finite loss and gradient, and a wrong order is still pulled right."""
    ends = torch.tensor([-1e4, -95.0, -20.0, 0.0, 20.0, 95.0, 1e4], dtype=torch.float64)
    ours = torch.cartesian_prod(ends, ends).requires_grad_()
    term = preference(pairs_of(ours, torch.zeros(len(ours), 2)), name, 0.1, outer=outer, length=length)
    (found,) = torch.autograd.grad(term.value.sum(), ours)
    assert term.value.isfinite().all()
    assert found.isfinite().all()
    assert (term.value.float().isfinite()).all()
    wrong = (ours[:, 0] < -50) & (ours[:, 1] > 50)
    assert (found[wrong, 0] < 0).all()
    assert term.seen["beyond_limit"][::2].tolist() == (ours.abs().amax(1) > 20).double().tolist()


@settings(max_examples=50, deadline=None)
@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.sampled_from(CLOSED))
def test_scores_rise(a: float, b: float, name: str) -> None:
    low, high = score(divergence(name), torch.tensor(sorted((a, b)), dtype=torch.float64)).tolist()
    assert low <= high


# Card 39


def test_chi_po_is_the_papers_stable_form() -> None:
    """Checks 2 and 8: phi = exp(clamp(g, max=20)) + g, plain and generalised, and its gradient, also beyond."""
    for alpha, gamma in ((1.0, 1.0), (1.25, 0.1), (0.5, 2.0)):
        g = torch.tensor([-1e4, -30.0, -3.0, 0.0, 2.0, 15.0, 200.0, 1e4], dtype=torch.float64, requires_grad=True)
        ours = score(mixed_chi2(alpha, gamma), g, limit=20 / alpha, pull=gamma)
        theirs = torch.exp((alpha * g).clamp(-88, 20)) + gamma * g
        torch.testing.assert_close(ours - ours[3], theirs - theirs[3], rtol=1e-9, atol=1e-7)
        a, b = (torch.autograd.grad(x.sum(), g)[0] for x in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-7)
    with pytest.raises(ValueError, match=r"signal\.gamma=0 must be positive"):
        find_method("chi_po")(gamma=0.0)


def test_the_clip_is_on_the_difference() -> None:
    """Check 6: no gradient beyond 2 R on either side, the unclipped one inside; and both sides are counted."""
    R, coefficient = 1.5, 1.0
    ours = torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.3, 0.1]], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(3, 2)
    cut = preference(pairs_of(ours, zero), "chi2_kl", coefficient, clip=R)
    free = preference(pairs_of(ours, zero), "chi2_kl", coefficient)
    a, b = (torch.autograd.grad(t.value.sum(), ours)[0] for t in (cut, free))
    assert a[:2].abs().max() == 0
    assert b[:2].abs().min() > 0.01 or b[1].abs().min() > 0.01
    torch.testing.assert_close(a[2], b[2])
    logistic = torch.nn.functional.softplus(torch.tensor([-2 * R, 2 * R], dtype=torch.float64))
    torch.testing.assert_close(per_pair(cut)[:2], logistic)
    assert cut.seen["clipped_right"][::2].tolist() == [1, 0, 0]
    assert cut.seen["clipped_wrong"][::2].tolist() == [0, 1, 0]


def test_the_optimum_under_chi2_kl() -> None:
    """Card 39, checks 3 to 5: the bounds on the ratio, its limits in the coefficient, coverage = 1 + 2 chi-squared."""
    reference = tabular.random_policy(30, seed=4)
    reward = torch.rand(30, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    R = float(reward.max() - reward.min())
    for coefficient in (0.01, 0.1, 1.0):
        best = tabular.optimum(reference, reward, "chi2_kl", coefficient=coefficient)
        ratio = (best.log_probs - reference).exp()
        assert float(ratio.max()) <= 1 + R / coefficient + 1e-9
        assert float(ratio.min()) >= math.exp(-R / coefficient) - 1e-12
        chi2 = float((reference.exp() * (ratio - 1) ** 2).sum()) / 2
        coverage = float((2 * best.log_probs - reference).exp().sum())
        assert coverage == pytest.approx(1 + 2 * chi2)
        assert float(divergence("alpha(-1)").from_log_probs(reference, best.log_probs)) == pytest.approx(chi2)
        for seed in range(5):
            other = tabular.random_policy(30, seed=seed)
            assert float(tabular.objective(other, reference, reward, "chi2_kl", coefficient)) < float(
                best.reward - coefficient * best.distance
            )
    far = tabular.optimum(reference, reward, "chi2_kl", coefficient=1e6).log_probs
    torch.testing.assert_close(far, reference, rtol=0, atol=1e-5)


# Other losses


def test_outer_losses_smoothing_and_length() -> None:
    ours = torch.tensor([[1.0, -2.0], [-1.5, 0.5]], dtype=torch.float64)
    g, zero = ours, torch.zeros(2, 2)
    m = 0.4 * (g[:, 0] - g[:, 1])
    expected = {
        "logistic": (1 + (-m).exp()).log(),
        "hinge": torch.relu(1 - m),
        "squared_hinge": torch.relu(1 - m) ** 2,
        "ipo": (g[:, 0] - g[:, 1] - 1 / (2 * 0.4)) ** 2,
    }
    for outer, value in expected.items():
        found = per_pair(preference(pairs_of(ours, zero), "reverse_kl", 0.4, outer=outer))  # type: ignore[arg-type]
        torch.testing.assert_close(found, value)
    smooth = per_pair(preference(pairs_of(ours, zero), "reverse_kl", 0.4, smoothing=0.2))
    torch.testing.assert_close(smooth, 0.8 * (1 + (-m).exp()).log() + 0.2 * (1 + m.exp()).log())
    lengths = (2, 4, 1, 5)
    shared = per_pair(preference(pairs_of(ours, zero, lengths), "reverse_kl", 0.4, outer="hinge", length="mean"))
    torch.testing.assert_close(
        shared, torch.relu(1 - 0.4 * torch.stack([g[0, 0] / 2 - g[0, 1] / 4, g[1, 0] - g[1, 1] / 5]))
    )


def test_padding_does_not_count_and_the_reference_is_detached() -> None:
    """Poisoned beyond the last token, loss and gradient stay; nothing flows into the reference."""
    values = torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for fill in (0.0, torch.nan):
        ours, theirs = values.clone().requires_grad_(), torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
        step = pairs_of(ours, theirs, (1, 3, 2, 1))
        unread = ~step["scored"]
        step.columns["log_prob:reference"] = step["log_prob:reference"].masked_fill(unread, fill)
        known = Known(step.model.log_probs().masked_fill(unread, fill))
        loss = preference(dataclasses.replace(step, predictions=known), "reverse_kl", 0.4).value  # type: ignore[arg-type]
        assert find_method("dpo")().weight(step)["pairs"].sum() == 2
        found.append(torch.cat([loss.detach(), torch.autograd.grad(loss.sum(), ours, retain_graph=True)[0].flatten()]))
        assert torch.autograd.grad(loss.sum(), theirs, allow_unused=True) == (None,)
    assert torch.equal(*found)


def test_the_metrics_of_a_pair_by_hand() -> None:
    """At the chosen row alone; a tie is not ordered right; rewards and margin are those of the loss."""
    g, lengths = torch.tensor([[1.0, -2.0], [-1.5, 25.0], [0.7, 0.7]], dtype=torch.float64), (2, 4, 1, 5, 3, 3)
    seen = preference(pairs_of(g, torch.zeros(3, 2), lengths), "forward_kl", 0.4, length="mean").seen
    reward = 0.4 * (1 - torch.exp(-g)) / torch.tensor(lengths, dtype=torch.float64).view(3, 2)
    reward[1, 1] = 0.4 * (1 - math.exp(-20) + 5 * math.exp(-20)) / 5  # a line from 20 on
    expected = {
        "accuracy": torch.tensor([1.0, 0.0, 0.0]),
        "margin": reward[:, 0] - reward[:, 1],
        "reward_chosen": reward[:, 0],
        "reward_rejected": reward[:, 1],
        "log_ratio_chosen": g[:, 0],
        "log_ratio_rejected": g[:, 1],
        "beyond_limit": torch.tensor([0.0, 1.0, 0.0]),
    }
    assert seen.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(seen[name][::2], values.double(), msg=lambda m, n=name: n + m)
        assert (seen[name][1::2] == 0).all()


def test_calibration_error_by_hand() -> None:
    error, table = calibration_error(torch.tensor([0.05, 0.95, 0.95, 1.0]), torch.tensor([0.0, 1.0, 0.0, 1.0]))
    top = (0.95 + 0.95 + 1.0) / 3
    assert error == pytest.approx(0.25 * 0.05 + 0.75 * abs(2 / 3 - top))
    assert table[9].tolist() == pytest.approx([0.75, top, 2 / 3])
    assert table[5, 1:].isnan().all()
    assert calibration_error(torch.tensor([0.17]), torch.tensor([1.0]))[1][1, 0] == 1  # in [0.1, 0.2)
    assert calibration_error(torch.full((10,), 0.5), torch.tensor([0.0, 1.0] * 5))[0] == pytest.approx(0)


# TRL


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory: Any) -> Any:
    pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import DPOConfig, DPOTrainer
    from kullback.lm.tiny import build_tokenizer

    config = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, report_to=[], bf16=False, max_length=None
    )
    data = datasets.Dataset.from_list([{"prompt": "1+1=", "chosen": "2", "rejected": "3"}] * 2)
    return DPOTrainer(
        model=random_model(1),
        ref_model=random_model(3),
        args=config,
        train_dataset=data,
        processing_class=build_tokenizer(),
    )


TRL = [
    ("sigmoid", "logistic", "sum"),
    ("hinge", "hinge", "sum"),
    ("ipo", "ipo", "mean"),
    ("sigmoid_norm", "logistic", "mean"),
]
TRL_DIVERGENCES = [
    ("reverse_kl", 0.5),
    ("forward_kl", 0.5),
    ("js_divergence", 0.5),
    ("alpha_divergence", 0.3),
    ("alpha_divergence", 0.8),
]


@pytest.mark.parametrize(("loss_type", "outer", "length"), TRL)
@pytest.mark.parametrize(("kind", "coef"), TRL_DIVERGENCES)
def test_trl_on_the_same_batch(
    trl_trainer: Any, loss_type: str, outer: str, length: str, kind: str, coef: float
) -> None:
    """Loss and the gradient of every weight to 1e-5 (of the largest), through both trainers' own forward passes."""
    method = find_method("dpo")(
        divergence=str(peers.trl_dpo(kind, coef)), outer=outer, length=length, coefficient=0.1, max_completion=40
    )
    at = make_moment(method)
    at.task = load_task(ROWS, seed=0)
    student, reference = at.players["student"], at.players["reference"]
    with torch.no_grad():  # near the reference, as in training: TRL has no limit on forward KL's exponent
        for own, other in zip(student.parameters(), reference.parameters(), strict=True):
            own.copy_(other + 0.05 * own)
    engine = Engine(method, at)
    loss, ours = gradient(engine)
    rollout = engine.step_batch.rollout  # type: ignore[union-attr]

    rows = [i for side in (1, -1) for i, note in enumerate(rollout.notes) if note["side"] == side]
    texts = [(rollout.prompts[i], rollout.completions[i, : int(rollout.lengths[i])].tolist()) for i in rows]
    width = max(len(p) + len(c) for p, c in texts)
    inputs = {
        "input_ids": torch.tensor([p + c + [0] * (width - len(p + c)) for p, c in texts]),
        "attention_mask": torch.tensor([[1] * len(p + c) + [0] * (width - len(p + c)) for p, c in texts]),
        "completion_mask": torch.tensor([[0] * len(p) + [1] * len(c) + [0] * (width - len(p + c)) for p, c in texts]),
    }
    trl_trainer.loss_types, trl_trainer.loss_weights, trl_trainer.beta = [loss_type], [1.0], 0.1
    trl_trainer.f_divergence_type, trl_trainer.f_alpha_divergence_coef = kind, coef
    model = trl_trainer.model
    model.load_state_dict(student.state_dict())
    trl_trainer.ref_model.load_state_dict(reference.state_dict())
    model.zero_grad()
    theirs = trl_trainer._compute_loss(model, inputs, False)
    theirs.backward()
    grads = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])
    assert loss == pytest.approx(float(theirs.detach()), rel=1e-5, abs=1e-5)
    torch.testing.assert_close(ours, grads, rtol=1e-4, atol=1e-5 * max(1.0, float(grads.abs().max())))
    assert float(grads.abs().max()) > 1e-4


def test_where_trl_overflows_we_do_not() -> None:
    """TRL's forward-KL score is 1 - exp(-g): at -95 on both sides it is inf - inf in float32."""
    g = torch.tensor([[-95.0, -96.0]])
    theirs = (1 - torch.exp(-g))[:, 0] - (1 - torch.exp(-g))[:, 1]
    assert theirs.isnan().all()
    ours = preference(pairs_of(g, torch.zeros(1, 2)), "forward_kl", 0.1)
    assert ours.value.isfinite().all()


# Pairs


def engine_of(rows: Any = ROWS, **options: Any) -> Engine:
    method = find_method("dpo")(max_completion=40, **options)
    at = make_moment(method)
    at.task = load_task(rows, seed=0)
    return Engine(method, at)


def test_pairs_of_the_data_set() -> None:
    engine = engine_of()
    step = engine.draw()
    assert len(step.rollout) == 16
    texts = engine.at.tokenizer.batch_decode(step.rollout.completions, skip_special_tokens=True)
    by_prompt = {row["prompt"]: row for row in ROWS}
    for i, note in enumerate(step.rollout.notes):
        row = by_prompt[note["messages"][-1]["content"]]
        assert note["side"] == (1, -1)[i % 2]
        assert texts[i].startswith(row["chosen"] if note["side"] > 0 else row["rejected"])
    assert step["pairs"].tolist() == [True, False] * 8
    assert step.rollout.group.tolist() == [i // 2 for i in range(16)]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_pairs_from_files(tmp_path: Any, suffix: str) -> None:
    path = tmp_path / f"pairs.{suffix}"
    conversations = [
        {
            "chosen": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["rejected"]}],
        }
        for row in ROWS
    ]  # the prompt is implicit: what both begin with
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in conversations))
    else:
        pytest.importorskip("datasets").Dataset.from_list(conversations).to_parquet(str(path))
    task = load_task(str(path), seed=0)
    assert [(p.messages[-1]["content"], p.reply[0]["content"], p.rejected[0]["content"]) for p in task.train] == [  # type: ignore[index]
        (row["prompt"], row["chosen"], row["rejected"]) for row in ROWS
    ]


def test_the_reference_reads_a_pair_once() -> None:
    engine = engine_of(rows=ROWS[:4])
    engine.at.prompts_per_step = 4
    calls = 0

    def count(*args: Any) -> None:
        nonlocal calls
        calls += 1

    engine.at.players["reference"].register_forward_hook(count)
    first = engine.draw()["log_prob:reference"].sum()
    seen = calls
    engine.at.step = 1
    assert engine.draw()["log_prob:reference"].sum() == pytest.approx(float(first))
    assert seen > 0
    assert calls == seen


def test_best_and_worst_become_the_pair() -> None:
    method = make("dpo", samples=4)
    at = make_moment(method)
    step = Engine(method, at).draw()
    written = method.source().source.draw(at)  # type: ignore[attr-defined]
    grades = written.rewards["finished"].view(8, 4)
    assert len(step.rollout) == 16
    decided = 0
    for pair, grade in enumerate(grades):
        best, worst = step.rollout.rewards["finished"][2 * pair : 2 * pair + 2].tolist()
        side = step.rollout.notes[2 * pair]["side"]
        assert side == int(grade.max() > grade.min())
        assert bool(step["pairs"][2 * pair]) == bool(side)
        assert step.rollout.rewards["judged"][2 * pair] == pytest.approx(float(grade.mean()))
        if side:
            decided += 1
            assert (best, worst) == (float(grade.max()), float(grade.min()))
    assert 0 < decided < 8
    assert float(step["rollout/decided"].mean()) == decided / 8
    assert best_and_worst(torch.tensor([torch.nan, 1.0, torch.nan]))[2] == 0


def test_a_pair_is_never_cut_apart_and_an_undecided_one_counts_nothing() -> None:
    method = make("dpo", samples=2)
    engine = Engine(method, make_moment(method), micro_batches=3)
    step = engine.draw()
    for micro in engine.cut(step):
        assert all(n == 2 for n in torch.bincount(micro.rollout.group)[micro.rollout.group.unique()].tolist())
    undecided = [i for i, note in enumerate(step.rollout.notes) if note["side"] == 0]
    whole = Engine(method, make_moment(method))
    (micro,) = whole.prepare(0)
    loss = float(whole.loss(micro).detach())
    part = dataclasses.replace(whole.step_batch.rows([i for i in range(16) if i not in undecided]))  # type: ignore[union-attr]
    assert undecided
    assert float(whole.loss(part).detach()) == pytest.approx(loss, rel=1e-6)


def test_a_preferred_reply_without_a_scored_token_counts_nothing() -> None:
    step = pairs_of([[-1.0, -2.0], [-1.0, -2.0]], [[-1.0, -1.0], [-1.0, -1.0]])
    assert step["pairs"].tolist() == [True, False, True, False]
    origin = step.rollout.origin.clone()
    origin[0] = int(Origin.TOOL)
    rollout = dataclasses.replace(step.rollout, origin=origin)
    columns = base_columns(rollout) | {"log_prob:reference": step["log_prob:reference"]}
    assert find_method("dpo")().weight(Batch(rollout, columns))["pairs"].tolist() == [False, False, True, False]


@pytest.fixture(scope="module")
def judge_at(tmp_path_factory: Any) -> Any:
    from transformers import Qwen3ForSequenceClassification

    from kullback.lm.tiny import build_tokenizer

    def save(outputs: int) -> str:
        path = tmp_path_factory.mktemp("judge")
        config = random_model(1).config
        config.num_labels = outputs
        torch.manual_seed(0)
        Qwen3ForSequenceClassification(config).save_pretrained(path)
        build_tokenizer().save_pretrained(path)
        return str(path)

    return save


def test_a_reward_model_judges(judge_at: Any) -> None:
    judge = reward_model(judge_at(1))
    method = make("dpo", judge="score", samples=4)
    at = make_moment(method)
    at.task.verifier = from_callable(judge)
    step = Engine(method, at).draw()
    score_of = step.rollout.rewards["score"]
    assert step["pairs"].sum() == 8  # real numbers hardly tie
    assert (score_of[::2] > score_of[1::2]).all()
    problem, text = at.task.train[0], "7 ok"
    assert judge(problem, text) == judge(problem, text) != judge(problem, "8 ok")
    with pytest.raises(ValueError, match="has 2 outputs; a reward model has one"):
        reward_model(judge_at(2))


# Refusals


def test_bad_pairs_are_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"row 0: chosen and rejected are the same text.*remove the row"):
        engine_of(rows=[{"prompt": "1+1=", "chosen": "2", "rejected": "2"}])
    alike = [{"prompt": "1+1=", "chosen": "123456", "rejected": "123457"}]
    engine = engine_of(rows=alike)
    engine.at.method = dataclasses.replace(engine.at.method, max_completion=3)
    with pytest.raises(ValueError, match=r"same first 3 tokens.*raise source\.max_completion=3"):
        engine.draw()
    with pytest.raises(ValueError, match="has no pair to learn from: give it the columns chosen and rejected"):
        engine_of(rows=[{"prompt": "1+1=", "completion": "2"}]).draw()


@pytest.mark.parametrize(("value", "shown"), [(-math.inf, "-inf"), (math.nan, "nan")])
def test_a_reference_that_cannot_write_the_response_is_refused(value: float, shown: str) -> None:
    reference = torch.tensor([[-1.0, -1.0], [-1.0, value]])
    with pytest.raises(ValueError, match=rf"problem '1': the reference gives its rejected response .*{shown}, .*drop"):
        pairs_of(torch.zeros(2, 2), reference)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"coefficient": 0.0}, "signal.coefficient=0 must be positive"),
        ({"coefficient": math.nan}, "signal.coefficient=nan must be positive"),
        ({"outer": "sigmoid"}, "write logistic, hinge"),
        ({"length": "tokens"}, "write sum or mean"),
        ({"smoothing": 0.5}, "must be in"),
        ({"clip": 0.0}, "signal.clip=0 must be positive"),
        ({"limit": 1e4}, "signal.limit=10000"),
        ({"pairs": "student"}, "needs 2 or more"),
        ({"pairs": "teacher"}, "write dataset, student or reference"),
        ({"judge": "finished"}, "would do nothing"),
        ({"redraws": 2}, "would do nothing"),
        ({"pairs": "reference", "samples": 4, "redraws": 1}, "raise source.samples"),
        ({"reference": None}, "set it to initial"),
    ],
)
def test_settings_that_cannot_be_meant(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        find_method("dpo")(**options)


def test_a_grade_nobody_gives_and_a_task_that_grades_nothing() -> None:
    method = make("dpo", judge="accuracy")
    at = make_moment(method)
    at.task.verifier = None
    with pytest.raises(ValueError, match=r"grades nothing, so no pair can be judged"):
        method.begin(at)
    method = make("dpo", judge="politeness")
    with pytest.raises(ValueError, match=r"source\.judge='politeness' is not a grade of these rows, which have accura"):
        method.source().draw(make_moment(method))
