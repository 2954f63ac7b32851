"""GRPO next to TRL's on the same batch, its sampling, and what it refuses."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from kullback.lm import Batch, find_method, sampling, sources
from kullback.lm.advantages import group_advantage
from kullback.lm.batch import base_columns
from kullback.lm.engine import Engine
from kullback.lm.predictions import LogitPredictions
from kullback.lm.rehearse import objective, rehearse
from kullback.lm.rollout import Origin, Rollout, build_rollout, concatenate
from kullback.lm.signals import policy
from kullback.run.terms import multipliers
from tests.lm.small import gradient, make, make_moment, random_model

PLAIN = {"penalty": 0.0, "horizon": "token", "correction": None, "redraws": 0, "scale": "group"}


def log_probs(model: Any, rollout: Rollout) -> torch.Tensor:
    """One row at a time, the model's own logits."""
    grid = torch.zeros(rollout.completions.shape)
    for i, prompt in enumerate(rollout.prompts):
        n = int(rollout.lengths[i])
        ids = torch.tensor([prompt + rollout.completions[i, :n].tolist()])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        grid[i, :n] = log_p.gather(-1, rollout.completions[i, :n, None])[:, 0]
    return grid


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from kullback.lm.tiny import build_tokenizer

    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, report_to="none", beta=0.0,
        per_device_train_batch_size=6, num_generations=3, max_completion_length=12, gradient_checkpointing=False,
    )  # fmt: skip
    return trl.GRPOTrainer(
        model=random_model(1), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": "1+1="}] * 6), processing_class=build_tokenizer(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("beta", "corrected", "level"),
    [
        (0.0, False, "token"),
        (0.3, False, "token"),
        (0.3, True, "token"),
        (0.0, False, "sequence"),
        (0.3, False, "sequence"),
    ],
)  # TRL's use_bias_correction_kl: k3 as a loss is forward KL's, times the live ratio it is reverse KL's;
# with a ratio of the whole row TRL multiplies a token's k3 by that, which is the gradient of no divergence
@pytest.mark.parametrize(("loss_type", "aggregate"), [("grpo", "row"), ("dapo", "token"), ("dr_grpo", "row_sum")])
@pytest.mark.parametrize("stale", [False, True])
def test_trl_has_this_loss_and_this_gradient(
    trl_trainer: Any, beta: float, corrected: bool, loss_type: str, aggregate: Any, stale: bool, level: str
) -> None:
    settings: dict[str, Any] = {"reference": "initial", "penalty": beta, "level": level}
    settings |= {"divergence": "reverse_kl" if corrected else "forward_kl", "form": "ratio" if corrected else "loss"}
    settings |= {"aggregate": aggregate, "updates": 2 if stale else 1, "dual": 3.0, "penalty_ratio": False}
    method = make("grpo", **(PLAIN | settings))
    at = make_moment(method)
    engine = Engine(method, at)
    (step,) = engine.prepare(0)
    rollout, columns = step.rollout, dict(step.columns)
    if stale:
        draw = torch.Generator().manual_seed(0)  # large enough that every kind of clipping acts
        columns["log_prob:student"] = log_probs(at.model("student"), rollout) + 0.7 * torch.randn(
            rollout.completions.shape, generator=draw
        )
    engine.step_batch = dataclasses.replace(step, columns=columns)
    student = at.model("student")
    student.zero_grad()
    loss = engine.loss(engine.step_batch)
    loss.backward()
    ours = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    if stale:
        assert 0 < engine.metrics()["policy/clipped"] < 1

    trainer, theirs = trl_trainer, trl_trainer.model
    trainer.loss_type, trainer.beta, trainer.importance_sampling_level = loss_type, beta, level
    trainer.epsilon_low, trainer.epsilon_high, trainer.args.delta = 0.2, 0.28, 3.0
    trainer.args.use_bias_correction_kl = corrected
    trainer.max_completion_length, trainer.current_gradient_accumulation_steps = method.max_completion, 1
    trainer.args.steps_per_generation = 1
    width = max(map(len, rollout.prompts))
    prompts = torch.tensor([[0] * (width - len(p)) + p for p in rollout.prompts])
    prompt_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in rollout.prompts])
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": rollout.completions,
        "completion_mask": rollout.scored.long(),
        "advantages": columns["advantage"][:, 0].float(),
        "num_items_in_batch": rollout.scored.sum(),
        "ref_per_token_logps": log_probs(at.model("reference"), rollout),
    }
    if stale:
        inputs["old_per_token_logps"] = columns["log_prob:student"].float()
    theirs.train()
    theirs.zero_grad()
    found = trainer._compute_loss(theirs, inputs)
    found.backward()
    expected = torch.cat([p.grad.flatten() for p in theirs.parameters() if p.grad is not None])
    assert float(loss.detach()) == pytest.approx(float(found.detach()), rel=1e-5, abs=1e-5)
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def policy_batch(new: torch.Tensor, old: torch.Tensor, A: torch.Tensor) -> tuple[Batch, torch.Tensor]:
    """One row, a vocabulary of one token and its rest, with these log-probabilities of what was written."""
    n = len(new)
    rollout = build_rollout([[0]], [[0] * n], [[int(Origin.STUDENT)] * n])
    logit = (new - torch.log1p(-new.exp())).requires_grad_()
    model = LogitPredictions(rollout.scored, torch.zeros(n, dtype=torch.long), torch.stack([logit, 0 * logit], -1))
    columns = base_columns(rollout) | {"log_prob:student": old[None], "advantage": A[None]}
    return Batch(rollout, columns, predictions=model), logit


def test_where_the_clipped_surrogate_stops_pulling() -> None:
    """The four corners of PPO and the dual clip's fifth: gradient 0 beyond a limit only where it would go on."""
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 5.0, 2.5], dtype=torch.float64)
    A = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    old = torch.full((6,), math.log(0.1), dtype=torch.float64)
    batch, logit = policy_batch(old + ratio.log(), old, A)
    term = policy(batch, clip=(0.2, 0.28), dual=3.0)
    torch.testing.assert_close(
        term.value[0].detach(), torch.tensor([-1.28, 1.5, -0.5, 0.8, 3.0, 2.5], dtype=torch.float64)
    )
    (pull,) = torch.autograd.grad(term.value.sum(), logit)
    assert (pull != 0).tolist() == [False, True, True, False, False, True]
    assert term.seen["clipped"][0].tolist() == [True, False, False, True, True, False]
    torch.testing.assert_close(term.seen["ratio"][0], ratio)


def test_a_ratio_does_not_overflow() -> None:
    old = torch.tensor([-1e4, -1.0], dtype=torch.float64)
    batch, logit = policy_batch(torch.tensor([-0.5, -600.0], dtype=torch.float64), old, torch.tensor([-1.0, 1.0]))
    value = policy(batch, clip=None).value
    (pull,) = torch.autograd.grad(value.sum(), logit)
    assert value.isfinite().all()
    assert pull.isfinite().all()


def test_gspo_has_one_ratio_per_row() -> None:
    """Its value and its gradient are those of the geometric mean, differentiated as a whole."""
    new, old = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.1 - 2
    batch, logit = policy_batch(new, old, torch.full((5,), 0.7, dtype=torch.float64))
    (ours,) = torch.autograd.grad(
        policy(batch, level="sequence", clip=(0.5, 0.5)).value.mean(), logit, retain_graph=True
    )
    whole = (batch.model.log_probs()[0] - old).mean().exp()
    (expected,) = torch.autograd.grad(-0.7 * whole, logit)
    torch.testing.assert_close(ours, expected)


def test_a_row_whose_verifier_failed_is_as_if_it_were_not_there() -> None:
    method = make("grpo", **PLAIN)
    engine = Engine(method, make_moment(method))
    rollout = engine.draw().rollout
    broken = [0, 4]
    rewards = {name: values.clone() for name, values in rollout.rewards.items()}
    for values in rewards.values():
        values[broken] = torch.nan

    def loss_of(rows: Rollout) -> tuple[float, torch.Tensor, dict[str, float]]:
        engine = Engine(method, make_moment(method))
        step = Batch(rows, base_columns(rows))
        engine.step_batch = dataclasses.replace(step, columns=dict(step.columns) | method.weight(step))
        loss = engine.loss(engine.step_batch)
        found = torch.autograd.grad(loss, list(engine.at.model("student").parameters()), allow_unused=True)
        return float(loss.detach()), torch.cat([g.flatten() for g in found if g is not None]), dict(step.columns)

    with_them = loss_of(dataclasses.replace(rollout, rewards=rewards))
    without = loss_of(rollout.rows([i for i in range(len(rollout)) if i not in broken]))
    assert with_them[0] == pytest.approx(without[0], rel=1e-5, abs=1e-7)
    torch.testing.assert_close(with_them[1], without[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["loss", "ratio", "reward"])
def test_a_sampler_that_was_twice_as_sure_counts_half(form: str) -> None:
    method = make("grpo", redraws=0, form=form)
    rollout = Engine(method, make_moment(method)).draw().rollout
    grads = []
    for shift in (0.0, math.log(2)):
        engine = Engine(method, make_moment(method))
        rows = dataclasses.replace(rollout, log_probs=rollout.log_probs + shift)
        columns = base_columns(rows) | engine.scores.measure(method.scores, rows, {})
        step = Batch(rows, columns, aggregate=method.aggregate)
        engine.step_batch = dataclasses.replace(step, columns=columns | method.weight(step))
        engine.targets = method.targets()
        loss = engine.loss(engine.step_batch)
        found = torch.autograd.grad(loss, list(engine.at.model("student").parameters()), allow_unused=True)
        grads.append(torch.cat([g.flatten() for g in found if g is not None]))
    torch.testing.assert_close(grads[1], grads[0] / 2, rtol=1e-3, atol=1e-5 * float(grads[0].abs().max()))


def test_what_a_step_shows() -> None:
    method = make("grpo")
    engine = Engine(method, make_moment(method))
    gradient(engine)
    seen = engine.metrics()
    assert 0 < seen["rollout/informative"] <= 1
    assert seen["rollout/unknown"] == 0
    assert seen["rollout/accuracy"] == 0  # the flag, whatever is maximised
    assert seen["rollout/reward"] == pytest.approx(0.5 * seen["rollout/finished"])
    assert seen["rollout/correction"] == pytest.approx(1, abs=1e-3)
    assert abs(seen["rollout/sampler_kl"]) < 1e-5


def test_equal_groups_are_counted_or_dropped() -> None:
    reward = {"accuracy": torch.tensor([1.0, 0.0, 1.0, 1.0])}
    rows = build_rollout([[1]] * 4, [[5, 6]] * 4, [[int(Origin.STUDENT)] * 2] * 4, group=[0, 0, 1, 1])
    rows = dataclasses.replace(rows, rewards=reward)
    step = Batch(rows, base_columns(rows))
    for drop, trained in ((False, [True] * 4), (True, [True, True, False, False])):
        columns = make("grpo", **(PLAIN | {"rewards": None, "drop_equal": drop})).weight(step)
        assert columns["trained"].all(1).tolist() == trained
        assert columns["advantage"][2:].abs().max() == 0
        assert columns["rollout/informative"].mean() == 0.5


def test_mistakes_may_count_less_and_cut_answers_not_at_all() -> None:
    rows = build_rollout([[1]] * 4, [[5, 6]] * 4, [[int(Origin.STUDENT)] * 2] * 4, group=[0, 0, 1, 1])
    rewards = {"accuracy": torch.tensor([1.0, 0, 0, 1]), "finished": torch.tensor([1.0, 0, 1, 0])}
    step = Batch(dataclasses.replace(rows, rewards=rewards), base_columns(rows))
    options = PLAIN | {"rewards": None, "scale": "none", "negative": 0.25, "drop_unfinished": True}
    columns = make("grpo", **options).weight(step)
    assert columns["advantage"][:, 0].tolist() == [0.5, -0.125, -0.125, 0.5]
    assert columns["trained"].all(1).tolist() == [True, False, True, False]


def test_a_correction_is_of_the_token_or_of_the_whole_row() -> None:
    rows = build_rollout([[1]] * 2, [[5, 6]] * 2, [[int(Origin.STUDENT)] * 2] * 2, log_probs=[[-1.0, -2.0]] * 2)
    rows = dataclasses.replace(rows, rewards={"accuracy": torch.tensor([1.0, 0.0])}, group=torch.zeros(2).long())
    student = torch.tensor([[-0.5, -1.0], [-1.0, -2.5]])
    step = Batch(rows, base_columns(rows) | {"log_prob:student": student})
    options = PLAIN | {"rewards": None, "correction": 1e9}
    for level, logs in (("token", [[0.5, 1.0], [0.0, -0.5]]), ("sequence", [[1.5, 1.5], [-0.5, -0.5]])):
        found = make("grpo", **options, correction_level=level).weight(step)["correction"]
        torch.testing.assert_close(found, torch.tensor(logs).exp())


@pytest.mark.parametrize("name", ["grpo", "trace"])
def test_summed_rows_are_divided_by_the_longest_that_they_might_be(name: str) -> None:
    """Dr. GRPO: the same text under a higher limit has a smaller gradient, in proportion; averages do not care."""
    quiet = {"kl": 0.0} if name == "trace" else PLAIN
    for aggregate, ratio in (("row_sum", 2.0), ("row", 1.0)):
        found = []
        for limit in (12, 24):
            method = make(name, **(quiet | {"aggregate": aggregate, "max_completion": 12}))
            engine = Engine(method, make_moment(method))
            (step,) = engine.prepare(0)
            engine.at.method = dataclasses.replace(method, max_completion=limit)
            found.append(
                float(torch.autograd.grad(engine.loss(step), engine.at.model("student").lm_head.weight)[0].norm())
            )
        assert found[0] > 1e-4
        assert found[0] / found[1] == pytest.approx(ratio, rel=1e-4)


def finished(rollout: Rollout) -> torch.Tensor:
    return rollout.rewards["finished"]


def test_dynamic_sampling_replaces_groups_of_equal_reward() -> None:
    method = make("grpo", **PLAIN)
    at = make_moment(method)
    plain = sources.student().draw(at)
    source = sampling.informative(sources.student(), finished, 3)
    drawn = source.draw(at)
    assert len(drawn) == len(plain)
    share = [float((group_advantage(finished(r), r.group) != 0).float().mean()) for r in (plain, drawn)]
    assert share[1] > share[0]
    places = [note["place"] % 8 for note in drawn.notes]
    assert sorted(places) == sorted(list(range(8)) * method.samples)  # every place once, of whichever turn
    turns = {note["turn"] for note in drawn.notes}
    assert len(turns) > 1
    halves = []
    for rank in range(2):
        at.rank, at.world = rank, 2
        halves.append(source.draw(at))
    both = concatenate(halves)
    rows = [(note["place"], tuple(row.tolist())) for note, row in zip(both.notes, both.completions, strict=True)]
    width = both.completions.shape[1]
    padded = torch.nn.functional.pad(drawn.completions, (0, width - drawn.completions.shape[1]))
    expected = [(note["place"], tuple(row.tolist())) for note, row in zip(drawn.notes, padded, strict=True)]
    assert sorted(rows) == sorted(expected)  # two processes draw what one draws


def test_dynamic_sampling_ends() -> None:
    method = make("grpo", **PLAIN)
    at = make_moment(method)
    drawn = sampling.informative(sources.student(), lambda rollout: torch.ones(len(rollout)), 2).draw(at)
    assert len(drawn) == 8 * method.samples
    assert {note["turn"] for note in drawn.notes} == {2}


def test_solved_problems_are_passed_over() -> None:
    method = make("grpo", **PLAIN)
    at = make_moment(method)
    source = sampling.by_pass_rate(sources.student(), 0.1, 0.9)
    first = [problem.id for _, problem in source.problems(at)]
    assert first == [problem.id for _, problem in at.problems()]
    at.ledger.add("accuracy", first[:4], torch.tensor([1.0, 0.0, 0.5, torch.nan]))
    again = source.problems(at)
    assert [place % 8 for place, _ in again] == list(range(8))
    ids = [problem.id for _, problem in again]
    assert not {first[0], first[1]} & set(ids)
    assert ids[2:] == first[2:]
    at.ledger.add("accuracy", [p.id for p in at.task.train], torch.full((len(at.task.train),), 100.0))
    assert len(source.problems(at)) == 8  # nothing is left: the run goes on


def test_pass_rates_are_counted() -> None:
    method = make("grpo", **(PLAIN | {"pass_rate": (0.0, 0.99)}))
    engine = Engine(method, make_moment(method))
    rollout = engine.draw().rollout
    ids = [note["problem_id"] for note in rollout.notes]
    assert (engine.at.ledger.mean("accuracy", ids) == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"penalty": 0.1, "reference": None}, r"set target\.reference=initial"),
        ({"samples": 1}, r"source\.samples=1 leaves an answer nothing to be compared with"),
        ({"baseline": "none"}, "divides rewards by zero where all agree"),
        ({"dual": 1.1}, r"signal\.dual=1\.1 must be above the ratio's own limit, 1\.28"),
        ({"sampling_temperature": 0.8}, r"correct for it with weight\.correction"),
        ({"penalty": 0.1, "reference": "initial", "horizon": "whole"}, r"signal\.form='reward' only"),
        ({"form": "squared"}, "write loss, ratio, exact or reward"),
        ({"penalty": 0.1, "reference": "initial", "form": "reward", "drop_unfinished": True}, "needs all of them"),
        ({"pass_rate": (0.9, 0.1)}, "the lower one first"),
        ({"redraws": -1}, r"source\.redraws=-1 must be at least 0"),
        ({"penalty": -0.1}, r"signal\.penalty=-0\.1 must be at least 0"),
        ({"soft": 4}, r"weight\.soft=4 makes the grade 'overlong', which weight\.rewards="),
        ({"rewards": {"accuracy": 1.0, "overlong": 0.5}}, r"weight\.soft=0 makes the grade 'overlong'"),
        ({"soft": 13, "rewards": {"overlong": 1.0}}, r"the last of source\.max_completion=12 tokens: choose 0 to"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rehearse(make("grpo", **(PLAIN | changes)))


@pytest.mark.parametrize("name", ["grpo", "ppo", "trace", "dph_rl"])
def test_every_method_that_reinforces_refuses_what_would_bend_its_gradient(name: str) -> None:
    for changes, message in (
        ({"sampling_temperature": 0.7, "correction": None}, "draws from another distribution than the one"),
        ({"updates": 0}, r"source\.updates=0 must be at least 1"),
        ({"dual": 1.2}, r"signal\.dual=1\.2 must be above the ratio's own limit"),
    ):
        known = {field.name for field in dataclasses.fields(find_method(name))}
        with pytest.raises(ValueError, match=message):
            make(name, **{key: value for key, value in changes.items() if key in known})


@pytest.mark.parametrize("name", ["grpo", "trace", "dph_rl"])
def test_a_second_pass_has_the_ratio_to_the_policy_that_wrote(name: str) -> None:
    method = make(name, **({"updates": 2} | (PLAIN if name == "grpo" else {})))
    engine = Engine(method, make_moment(method))
    gradient(engine)
    assert engine.metrics()["policy/old_kl"] == pytest.approx(0, abs=1e-6)
    rows = engine.step_batch
    with torch.no_grad():
        for index, parameter in enumerate(engine.at.model("student").parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.add_(0.02 * noise)
    gradient(engine, 1)
    assert engine.step_batch is rows  # the same draw
    assert engine.metrics()["policy/old_kl"] > 1e-4


@pytest.mark.parametrize("name", ["grpo", "ppo", "trace", "dph_rl"])
def test_overlong_answers_are_rewarded_less_and_the_rest_as_before(name: str) -> None:
    """The reward falls by the weight times the share of the last tokens; the grades themselves stay."""
    weights = {"accuracy": 1.0, "finished": 0.5}
    method = make(name, rewards=weights | {"overlong": 0.25}, soft=4)
    lengths = [3, 8, 9, 10, 12]
    rows = build_rollout([[1]] * 5, [[7] * n for n in lengths], [[int(Origin.STUDENT)] * n for n in lengths])
    grades = {"accuracy": torch.tensor([1.0, 0, 1, 0, torch.nan]), "finished": torch.tensor([1.0, 1, 1, 1, 0])}
    rows = dataclasses.replace(rows, rewards=grades)
    plain = grades["accuracy"] + 0.5 * grades["finished"]
    less = torch.tensor([0, 0, 1 / 4, 2 / 4, 1])
    torch.testing.assert_close(method.reward(rows), plain - 0.25 * less, equal_nan=True)  # type: ignore[attr-defined]
    torch.testing.assert_close(make(name, rewards=weights).reward(rows), plain, equal_nan=True)  # type: ignore[attr-defined]
    assert set(rows.rewards) == {"accuracy", "finished"}


def test_a_step_with_overlong_answers() -> None:
    """Unlike lengths make a group of equal grades informative, and the words name the grade."""
    method = make("grpo", **(PLAIN | {"rewards": {"overlong": 1.0}, "soft": 12}))
    engine = Engine(method, make_moment(method))
    step = engine.draw()
    torch.testing.assert_close(step["rollout/reward"], -step.rollout.lengths / 12)
    assert 0 < float(step["rollout/informative"].mean()) <= 1
    with_both = make("grpo", **(PLAIN | {"rewards": {"accuracy": 1.0, "overlong": 0.5}, "soft": 4}))
    assert "A = 1 accuracy + 0.5 overlong - mean of the group" in objective(with_both, rehearse(with_both))


def test_a_task_that_grades_nothing_is_refused_before_the_first_step() -> None:
    for name in ("grpo", "ppo", "trace", "dph_rl"):
        method = make(name)
        at = make_moment(method)
        at.task.verifier = None
        with pytest.raises(ValueError, match="grades nothing: give it answers or a verifier"):
            Engine(method, at).begin()


@pytest.mark.parametrize("form", ["loss", "ratio", "exact", "reward"])
@pytest.mark.parametrize("on", ["all", "right", "wrong", "undecided"])
def test_penalties_count_per_batch_row_and_token(form: str, on: str) -> None:
    """Twice the coefficient is twice the penalty's gradient; rows it does not count have none of it."""
    flat = {"rewards": {"finished": 0.0}, "horizon": "token", "reference": "initial", "form": form, "penalty_on": on}
    losses = {}
    for penalty in (0.1, 0.2):
        method = make("grpo", **(PLAIN | flat | {"penalty": penalty, "baseline": "leave_one_out", "scale": "none"}))
        losses[penalty] = gradient(Engine(method, make_moment(method)))[1]
    if on == "right":  # nobody is
        assert float(losses[0.2].abs().max()) == 0
    else:
        torch.testing.assert_close(2 * losses[0.1], losses[0.2], rtol=1e-4, atol=1e-6)
        assert float(losses[0.1].abs().max()) > 1e-4


def test_a_penalty_in_the_reward_is_shown_too() -> None:
    """By its sampled value, within the noise of the exact one that another form's term shows."""
    flat = {"horizon": "token", "reference": "initial", "penalty": 0.1, "samples": 8, "redraws": 0}
    shown = {}
    for form in ("reward", "exact"):
        method = make("grpo", **(flat | {"form": form}))
        engine = Engine(method, make_moment(method))
        gradient(engine)
        shown |= engine.metrics()
    assert shown["rollout/penalty"] == pytest.approx(shown["term/penalty"], rel=0.3)
    assert shown["term/penalty"] > 0.5


def test_the_objective_in_words() -> None:
    method = make("grpo", rewards={"accuracy": 1.0, "finished": 0.1}, scale="none")
    words = objective(method, rehearse(method))
    assert "A = 1 accuracy + 0.1 finished - mean of the group" in words
    assert "groups of equal reward are drawn again" in words


def test_reward_names_are_checked_when_they_are_known() -> None:
    method = make("grpo", **(PLAIN | {"rewards": {"style": 1.0}}))
    rehearse(method)  # only the verifier knows
    with pytest.raises(ValueError, match="the verifier gives no 'style'; it gives accuracy, finished"):
        Engine(method, make_moment(method)).draw()


def test_a_weight_per_row_counts_each_of_its_tokens() -> None:
    rows = build_rollout([[1]] * 2, [[5, 6], [7]], [[int(Origin.STUDENT)] * n for n in (2, 1)])
    columns = base_columns(rows) | {"row": torch.tensor([2.0, 5.0])}
    token = dict(columns) | {"token": torch.tensor([[2.0, 2.0], [5.0, 5.0]])}
    for mean in ("token", "row", "weight"):
        one, other = (multipliers(token, "scored", mean, name)[0] for name in ("row", "token"))
        torch.testing.assert_close(one, other)
    assert multipliers(columns, "scored", "token", "row")[0].tolist() == [[2.0, 2.0], [5.0, 0.0]]
