"""One divergence, any kind of target and route: the same number where it must be, a refusal where it would be wrong."""

import dataclasses
from typing import Any

import pytest
import torch

import kullback as kb
from kullback.lm.batch import Batch, base_columns
from kullback.lm.models import Head
from kullback.lm.predictions import (
    HiddenPredictions,
    LogitPredictions,
    Predictions,
    SampledPredictions,
    TopKPredictions,
)
from kullback.lm.rollout import Origin, build_rollout
from kullback.lm.signals import match, policy
from kullback.run.terms import denominator, numerator

VOCAB, WIDTH = 13, 5


def batch_of(
    origin: Origin, *, target: Any = None, hidden: bool = True, weights: bool = False
) -> tuple[Batch, Any, torch.Tensor]:
    """Four rows, a student of hidden states (or the logits they make) and a target made by `target` from its logits."""
    draw = torch.Generator().manual_seed(0)
    lengths = [4, 2, 5, 1]
    rollout = build_rollout(
        [[1]] * 4,
        [torch.randint(VOCAB, (n,), generator=draw).tolist() for n in lengths],
        [[int(origin)] * n for n in lengths],
        log_probs=[[-1.0] * n for n in lengths],
    )
    scored, tokens = rollout.scored, rollout.completions[rollout.scored]
    states = torch.randn(len(tokens), WIDTH, generator=draw, dtype=torch.float64).requires_grad_()
    head = Head(
        torch.randn(VOCAB, WIDTH, generator=draw, dtype=torch.float64),
        torch.randn(VOCAB, generator=draw, dtype=torch.float64),
    )
    logits = torch.randn(len(tokens), VOCAB, generator=draw, dtype=torch.float64)
    model: Predictions = HiddenPredictions(scored, tokens, states, head)
    if not hidden:
        model = LogitPredictions(scored, tokens, states @ head.weight.T + head.bias)
    full = LogitPredictions(scored, tokens, logits)
    columns = base_columns(rollout)
    if weights:
        columns["half"] = scored & (torch.arange(5) % 2 == 0)
        columns["w"] = torch.where(scored, torch.rand(scored.shape, generator=draw), torch.nan)
    return Batch(rollout, columns, model, {"teacher": target(full) if target else full}), states, logits


def top_k(k: int) -> Any:
    def make(full: LogitPredictions) -> TopKPredictions:
        return TopKPredictions(full.scored, full.tokens, full.top(k), full.token_log_probs())

    return make


def gradient(term: Any, batch: Batch, states: torch.Tensor) -> tuple[float, torch.Tensor]:
    loss = numerator(term, batch.columns) / denominator(batch.columns, *term.key)
    return float(loss.detach()), torch.autograd.grad(loss, states)[0]


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "unit(jsd(0.3))", "squared_hellinger"])
@pytest.mark.parametrize("mean", ["token", "row", "row_sum", "weight"])
def test_hidden_states_logits_and_a_full_top_k_give_one_answer(name: str, mean: Any) -> None:
    options = {"mean": mean, "weight": "w", "over": "half"}
    found = []
    for hidden, target in ((True, None), (False, None), (True, top_k(VOCAB)), (False, top_k(VOCAB))):
        batch, states, _ = batch_of(Origin.DATASET, target=target, hidden=hidden, weights=True)
        found.append(gradient(match(name, batch, **options), batch, states))
    for value, grad in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(grad, found[0][1], rtol=1e-4, atol=1e-7)


def test_temperature_softens_both_sides_alike() -> None:
    found = []
    for hidden in (True, False):
        batch, states, logits = batch_of(Origin.DATASET, hidden=hidden)
        found.append(gradient(match("forward_kl", batch, temperature=1.7), batch, states))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-7)
    theirs, ours = (
        torch.distributions.Categorical(logits=x / 1.7) for x in (logits, batch.model.logits_of(slice(None)).double())
    )  # type: ignore[attr-defined]
    assert found[0][0] == pytest.approx(
        float(torch.distributions.kl_divergence(theirs, ours).detach().mean()), rel=1e-5
    )


def test_a_truncated_target_cannot_be_softened() -> None:
    batch, _, _ = batch_of(Origin.DATASET, target=top_k(3))
    with pytest.raises(ValueError, match=r"temperature=1\.7 cannot soften a target of which only target\.top_k=3"):
        match("forward_kl", batch, temperature=1.7)


def test_the_value_is_the_divergence_of_each_position() -> None:
    batch, _, logits = batch_of(Origin.TEACHER)
    term = match("forward_kl", batch)
    model = batch.model.logits_of(slice(None)).double()  # type: ignore[attr-defined]
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=model)
    )
    torch.testing.assert_close(term.value[batch["scored"]].double(), expected, rtol=1e-5, atol=1e-6)
    assert "sum teacher log(teacher / student)" in term.says


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd(0.3)", "pearson_chi2"])
@pytest.mark.parametrize(
    "options",
    [{"route": "link"}, {"route": "link", "baseline": "none"}, {"route": "link", "baseline": 3}, {"route": "squared"}],
)
def test_every_route_has_the_pathwise_gradient_in_expectation(name: str, options: dict[str, Any]) -> None:
    """All tokens at each position, each counted with the student's probability of it."""
    batch, states, _ = batch_of(Origin.STUDENT)
    exact = torch.autograd.grad(match(name, batch, mean="row_sum").value.sum(), states)[0]
    model: Any = batch.model
    p = model.logits_of(slice(None)).softmax(-1).detach()
    total = torch.zeros_like(states)
    for token in range(VOCAB):
        written = torch.full_like(model.tokens, token)
        enumerated = dataclasses.replace(
            batch,
            predictions=dataclasses.replace(model, tokens=written),
            targets={"teacher": dataclasses.replace(batch.targets["teacher"], tokens=written)},
        )
        value = match(name, enumerated, **options).value[batch["scored"]]
        total += torch.autograd.grad((value * p[:, token]).sum(), states)[0]
    torch.testing.assert_close(total, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd(0.3)"])
def test_what_sampled_routes_show_is_unbiased(name: str) -> None:
    batch, _, _ = batch_of(Origin.STUDENT)
    exact = match(name, batch).value.detach()
    model: Any = batch.model
    p = model.logits_of(slice(None)).softmax(-1).detach()
    for options in ({"route": "link"}, {"route": "squared"}):
        total = torch.zeros(len(p), dtype=torch.float64)
        for token in range(VOCAB):
            written = torch.full_like(model.tokens, token)
            enumerated = dataclasses.replace(
                batch,
                predictions=dataclasses.replace(model, tokens=written),
                targets={"teacher": dataclasses.replace(batch.targets["teacher"], tokens=written)},
            )
            shown = match(name, enumerated, **options).shown  # type: ignore[arg-type]
            assert shown is not None
            total += shown[batch["scored"]] * p[:, token]
        torch.testing.assert_close(total, exact[batch["scored"]].double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("route", ["link", "squared"])
def test_sampled_routes_are_refused_on_foreign_text(route: Any) -> None:
    batch, _, _ = batch_of(Origin.TEACHER)
    with pytest.raises(
        ValueError, match=rf"route='{route}' is right only for tokens the student sampled, but 12 of 12"
    ):
        match("reverse_kl", batch, route=route)


def test_a_tempered_sampler_is_refused_for_sampled_routes() -> None:
    batch, _, _ = batch_of(Origin.STUDENT)
    with pytest.raises(ValueError, match=r"sampling_temperature=0\.7 draws from another distribution"):
        match("reverse_kl", dataclasses.replace(batch, sampling_temperature=0.7), route="link")


def test_sampled_log_probs_serve_the_link_and_nothing_else() -> None:
    batch, states, _ = batch_of(
        Origin.STUDENT, target=lambda full: SampledPredictions(full.scored, full.tokens, full.token_log_probs())
    )
    assert float(gradient(match("reverse_kl", batch, route="link", baseline="none"), batch, states)[1].abs().max()) > 0
    with pytest.raises(ValueError, match="use route='link'"):
        match("reverse_kl", batch)
    with pytest.raises(ValueError, match=r"set signal\.baseline=none"):
        match("reverse_kl", batch, route="link")


def test_an_unknown_target_is_named() -> None:
    batch, _, _ = batch_of(Origin.STUDENT)
    with pytest.raises(ValueError, match="target='tutor' is not one of this method's: teacher"):
        match("reverse_kl", batch, target="tutor")


def test_policy_clips_as_ppo_does() -> None:
    batch, _, _ = batch_of(Origin.STUDENT)
    new = batch.model.log_probs().detach()
    old = new - torch.tensor([0.5, -0.5, 0.05, 0.0, 0.0])
    for A in (1.0, -2.0):
        columns = dict(batch.columns) | {"log_prob:student": old, "advantage": torch.full(new.shape, A)}
        term = policy(dataclasses.replace(batch, columns=columns), clip=(0.2, 0.28))
        ratio = (new - old).exp()
        expected = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.28) * A)
        torch.testing.assert_close(term.value[batch["scored"]].detach(), expected[batch["scored"]])


def test_token_log_probs_from_hidden_states_are_those_of_the_logits() -> None:
    fused, states, _ = batch_of(Origin.DATASET)
    plain, plain_states, _ = batch_of(Origin.DATASET, hidden=False)
    torch.testing.assert_close(fused.model.log_probs(), plain.model.log_probs(), rtol=1e-5, atol=1e-6)
    ours, theirs = (
        torch.autograd.grad((b.model.log_probs() ** 2).sum(), s)[0] for b, s in ((fused, states), (plain, plain_states))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_divergence_of_one_s_own_is_used_everywhere() -> None:
    mine = kb.FDivergence.from_generator(lambda u: (u - 1) ** 2, name="mine")
    ours, states, _ = batch_of(Origin.STUDENT)
    a, b = (gradient(match(which, ours), ours, states) for which in (mine, "pearson_chi2"))
    assert a[0] == pytest.approx(b[0], rel=1e-5)
    torch.testing.assert_close(a[1], b[1], rtol=1e-4, atol=1e-6)
