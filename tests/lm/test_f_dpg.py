"""f-DPG: its expected gradient is that of the divergence, whoever writes; and what it counts, skips and refuses."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch

import kullback as kb
from kullback.lm import Batch, find_method
from kullback.lm.batch import base_columns
from kullback.lm.distances import agreements
from kullback.lm.engine import Engine
from kullback.lm.ledger import Ledger
from kullback.lm.predictions import LogitPredictions
from kullback.lm.rehearse import rehearse
from kullback.lm.rollout import Origin, build_rollout
from kullback.lm.schedules import NearerToTarget
from kullback.run.terms import denominator, numerator
from kullback.theory import tabular
from tests.lm.small import gradient, make, make_moment

PAPER = ["forward_kl", "reverse_kl", "tv", "2*jsd(0.5)", "2*alpha(2)", "2*alpha(-1)"]
WITH_ZEROS = ["forward_kl", "tv", "2*jsd(0.5)", "2*alpha(2)"]
VOCAB, LENGTH = 3, 3
SEQUENCES = list(itertools.product(range(VOCAB), repeat=LENGTH))
TOKENS = torch.tensor(SEQUENCES)
PREFIXES = torch.tensor(
    [
        [sum(VOCAB**k for k in range(t)) + sum(s[j] * VOCAB ** (t - 1 - j) for j in range(t)) for t in range(LENGTH)]
        for s in SEQUENCES
    ]
)


def method(divergence: str, **changes: Any) -> Any:
    settings = {"score": "posterior(accuracy, beta=0.7)", "divergence": divergence, "baseline": "none"}
    return find_method("f_dpg")(**(settings | changes))  # type: ignore[arg-type]


def token_log_probs(logits: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1)[PREFIXES].gather(-1, TOKENS[..., None])[..., 0]


def language_models() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    prefixes = sum(VOCAB**t for t in range(LENGTH))
    reference, model = torch.randn(2, prefixes, VOCAB, generator=draw, dtype=torch.float64)
    return reference, model.requires_grad_(), torch.randint(0, 2, (len(SEQUENCES),), generator=draw).double()


def found(method: Any, ledger: Ledger | None = None, repeat: int = 1) -> torch.Tensor:
    """The gradient of the method's own term where every completion is drawn once, as a uniform proposal does."""
    reference, model, reward = language_models()
    rows = len(SEQUENCES) * repeat
    tokens, places = TOKENS.repeat(repeat, 1), PREFIXES.repeat(repeat, 1)
    rollout = build_rollout(
        [[0]] * rows,
        tokens.tolist(),
        [[int(Origin.STUDENT)] * LENGTH] * rows,
        log_probs=[[-math.log(VOCAB)] * LENGTH] * rows,
        group=[0] * rows,
        notes=[{"problem_id": "one"}] * rows,
    )
    rollout = dataclasses.replace(
        rollout,
        rewards={"accuracy": reward.repeat(repeat)},
        log_probs=torch.full(tokens.shape, -math.log(VOCAB), dtype=torch.float64),
    )
    ours, theirs = (
        LogitPredictions(rollout.scored, tokens.flatten(), table[places].flatten(0, 1)) for table in (model, reference)
    )
    columns = base_columns(rollout) | {
        "log_prob:student": ours.log_probs().detach(),
        "log_prob:reference": theirs.log_probs(),
    }
    step = Batch(rollout, columns, aggregate="row_sum", ledger=ledger or Ledger())
    step = dataclasses.replace(step, columns=columns | method.weight(step), predictions=ours)
    (term,) = method.signal(step)
    term = dataclasses.replace(term, mean="row_sum")
    loss = numerator(term, step.columns) / denominator(step.columns, *term.key)
    return torch.autograd.grad(loss, model)[0]


def exact(divergence: str, target: torch.Tensor) -> torch.Tensor:
    """grad D(p, model), both summed over all completions; p is given without its normaliser."""
    _, model, _ = language_models()
    D = kb.divergence(divergence)
    return torch.autograd.grad(D.from_log_probs(target.log_softmax(-1), token_log_probs(model).sum(1)), model)[0]


def log_target(beta: float = 0.7) -> torch.Tensor:
    reference, _, reward = language_models()
    return token_log_probs(reference).sum(1) + reward / beta


@pytest.mark.parametrize("name", sorted({*PAPER, *kb.divergences()}))
def test_all_completions_together_descend_the_divergence(name: str) -> None:
    """Whole completions of a language model, proposals uniform: the term's gradient is that of D(p, model)."""
    name = {"alpha": "alpha(0.3)", "renyi": "renyi(0.5)"}.get(name, name)
    torch.testing.assert_close(found(method(name, proposal="lagged")), exact(name, log_target()), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", WITH_ZEROS)
def test_completions_that_the_target_forbids_are_left(name: str) -> None:
    """log P = -inf: f'(inf) takes their mass away, exactly, without NaN."""
    reference, _, reward = language_models()
    forbidden = torch.where(reward == 1, token_log_probs(reference).sum(1), -torch.inf)
    torch.testing.assert_close(
        found(method(name, proposal="lagged", score="pointwise(accuracy)")),
        exact(name, forbidden),
        rtol=1e-6,
        atol=1e-9,
    )


@pytest.mark.parametrize("name", ["reverse_kl", "2*alpha(-1)", "jeffreys"])
def test_divergences_without_zeros_refuse_them_unless_there_is_a_floor(name: str) -> None:
    with pytest.raises(ValueError, match=r"is infinite where the target is 0, .*floor=-8"):
        method(name, score="pointwise(accuracy)")
    reference, _, reward = language_models()
    floored = token_log_probs(reference).sum(1) + torch.where(reward == 1, 0.0, -4.0)
    torch.testing.assert_close(
        found(method(name, proposal="lagged", score="pointwise(accuracy, floor=-4)")), exact(name, floored),
        rtol=1e-6, atol=1e-9,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["forward_kl", "2*jsd(0.5)", "tv"])
def test_the_scale_of_the_target_changes_nothing(name: str) -> None:
    """The reference's probabilities times a constant: Z takes it out again."""
    plain = found(method(name, proposal="lagged"))
    scaled = found(method(name, proposal="lagged", score="mixture(posterior(accuracy, beta=0.7), shares=[37.5])"))
    torch.testing.assert_close(scaled, plain, rtol=1e-9, atol=1e-12)


def test_products_and_mixtures_are_targets() -> None:
    reference, _, reward = language_models()
    both = token_log_probs(reference).sum(1) + reward / 2 + reward / 3
    score = "posterior(accuracy, beta=2) * posterior(accuracy, beta=3)"
    torch.testing.assert_close(
        found(method("tv", proposal="lagged", score=score)), exact("tv", both), rtol=1e-6, atol=1e-9
    )
    mixed = token_log_probs(reference).sum(1) + (0.3 * (reward / 2).exp() + 0.7 * reward).log()
    score = "mixture(posterior(accuracy, beta=2), pointwise(accuracy), shares=[0.3, 0.7])"
    torch.testing.assert_close(
        found(method("forward_kl", proposal="lagged", score=score)), exact("forward_kl", mixed), rtol=1e-6, atol=1e-9
    )


def test_the_target_itself_is_at_rest() -> None:
    """Posterior under a vanishing reward is the reference; a model equal to it has no gradient, in any divergence."""
    policy = torch.tensor([0.125, 0.25, 0.625], dtype=torch.float64)
    for name in PAPER:
        if name == "tv":  # rounding decides the sign of a log-ratio of 0; the sign of an exact one is 0
            assert float(kb.divergence(name).link(torch.zeros(1))) == 0
        else:
            assert float(one_token(name, policy, policy, torch.zeros(3)).abs().max()) < 1e-9


def one_token(
    name: str, policy: torch.Tensor, drawn: torch.Tensor, factor: torch.Tensor, **changes: Any
) -> torch.Tensor:
    """The gradient of one-token completions, each drawn 8 times its probability in `drawn`: no sampling error."""
    counts = (8 * drawn).round().long()
    tokens = torch.repeat_interleave(torch.arange(3), counts)
    rows = len(tokens)
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64) if factor.any() else policy
    logits = policy.log().requires_grad_()
    rollout = build_rollout(
        [[0]] * rows, tokens[:, None].tolist(), [[int(Origin.STUDENT)]] * rows, notes=[{"problem_id": "one"}] * rows,
        group=[0] * rows,
    )  # fmt: skip
    rollout = dataclasses.replace(
        rollout, rewards={"accuracy": factor[tokens].double()}, log_probs=drawn.log()[tokens][:, None]
    )
    ours = LogitPredictions(rollout.scored, tokens, logits.expand(rows, 3))
    columns = base_columns(rollout) | {
        "log_prob:student": ours.log_probs().detach(),
        "log_prob:reference": reference.log()[tokens][:, None],
    }
    options = {"score": "posterior(accuracy, beta=1)", "proposal": "lagged"} | changes
    chosen = method(name, **options)
    step = Batch(rollout, columns, aggregate="row_sum")
    step = dataclasses.replace(step, columns=columns | chosen.weight(step), predictions=ours)
    (term,) = chosen.signal(step)
    loss = numerator(dataclasses.replace(term, mean="row_sum"), step.columns) / rows
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("name", PAPER)
def test_the_proposal_and_the_baseline_change_no_expectation(name: str) -> None:
    policy = torch.tensor([0.125, 0.25, 0.625], dtype=torch.float64)
    other = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    factor = torch.tensor([0.0, 1.0, -0.5])
    target = (torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log() + factor).log_softmax(-1)
    right = tabular.gradient(lambda p: kb.divergence(name).from_log_probs(target, p), policy.log())
    online = one_token(name, policy, policy, factor, proposal="student")
    for way in (online, one_token(name, policy, policy, factor), one_token(name, policy, other, factor)):
        torch.testing.assert_close(way, right, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", PAPER)
def test_the_gradient_theorem_by_finite_differences(name: str) -> None:
    """grad sum p f(model / p), with the table's own f, = sum model f'(model / p) grad log model."""
    draw = torch.Generator().manual_seed(4)
    logits, target = torch.randn(2, 7, generator=draw, dtype=torch.float64)
    p, D = target.softmax(-1), kb.divergence(name)
    curves = {
        "forward_kl": lambda t: -t.log(),
        "reverse_kl": lambda t: t * t.log(),
        "tv": lambda t: (t - 1).abs() / 2,
        "2*jsd(0.5)": lambda t: t * (2 * t / (t + 1)).log() + (2 / (t + 1)).log(),
        "2*alpha(2)": lambda t: (t - 1) ** 2 / t,
        "2*alpha(-1)": lambda t: (t - 1) ** 2,
    }

    def value(x: torch.Tensor) -> torch.Tensor:
        return (p * curves[name](x.softmax(-1) / p)).sum()

    step, eye = 1e-5, torch.eye(7, dtype=torch.float64)
    finite = torch.stack([(value(logits + step * e) - value(logits - step * e)) / (2 * step) for e in eye])
    policy = logits.log_softmax(-1)
    score = tabular.score_gradient(policy, D.link(p.log() - policy) + 5.0)  # any constant
    torch.testing.assert_close(score, finite, rtol=1e-7, atol=3e-9)
    assert float(D.from_log_probs(p.log(), policy)) == pytest.approx(float(value(logits)), rel=1e-10)


@pytest.mark.parametrize("name", PAPER)
def test_differentiating_through_the_ratio_is_another_gradient(name: str) -> None:
    """Card 02, pitfall b: without the detachment the expectation changes for every row but total variation."""
    draw = torch.Generator().manual_seed(5)
    logits, target = torch.randn(2, 7, generator=draw, dtype=torch.float64)
    p, D = target.log_softmax(-1), kb.divergence(name)

    def leaky(x: torch.Tensor) -> torch.Tensor:
        return (x.detach().exp() * D.link(p - x) * x).sum()

    right = tabular.gradient(lambda x: D.from_log_probs(p, x), logits)
    apart = float((tabular.gradient(leaky, logits) - right).abs().max())
    assert (apart < 1e-9) == (name == "tv")


def test_a_wrong_normaliser_bends_jsd_and_tv_alone() -> None:
    """Card 02, pitfall g: log Z off by 0.7 shifts reverse KL's reward and rescales a power's; JS and TV turn."""
    draw = torch.Generator().manual_seed(6)
    policy, target = torch.randn(2, 9, generator=draw, dtype=torch.float64).log_softmax(-1)
    for name in PAPER:
        D = kb.divergence(name)
        right, off = (tabular.score_gradient(policy, D.link(target - policy + shift)) for shift in (0.0, 0.7))
        cosine = float(torch.nn.functional.cosine_similarity(right, off, dim=0))
        assert (cosine > 1 - 1e-9) == (name not in ("tv", "2*jsd(0.5)")), name


def test_reverse_kl_with_a_posterior_is_penalised_rl() -> None:
    """grad D = -(1 / beta) grad (E r - beta KL(policy || reference))."""
    beta = 0.7
    reference, model, reward = language_models()
    log_p, prior = token_log_probs(model).sum(1), token_log_probs(reference).sum(1)
    J = (log_p.exp() * (reward - beta * (log_p - prior))).sum()
    (rl,) = torch.autograd.grad(J, model)
    torch.testing.assert_close(found(method("reverse_kl", proposal="lagged")), -rl / beta, rtol=1e-6, atol=1e-9)


def test_the_window_is_what_came_before() -> None:
    """No baseline in the first step; then the mean of the last pseudo-rewards, without the step's own."""
    chosen, ledger = method("forward_kl", proposal="lagged", baseline="window", window=5), Ledger()
    torch.testing.assert_close(found(chosen, ledger), found(method("forward_kl", proposal="lagged")))
    before = ledger.last("pseudo_reward")
    assert len(before) == 5
    other = Ledger()
    other.restore(ledger.state())  # a resumed run
    again, resumed = found(chosen, ledger), found(chosen, other)
    assert torch.equal(again, resumed)
    torch.testing.assert_close(
        again, found(method("forward_kl", proposal="lagged")), rtol=1e-6, atol=1e-9
    )  # in expectation
    ledger.push("pseudo_reward", torch.tensor([math.nan, 7.0]), 3)
    assert ledger.last("pseudo_reward")[-1] == 7.0
    assert len(ledger.last("pseudo_reward")) == 3


def test_a_baseline_has_neither_its_own_row_nor_one_without_a_target() -> None:
    """Pseudo-rewards and advantages of two prompts, one grade unknown, next to loops; w is 1."""
    draw = torch.Generator().manual_seed(8)
    ours, theirs = -torch.rand(2, 6, 2, generator=draw, dtype=torch.float64)
    rollout = build_rollout([[0]] * 6, [[1, 1]] * 6, [[int(Origin.STUDENT)] * 2] * 6, group=[0, 0, 0, 1, 1, 1],
                            notes=[{"problem_id": name} for name in "aaabbb"])  # fmt: skip
    reward = torch.tensor([1.0, 0, 1, 0, torch.nan, 1], dtype=torch.float64)
    rollout = dataclasses.replace(rollout, rewards={"accuracy": reward})
    columns = base_columns(rollout) | {"log_prob:student": ours, "log_prob:reference": theirs}
    log_P, log_m = theirs.sum(1) + reward / 0.7, ours.sum(1)
    groups = [[0, 1, 2], [3, 5]]
    g = torch.full((6,), torch.nan, dtype=torch.float64)
    for rows in groups:
        Z = (log_P[rows] - log_m[rows]).exp().mean()
        g[rows] = -kb.divergence("reverse_kl").link(log_P[rows] - Z.log() - log_m[rows])
    before = torch.tensor([0.5, -2.0, 4.0])
    wanted = {
        "none": [0.0] * 6,
        "window": [2.5 / 3] * 6,
        "leave_one_out": [float(g[[j for j in groups[i // 3] if j != i]].mean()) for i in range(6)],
    }
    for baseline, expected in wanted.items():
        ledger = Ledger()
        ledger.push("pseudo_reward", before, 99)
        step = Batch(rollout, columns, ledger=ledger)
        found = method("reverse_kl", baseline=baseline, window=99).weight(step)
        torch.testing.assert_close(found["rollout/pseudo_reward"], g, equal_nan=True)
        torch.testing.assert_close(
            found["advantage"], (g - torch.tensor(expected, dtype=torch.float64)).nan_to_num(0.0)
        )
        assert found["trained"].all(1).tolist() == [True] * 4 + [False, True]
        assert len(ledger.last("pseudo_reward")) == (8 if baseline == "window" else 3)


def test_prompts_without_a_normaliser_are_skipped_and_counted() -> None:
    changes = {"score": "pointwise(accuracy)", "divergence": "forward_kl", "samples": 4}
    chosen = make("f_dpg", **changes)  # an untrained student is never right
    engine = Engine(chosen, make_moment(chosen))
    loss, nothing = gradient(engine)
    assert loss == 0
    assert float(nothing.abs().max()) == 0
    assert engine.metrics()["rollout/skipped"] == 1.0
    some = make("f_dpg", **(changes | {"score": "pointwise(finished)"}))
    at = make_moment(some)
    engine = Engine(some, at)
    gradient(engine)
    step = engine.step_batch
    assert step is not None
    good = {}
    for note, finished in zip(step.rollout.notes, step.rollout.rewards["finished"].tolist(), strict=True):
        good[note["problem_id"]] = good.get(note["problem_id"], False) or finished == 1
    kept = [good[note["problem_id"]] for note in step.rollout.notes]
    assert step["trained"].any(1).tolist() == kept
    assert engine.metrics()["rollout/skipped"] == pytest.approx(1 - sum(kept) / len(kept))


def test_normalisers_of_a_prompt_are_means_over_all_its_completions() -> None:
    chosen = make("f_dpg", divergence="forward_kl")
    at = make_moment(chosen)
    at.task.train = at.task.train[:8]
    engine = Engine(chosen, at)
    seen: dict[str, list[float]] = {}
    for draw in range(3):
        at.step = draw
        step = engine.draw()
        reference, student = (
            (step[f"log_prob:{name}"] * step["scored"]).double().sum(1) for name in ("reference", "student")
        )
        weighed = (reference - student + 2 * step.rollout.rewards["finished"]).exp()
        for note, value in zip(step.rollout.notes, weighed.tolist(), strict=True):
            seen.setdefault(note["problem_id"], []).append(value)
    ids = list(seen)
    wanted = torch.tensor([sum(seen[i]) / len(seen[i]) for i in ids], dtype=torch.float64)
    torch.testing.assert_close(at.ledger.mean("normaliser", ids), wanted, rtol=1e-5, atol=1e-8)
    assert len(seen[ids[0]]) == 9
    limit = float(wanted.median())
    limited = make("f_dpg", divergence="forward_kl", max_z=limit)
    low = make_moment(limited)
    low.task.train = low.task.train[:8]
    Engine(limited, low).draw()
    first = torch.tensor([seen[i][:3] for i in ids], dtype=torch.float64)
    assert bool((first > limit).any())
    torch.testing.assert_close(
        low.ledger.mean("normaliser", ids), first.clamp(max=limit).mean(1), rtol=1e-4, atol=1e-12
    )


def test_a_lagged_proposal_writes_and_is_renewed() -> None:
    chosen = make("f_dpg", proposal="lagged", proposal_every=3, proposal_gate=False)
    assert [len(chosen.after(step)) for step in range(1, 7)] == [0, 0, 1, 0, 0, 1]
    assert not dataclasses.replace(chosen, adopt=0).after(3)
    at = make_moment(chosen)
    at.players["proposal"] = at.players["teacher"]  # another model
    engine = Engine(chosen, at)
    engine.prepare(0)
    step = engine.step_batch
    assert step is not None
    assert {note["source"] for note in step.rollout.notes} == {"proposal"}
    weight = step["rollout/importance"]
    expected = (
        ((step["log_prob:student"] - step.rollout.log_probs).nan_to_num(0) * step["scored"]).double().sum(1).exp()
    )
    torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-6)
    capped = make("f_dpg", proposal="lagged", cap=0.3)
    limited = capped.weight(dataclasses.replace(step, ledger=Ledger()))["rollout/importance"]
    torch.testing.assert_close(limited, weight.clamp(max=0.3))
    assert chosen.players()["proposal"] == "initial"
    assert find_method("f_dpg")(score="posterior(accuracy, beta=1)").players()["proposal"] is None  # type: ignore[call-arg]
    at.method = capped


def test_the_gate_renews_a_proposal_only_when_the_student_is_nearer() -> None:
    gate = NearerToTarget(3)
    student, proposal = gate.reads
    state, written = gate.start()
    assert written == {"source.adopt": 0.0}
    state, written = gate.update(state, 0, {})
    assert written["source.adopt"] == 0.0
    state, written = gate.update(state, 1, {student: 1.0, proposal: 1.5})
    assert written["source.adopt"] == 1.0
    state, written = gate.update(state, 2, {student: 2.0, proposal: 1.0})
    assert written["source.adopt"] == 0.0  # over the interval the proposal is nearer
    state, written = gate.update(state, 3, {student: 0.9, proposal: 1.0})
    assert written["source.adopt"] == 1.0  # a new interval


def test_multipliers_are_fitted_before_the_first_step() -> None:
    """The reference finishes at some rate; under p its mean over the prompts is the one that is asked for."""
    plain = make("f_dpg", score="pointwise(finished)", divergence="forward_kl", samples=64)
    rate = float(plain.source().draw(make_moment(plain)).rewards["finished"].mean())
    wanted = (rate + 1) / 2
    chosen = make("f_dpg", score=f"distributional(finished={wanted:.3f})", fit_prompts=8, fit_samples=64)
    at = make_moment(chosen)
    engine = Engine(chosen, at)
    engine.begin()
    (lam,) = at.ledger.mean("multiplier", ["finished"]).tolist()
    assert lam > 0
    drawing = dataclasses.replace(at, method=dataclasses.replace(chosen, samples=64))
    source = dataclasses.replace(chosen.source(), player="reference")
    finished = source.write(at.problems(), drawing).rewards["finished"].double().view(8, 64)
    weights = (lam * finished).softmax(1)
    assert float((weights * finished).sum(1).mean()) == pytest.approx(round(wanted, 3), abs=1e-6)
    gradient(engine)
    assert math.isfinite(engine.metrics()["rollout/target_finished"])


def test_multipliers_are_fitted_where_every_grade_is_known() -> None:
    """A prompt whose verifier failed once is as if it had not been drawn."""
    found = []
    for broken in (False, True):
        chosen = make("f_dpg", score="distributional(even=0.6)", fit_prompts=8, fit_samples=8)
        at = make_moment(method("forward_kl", max_completion=12))
        at.task.verifier = lambda problem, text: {"accuracy": 0.0, "even": float(len(text) % 2)}
        at.method, placed = chosen, at.problems()
        drawn = [problem.id for _, problem in placed]
        if broken:
            calls = dict.fromkeys(drawn, 0)

            def verify(problem: Any, text: str, calls: Any = calls, drawn: Any = drawn) -> dict[str, float]:
                calls[problem.id] += 1
                failed = problem.id in drawn[:3] and calls[problem.id] == 2
                return {"accuracy": 0.0, "even": math.nan if failed else float(len(text) % 2)}

            at.task.verifier = verify
        else:
            at.problems = lambda turn=0, rest=placed[3:]: rest  # type: ignore[method-assign]
        chosen.begin(at)
        found.append(float(at.ledger.mean("multiplier", ["even"])))
    assert found[1] == pytest.approx(found[0], rel=1e-9)
    assert math.isfinite(found[0])


def test_moments_that_nothing_meets_are_answered_before_the_first_step() -> None:
    chosen = make("f_dpg", score="distributional(accuracy=0.5)", fit_prompts=8, fit_samples=4)
    with pytest.raises(
        ValueError, match=r"target\.score='distributional\(accuracy=0\.5\)': moments\[0\]=0\.5 can be met"
    ):
        Engine(chosen, make_moment(chosen)).begin()


def test_the_metrics_are_estimates_of_what_they_are_called() -> None:
    """Means over a uniform proposal of all completions: KLs, total variation and the loss itself, exactly."""
    reference, model, reward = language_models()
    chosen = method("2*jsd(0.5)", proposal="lagged")
    rows = len(SEQUENCES)
    rollout = build_rollout(
        [[0]] * rows, TOKENS.tolist(), [[int(Origin.STUDENT)] * LENGTH] * rows, notes=[{"problem_id": "one"}] * rows,
        group=[0] * rows,
    )  # fmt: skip
    rollout = dataclasses.replace(
        rollout,
        rewards={"accuracy": reward},
        log_probs=torch.full((rows, LENGTH), -math.log(VOCAB), dtype=torch.float64),
    )
    log_m, log_a = token_log_probs(model).detach(), token_log_probs(reference)
    step = Batch(
        rollout, base_columns(rollout) | {"log_prob:student": log_m, "log_prob:reference": log_a}, aggregate="row_sum"
    )
    seen = {name: float(values.mean()) for name, values in chosen.weight(step).items() if name.startswith("rollout/")}
    p, m, a = log_target().log_softmax(-1), log_m.sum(1), log_a.sum(1)
    wanted = {name: kb.divergence(name).from_log_probs(p, m) for name in ("forward_kl", "reverse_kl", "tv")}
    for name, value in wanted.items():
        assert seen[f"rollout/target_{name}"] == pytest.approx(float(value), rel=1e-9)
    assert seen["rollout/divergence"] == pytest.approx(
        float(kb.divergence("2*jsd(0.5)").from_log_probs(p, m)), rel=1e-9
    )
    assert seen["rollout/reference_kl"] == pytest.approx(
        float(kb.divergence("reverse_kl").from_log_probs(a, m)), rel=1e-9
    )
    assert seen["rollout/completion_entropy"] == pytest.approx(float(tabular.entropy(m)), rel=1e-9)
    assert seen["rollout/log_normaliser"] == pytest.approx(float(torch.logsumexp(log_target(), 0)), rel=1e-9)
    assert seen["rollout/target_accuracy"] == pytest.approx(float(p.exp() @ reward), rel=1e-9)
    uniform = torch.full((rows,), -math.log(rows), dtype=torch.float64)
    assert seen["rollout/proposal_forward_kl"] == pytest.approx(
        float(kb.divergence("forward_kl").from_log_probs(p, uniform)), rel=1e-9
    )
    assert seen["rollout/repeated"] == 0.0


def test_repeated_completions_are_counted() -> None:
    rollout = build_rollout(
        [[0]] * 6, [[1, 2], [1, 2], [1], [3], [3], [3]], [[2, 2], [2, 2], [2], [2], [2], [2]], group=[0, 0, 0, 1, 1, 2]
    )
    shares = agreements(rollout).tolist()
    assert shares[:5] == [0.5, 0.5, 0.0, 1.0, 1.0]
    assert math.isnan(shares[5])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"samples": 1}, r"source\.samples=1: .* at least 2"),
        ({"sampling_temperature": 0.7}, r"source\.sampling_temperature=0\.7 draws from another"),
        ({"reference": None}, r"target\.reference is missing"),
        ({"max_z": 0.0}, r"weight\.max_z=0 must be positive"),
        ({"cap": -1.0}, r"weight\.cap=-1 must be positive"),
        ({"window": 0}, r"weight\.window=0 must be at least 1"),
        ({"fit_samples": 1}, r"target\.fit_samples=1 must be at least 2"),
        ({"score": "accuracy"}, r"target\.score='accuracy' is not understood"),
    ],
)
def test_bad_settings_are_answered(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        method("forward_kl", **changes)


def test_the_objective_says_its_target() -> None:
    (term,) = rehearse(method("tv", score="pointwise(finished) * posterior(accuracy, beta=0.2)"))
    assert "P = reference * (1 where finished is 1, else 0) * exp(accuracy / 0.2)" in term.says
    assert "tv of whole completions to p = P / Z" in term.says
