"""Every named divergence in every form: the expected gradient, by enumeration, is that of the objective it names."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch

import kullback as kb
from docs.gradients import FORMS, NAMES, compare, expected_gradient, true_gradient, verdict
from kullback.lm import Batch, find_method, match
from kullback.lm.batch import base_columns
from kullback.lm.predictions import LogitPredictions
from kullback.lm.rehearse import rehearse
from kullback.lm.rollout import Origin, build_rollout
from kullback.lm.signals import ESTIMATORS

VOCAB, LENGTH = 3, 3
SEQUENCES = list(itertools.product(range(VOCAB), repeat=LENGTH))
TOKENS = torch.tensor(SEQUENCES)
PREFIXES = torch.tensor(  # where each token's distribution stands in a table of all prefixes
    [
        [sum(VOCAB**k for k in range(t)) + sum(s[j] * VOCAB ** (t - 1 - j) for j in range(t)) for t in range(LENGTH)]
        for s in SEQUENCES
    ]
)
ROWS = len(SEQUENCES)


def tables() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of two language models at every prefix, and a reward of every completion."""
    draw = torch.Generator().manual_seed(3)
    prefixes = sum(VOCAB**t for t in range(LENGTH))
    reference, model = torch.randn(2, prefixes, VOCAB, generator=draw, dtype=torch.float64)
    return reference, model.requires_grad_(), torch.randint(0, 5, (ROWS,), generator=draw) / 4


def token_log_probs(logits: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1)[PREFIXES].gather(-1, TOKENS[..., None])[..., 0]


def objective(name: str, horizon: str, penalty: float) -> torch.Tensor:
    """The gradient of -E[reward] + penalty * divergence, from the enumerated objective itself."""
    reference, model, reward = tables()
    D, log_p = kb.divergence(name), token_log_probs(model)
    p = log_p.sum(1).exp()
    before = torch.cat([torch.zeros(ROWS, 1), log_p.cumsum(1)[:, :-1]], 1).exp()  # how likely each prefix is
    at_prefix = D.categorical(reference[PREFIXES], model[PREFIXES])
    follow = torch.tensor([VOCAB ** (LENGTH - t) for t in range(LENGTH)])  # completions that share a prefix
    if horizon == "token":
        cost = (before.detach() * at_prefix / follow).sum()
    elif horizon == "sequence":
        cost = (before * at_prefix / follow).sum()
    else:
        cost = D.from_log_probs(token_log_probs(reference).sum(1), log_p.sum(1))
    return torch.autograd.grad(penalty * cost - (p * reward).sum(), model)[0]


def found(method: Any, pairs: bool = False) -> torch.Tensor:
    """The gradient of the method's own terms, every completion (or pair of them) weighted by its probability."""
    reference, model, reward = tables()
    p = token_log_probs(model).detach().sum(1).exp()
    index = torch.arange(ROWS)
    weight, group, width = p, list(range(ROWS)), 1
    if pairs:
        index = torch.cartesian_prod(index, index).flatten()
        weight, width = (p[:, None] * p).flatten().repeat_interleave(2), 2
        group = [i // 2 for i in range(len(index))]
    tokens, places = TOKENS[index], PREFIXES[index]
    rollout = build_rollout(
        [[0]] * len(index),
        tokens.tolist(),
        [[int(Origin.STUDENT)] * LENGTH] * len(index),
        group=group,
        rewards=[{"accuracy": float(r)} for r in reward[index]],
    )
    rollout = dataclasses.replace(rollout, rewards={"accuracy": reward[index].double()})
    ours, theirs = (
        LogitPredictions(rollout.scored, tokens.flatten(), table[places].flatten(0, 1)) for table in (model, reference)
    )
    columns = base_columns(rollout)
    for score in method.scores:
        kind, _, who = score.partition(":")
        if kind == "log_prob":
            columns[score] = {"student": ours, "reference": theirs}[who].log_probs().detach()
        else:
            columns[score] = kb.divergence(kind).categorical(reference[places], model[places]).detach()
    step = Batch(rollout, columns, aggregate="row_sum")
    step = dataclasses.replace(step, columns=columns | method.weight(step))
    step = dataclasses.replace(step, predictions=ours, targets={"reference": theirs})
    total = torch.zeros((), dtype=torch.float64)
    for term in method.signal(step):
        total = total + term.coefficient * (weight / width * term.value.sum(1)).sum()
    return torch.autograd.grad(total, model)[0]


def grpo(name: str, form: str, horizon: str, **changes: Any) -> Any:
    settings = {"samples": 2, "baseline": "none", "scale": "none", "aggregate": "row_sum", "max_completion": 1}
    penalty = {"penalty": 0.7, "divergence": name, "form": form, "horizon": horizon, "reference": "initial"}
    return find_method("grpo")(**(settings | penalty | changes))  # type: ignore[arg-type]


def test_the_table_is_the_family() -> None:
    assert {name.partition("(")[0] for name in NAMES} == set(kb.divergences())
    assert len(NAMES) == 13


CASES = [
    *[(form, horizon) for form in ("loss", "ratio", "exact", "reward") for horizon in ("token", "sequence")],
    ("reward", "whole"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("form", "horizon"), CASES)
def test_reward_and_penalty_descend_the_enumerated_objective(name: str, form: str, horizon: str) -> None:
    torch.testing.assert_close(found(grpo(name, form, horizon)), objective(name, horizon, 0.7), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("form", "horizon"), CASES)
def test_a_group_s_others_are_a_baseline_that_biases_nothing(form: str, horizon: str) -> None:
    for name in ("reverse_kl", "jsd(0.5)"):
        method = grpo(name, form, horizon, baseline="leave_one_out")
        torch.testing.assert_close(found(method, pairs=True), objective(name, horizon, 0.7), rtol=1e-10, atol=1e-10)


def test_the_group_s_own_mean_shrinks_the_gradient() -> None:
    """Of two rows the mean takes half of the reward's gradient away: GRPO's and Dr. GRPO's baseline."""
    method = grpo("reverse_kl", "loss", "token", baseline="group", penalty=0.0)
    torch.testing.assert_close(
        found(method, pairs=True), 0.5 * objective("reverse_kl", "token", 0.0), rtol=1e-10, atol=1e-10
    )


def test_fixed_prefixes_are_not_the_whole_story() -> None:
    """The horizons are different objectives; for reverse KL alone the last two are one (the chain rule)."""
    for name in ("reverse_kl", "forward_kl", "jsd(0.5)"):
        token, sequence, whole = (objective(name, horizon, 1.0) for horizon in ("token", "sequence", "whole"))
        assert float((token - sequence).abs().max()) > 1e-3
        same = float((sequence - whole).abs().max()) < 1e-10
        assert same == (name == "reverse_kl")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_one_token(name: str, form: str) -> None:
    """The offered ones are right for every divergence; the others are what the page says."""
    if not kb.divergence(name).smooth and "k2" in form:
        return
    error, length, _ = compare(name, form, pairs=5)
    offered = form in ("loss: squared", "loss: ratio", "reward: -link")
    same = name == "reverse_kl" and form in ("loss: k2", "reward: -k1")
    assert (error < 1e-10) == (offered or same)
    assert (length < 1e-10) == (name == "reverse_kl" and form == "loss: k1")


def test_what_k3_does_instead() -> None:
    reverse, forward = kb.divergence("reverse_kl"), kb.divergence("forward_kl")
    target, logits = torch.randn(2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    right, other = (true_gradient(D, target, logits) for D in (reverse, forward))
    torch.testing.assert_close(expected_gradient(FORMS["loss: k3"], reverse, target, logits), other)
    torch.testing.assert_close(expected_gradient(FORMS["reward: -k3"], reverse, target, logits), right - other)
    k3_times_ratio = expected_gradient(FORMS["loss: ratio"], reverse, target, logits)  # as in DeepSeek-V3.2
    torch.testing.assert_close(k3_times_ratio, right)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("route", ["link", "squared", "ratio"])
def test_stale_text_is_weighted_by_the_ratio(name: str, route: Any) -> None:
    """All tokens of an older policy: with the ratio the gradient is that of D at the model of now."""
    draw = torch.Generator().manual_seed(1)
    target, old, model = torch.randn(3, VOCAB, generator=draw, dtype=torch.float64)
    model.requires_grad_()

    def gradient(corrected: bool) -> torch.Tensor:
        rollout = build_rollout([[0]] * VOCAB, [[v] for v in range(VOCAB)], [[int(Origin.STUDENT)]] * VOCAB)
        tokens = torch.arange(VOCAB)
        ours, theirs = (
            LogitPredictions(rollout.scored, tokens, logits.expand(VOCAB, VOCAB)) for logits in (model, target)
        )
        columns = base_columns(rollout) | {"log_prob:student": old.log_softmax(-1)[:, None]}
        batch = Batch(rollout, columns, predictions=ours, targets={"teacher": theirs})
        term = match(name, batch, route=route, baseline="none", corrected=corrected)
        return torch.autograd.grad((old.softmax(-1) * term.value[:, 0]).sum(), model)[0]

    right = true_gradient(kb.divergence(name), target, model)
    torch.testing.assert_close(gradient(True), right, rtol=1e-10, atol=1e-10)
    if route == "squared":
        assert float((gradient(False) - right).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_are_answered_with_what_they_do(name: str) -> None:
    with pytest.raises(ValueError, match=rf"signal\.form='{name}': .*write route="):
        grpo("reverse_kl", name, "token")


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "value"])
def test_an_estimator_s_bare_name_is_answered_for_both_uses(name: str) -> None:
    with pytest.raises(ValueError, match=r"an estimate of a value, not of a gradient: as a loss, .*; as a reward"):
        grpo("reverse_kl", name, "token")


def test_the_figure_says_right_where_a_form_is_offered() -> None:
    assert verdict("reverse_kl", "loss: k1") == "zero"
    assert verdict("tv", "loss: k2") == "none"
    assert verdict("forward_kl", "reward: -k1").startswith("-")


def test_the_objective_names_its_penalty() -> None:
    (term,) = rehearse(find_method("grpo")(penalty=0.1, reference="initial", form="reward", horizon="sequence"))  # type: ignore[call-arg]
    assert "0.1 times the link of reverse_kl" in term.says
    assert "later reverse_kl" in term.says
