"""Grades against enumeration: every number again from a row-by-row forward pass, torch.distributions and numpy."""

import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import kullback as kb
from kullback.lm import evaluate
from kullback.lm.evaluate import Evaluation, grade, pass_at, probe, ratio, token_samples
from kullback.lm.method import Method
from kullback.lm.moment import Moment
from kullback.lm.settings import EvaluateSettings
from kullback.lm.tasks import Problem, Task
from kullback.lm.tiny import build_tokenizer
from kullback.report import comparison_rows
from kullback.run.directory import RunDirectory
from tests.lm.small import make, random_model

LIMIT = 9
COMPARED = ("forward_kl", "reverse_kl", "jsd")


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KULLBACK_PROGRESS", "0")


def has_capital(problem: Problem, completion: str) -> dict[str, float]:
    return {"accuracy": float(any(c.isupper() for c in completion[:2])), "letters": float(len(completion))}


def problems(count: int) -> list[Problem]:
    return [
        Problem(f"p{i}", [{"role": "user", "content": "ab" * (i % 5) + f"{i}?"}], None, answer=str(i))
        for i in range(count)
    ]


def moment(
    method: Method | None = None,
    *,
    held_out: int = 14,
    teacher: bool = True,
    verifier: Any = has_capital,
    **options: Any,
) -> Moment:
    players = {"student": random_model(1)}
    if teacher:
        players["teacher"] = random_model(2, hidden=24).requires_grad_(False)
    task = Task("letters", problems(3), problems(held_out), verifier)
    return Moment(players, build_tokenizer(), task, method or make("vopd", samples=1), **options)


def settings(**changes: Any) -> EvaluateSettings:
    return EvaluateSettings(**({"problems": 12, "samples": 4, "divergence_problems": 5, "probe_problems": 6} | changes))


def same(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> bool:
    def close(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return all(close(a[key], b[key]) for key in a)
        return a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance))

    return list(one) == list(other) and all(close(one[name], other[name]) for name in one)


# Formulas


@pytest.mark.parametrize("samples", range(1, 7))
def test_pass_at_j_is_the_share_of_subsets_with_a_right_sample(samples: int) -> None:
    for right in range(samples + 1):
        drawn = [True] * right + [False] * (samples - right)
        for j in range(1, samples + 1):
            subsets = list(itertools.combinations(drawn, j))
            assert pass_at(right, samples, j) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_with_equal_counts_the_error_is_that_of_the_mean_of_the_problem_means() -> None:
    sums = torch.randint(0, 5, (30,), generator=torch.Generator().manual_seed(0))
    found = ratio(sums, torch.full((30,), 4))
    means = [int(s) / 4 for s in sums]
    assert found["value"] == pytest.approx(statistics.fmean(means))
    assert found["standard_error"] == pytest.approx(statistics.stdev(means) / math.sqrt(30))


def test_the_error_of_a_ratio_is_the_spread_of_its_estimates() -> None:
    """Clusters of different sizes whose tokens go together: the error is measured against 4,000 repetitions."""
    rng, values, errors = np.random.default_rng(0), [], []
    for _ in range(4000):
        counts = rng.integers(1, 12, 80)
        sums = counts * rng.normal(1 + 0.05 * counts, 0.5) + rng.normal(0, 0.2, 80) * np.sqrt(counts)
        found = ratio(torch.from_numpy(sums), torch.from_numpy(counts))
        values.append(found["value"])
        errors.append(found["standard_error"])
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.05)


def test_one_problem_has_no_error_and_infinity_none_either() -> None:
    assert ratio(torch.tensor([3.0]), torch.tensor([4.0])) == {"value": 0.75, "standard_error": None}
    assert ratio(torch.tensor([3.0, math.inf]), torch.tensor([4.0, 1.0])) == {"value": math.inf, "standard_error": None}


# Grades


def by_enumeration(at: Moment, evaluation: Evaluation, player: str) -> dict[str, tuple[float, float]]:
    """Value and standard error of every metric, from one unpadded forward pass per row."""
    config, task = evaluation.settings, at.task
    k, tokenizer = config.samples, at.tokenizer
    chosen = evaluation.problems

    def distributions(who: str, problem: Problem, completion: list[int]) -> Categorical:
        prompt = tokenizer(tokenizer.apply_chat_template(problem.messages, tokenize=False, add_generation_prompt=True))
        ids = torch.tensor([prompt["input_ids"] + completion])
        with torch.no_grad():
            seen = at.model(who)(input_ids=ids).logits[0, -len(completion) - 1 : -1].double()
        return Categorical(logits=seen)

    rows: dict[str, list[tuple[float, float]]] = {}  # sum and count of each problem

    def add(name: str, total: float, count: float) -> None:
        rows.setdefault(name, []).append((total, count))

    own = evaluation.write(at, player, chosen, k)
    for i, problem in enumerate(chosen):
        mine = own.completions[i * k : (i + 1) * k]
        texts = [tokenizer.decode(c, skip_special_tokens=True) for c in mine]
        right = [task.verify(problem, text)["accuracy"] for text in texts]
        tokens = sum(map(len, mine))
        add(f"avg@{k}", sum(right), k)
        add("avg@k", sum(right), k)
        for j in (1, 2, 4):
            if j <= k:
                subsets = list(itertools.combinations(right, j))
                add(f"pass@{j}", sum(map(any, subsets)) / len(subsets), 1)
        add("entropy", sum(float(distributions(player, problem, c).entropy().sum()) for c in mine), tokens)
        add("length", tokens, k)
        add("reward/letters", sum(map(len, texts)), k)
        ends = [tokenizer.eos_token_id, *at.model(player).generation_config.eos_token_id]
        add("finished", sum(c[-1] in ends for c in mine), k)
        for n in (1, 2):
            grams = [pair for c in mine for pair in zip(*(c[shift:] for shift in range(n)), strict=False)]
            if grams:
                add(f"distinct_{n}", len(set(grams)) / len(grams), 1)
        add("distinct_completions", len({str(c) for c in mine}), 1)
    if "teacher" in at.players and player != "teacher":
        first = chosen[: config.divergence_problems]
        for whose, writer in (("student_text", player), ("teacher_text", "teacher")):
            written = evaluation.write(at, writer, first, k).completions
            for i, problem in enumerate(first):
                mine = written[i * k : (i + 1) * k]
                totals = dict.fromkeys(COMPARED, 0.0)
                for completion in mine:
                    t, m = (distributions(who, problem, completion) for who in ("teacher", player))
                    middle = Categorical(probs=(t.probs + m.probs) / 2)
                    totals["forward_kl"] += float(kl_divergence(t, m).sum())
                    totals["reverse_kl"] += float(kl_divergence(m, t).sum())
                    totals["jsd"] += float((kl_divergence(t, middle) + kl_divergence(m, middle)).sum()) / 2
                for name, total in totals.items():
                    add(f"{name}_{whose}", total, sum(map(len, mine)))
    found = {}
    for name, pairs in rows.items():
        s, n = np.array(pairs, dtype=float).T
        value, covariance = s.sum() / n.sum(), np.cov(s, n)
        variance = covariance[0, 0] - 2 * value * covariance[0, 1] + value**2 * covariance[1, 1]
        found[name] = (value, math.sqrt(max(variance, 0.0) / len(s)) / n.mean())
    return found


@pytest.mark.parametrize(("player", "samples"), [("student", 4), ("teacher", 4), ("student", 3)])
def test_every_number_is_what_enumeration_gives(player: str, samples: int) -> None:
    at = moment()
    evaluation = Evaluation(settings(samples=samples), at, LIMIT)
    found = grade(evaluation, at, player, "test")
    assert (found.pop("problems"), found.pop("samples"), found.pop("verifier_errors")) == (12, samples, 0)
    expected = by_enumeration(at, evaluation, player)
    assert set(found) == set(expected)
    assert len(found) == (12 if samples == 4 else 11) + 6 * (player == "student")
    for name, (value, error) in expected.items():
        assert found[name]["value"] == pytest.approx(value, rel=1e-4), name
        assert found[name]["standard_error"] == pytest.approx(error, rel=1e-3, abs=1e-6), name
    assert 0 < found["avg@k"]["value"] < 1  # else the test would not test
    assert 0 < found["finished"]["value"] < 1


def test_the_seed_decides_and_nothing_else() -> None:
    def graded(rows_at_once: int, seed: int) -> dict[str, Any]:
        at = moment(rows_at_once=rows_at_once)
        return grade(Evaluation(settings(seed=seed), at, LIMIT), at, "student", "test")

    first = graded(1024, 1)
    assert graded(1024, 1) == first
    for rows_at_once in (12, 3):
        assert same(first, graded(rows_at_once, 1), 1e-5)
    assert not same(first, graded(1024, 2), 1e-3)


def test_fewer_problems_are_the_first_of_more_with_the_same_text() -> None:
    at = moment()
    few, many = (Evaluation(settings(problems=count, shown=0), at, LIMIT) for count in (4, 12))
    assert few.problems == many.problems[:4]
    assert [p.id for p in many.problems] != [p.id for p in at.task.held_out[:12]]  # a drawn subset, not the first rows
    uniforms = many.uniforms(many.problems, 4)
    assert len(set(uniforms.flatten().tolist())) == 12 * 4 * LIMIT  # no two problems or samples share a number
    short, long = (e.write(at, "student", e.problems, 4).completions for e in (few, many))
    assert short == long[:16]
    assert many.write(at, "student", many.problems, 1).completions == long[::4]  # sample 0, whatever their number


def test_the_teacher_writes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    at, writers = moment(), []
    original = evaluate.generate

    def counted(model: Any, prompts: Any, *args: Any, **options: Any) -> Any:
        writers.append(("teacher" if model is at.model("teacher") else "student", len(prompts)))
        return original(model, prompts, *args, **options)

    monkeypatch.setattr(evaluate, "generate", counted)
    evaluation = Evaluation(settings(), at, LIMIT)
    before = grade(evaluation, at, "student", "test")
    graded = grade(evaluation, at, "teacher", "test")
    assert same(before, grade(evaluation, at, "student", "test"), 1e-12)
    assert [count for who, count in writers if who == "teacher"] == [
        5,
        7,
    ]  # the five it was compared on, then the others
    fresh = Evaluation(settings(), at, LIMIT)
    assert same(graded, grade(fresh, at, "teacher", "test"), 1e-5)


def test_a_student_equal_to_its_teacher_is_no_way_from_it() -> None:
    at = moment()
    at.players["teacher"] = at.players["student"]
    evaluation = Evaluation(settings(), at, LIMIT)
    found = grade(evaluation, at, "student", "test")
    for name in COMPARED:
        for whose in ("student_text", "teacher_text"):
            assert found[f"{name}_{whose}"] == {"value": 0.0, "standard_error": 0.0}
    teacher = grade(evaluation, at, "teacher", "test")
    # float32 sums of the student's text, read in one call or in two
    assert same({name: found[name] for name in teacher}, teacher, 1e-6)


def test_the_teacher_reads_its_own_system_prompt() -> None:
    method = make("vopd", samples=1, teacher_system="think")
    at = moment(method)
    at.players["teacher"] = at.players["student"]
    evaluation = Evaluation(settings(), at, LIMIT)
    problem = evaluation.problems[0]
    assert at.tokenizer.decode(evaluation.prompt(at, "teacher", problem)).startswith("<|system|>think<|end|><|user|>")
    assert at.tokenizer.decode(evaluation.prompt(at, "student", problem)).startswith("<|user|>")
    assert grade(evaluation, at, "student", "test")["forward_kl_student_text"]["value"] > 0.01
    (sample, *_) = token_samples(evaluation, at, step=0)
    assert max(token["divergence"] for token in sample["tokens"]) > 0.01


# Verifiers


def test_a_verifier_that_fails_is_counted_and_its_problem_left_out() -> None:
    def fails(problem: Problem, completion: str) -> dict[str, float]:
        if problem.id in ("p3", "p5", "p8"):
            raise RuntimeError("no such thing")
        return has_capital(problem, completion)

    at = moment(verifier=fails)
    evaluation = Evaluation(settings(problems=14), at, LIMIT)
    found = grade(evaluation, at, "student", "test")
    assert found["verifier_errors"] == 3
    whole = moment()
    sound = [p for p in evaluation.problems if p.id not in ("p3", "p5", "p8")]
    texts = evaluation.write(whole, "student", sound, 4).completions
    right = [has_capital(sound[0], whole.tokenizer.decode(c, skip_special_tokens=True))["accuracy"] for c in texts]
    assert found["avg@4"]["value"] == pytest.approx(sum(right) / len(right))
    reference = grade(Evaluation(settings(problems=14), whole, LIMIT), whole, "student", "test")
    assert found["entropy"] == reference["entropy"]  # its text still counts where no verdict is needed


def test_without_a_verdict_there_is_no_accuracy() -> None:
    at = moment(verifier=None)
    evaluation = Evaluation(settings(), at, LIMIT)
    found = grade(evaluation, at, "student", "test")
    assert not any(name.startswith(("avg@", "pass@")) for name in found)
    assert found["verifier_errors"] == 0
    assert set(probe(evaluation, at)) == {"entropy", "length"}


# The probe and the samples of the report


def test_the_probe_is_the_first_sample_of_the_first_problems() -> None:
    at = moment()
    at.model("student").train()
    evaluation = Evaluation(settings(probe_every=1), at, LIMIT)
    found = probe(evaluation, at)
    assert at.model("student").training
    alone = Evaluation(settings(problems=6, samples=1), at, LIMIT)
    graded = grade(alone, at, "student", "test")
    assert found == pytest.approx(
        {"accuracy": graded["avg@1"]["value"]} | {n: graded[n]["value"] for n in ("entropy", "length")}
    )


@pytest.mark.parametrize("name", ["vopd", "on_policy_distillation", "sft"])
def test_samples_say_what_both_models_think_of_each_token(name: str, tmp_path: Path) -> None:
    at = moment(make(name))
    evaluation = Evaluation(settings(shown=3), at, LIMIT)
    samples = token_samples(evaluation, at, step=40)
    divergence = {"vopd": "reverse_kl", "on_policy_distillation": "squared_hellinger", "sft": "forward_kl"}[name]
    route = "nll" if name == "sft" else "match/teacher"
    texts = evaluation.write(at, "student", evaluation.shown_problems, 1).completions
    assert len(samples) == 3
    for sample, problem, completion in zip(samples, evaluation.shown_problems, texts, strict=True):
        assert sample["prompt"] == f"<|user|>{problem.messages[0]['content']}<|end|><|assistant|>"
        assert sample["completion"] == at.tokenizer.decode(completion, skip_special_tokens=True)
        assert (sample["step"], sample["origin"], sample["divergence_name"]) == (40, "student", divergence)
        assert set(sample["rewards"]) == {"accuracy", "letters"}
        ids = torch.tensor([at.tokenizer(sample["prompt"])["input_ids"] + completion])
        with torch.no_grad():
            t, m = (at.model(who)(ids).logits[0, -len(completion) - 1 : -1] for who in ("teacher", "student"))
        values = kb.divergence(divergence).categorical(t, m)
        for place, token in enumerate(sample["tokens"]):
            assert token["text"] == at.tokenizer.decode([completion[place]])
            assert token["divergence"] == pytest.approx(float(values[place]), rel=1e-3)
            assert token["entropy"] == pytest.approx(float(Categorical(logits=m[place]).entropy()), rel=1e-3)
            assert (token["weight"], token["scored"], token["route"]) == (1.0, True, route)
            for column, seen in (("student_top", m), ("teacher_top", t)):
                p, best = seen[place].softmax(-1).sort(descending=True)
                assert [text for text, _ in token[column]] == [at.tokenizer.decode([int(i)]) for i in best[:5]]
                assert [share for _, share in token[column]] == pytest.approx(p[:5].tolist(), rel=1e-3)
        assert len(sample["tokens"]) == len(completion)
    directory = RunDirectory.create(tmp_path / "run")
    directory.append_samples(samples)
    assert directory.samples() == json.loads(json.dumps(samples))


@pytest.mark.parametrize("fade", [1.0, 0.5, 0.0])
def test_samples_say_which_terms_train_each_token(fade: float) -> None:
    """The first three characters are marked: in right answers for `key`, in wrong ones for `error`."""

    def first_three(problem: str, response: str, correct: bool) -> dict[str, Any]:
        return {"spans": [[0, min(3, len(response))]], "label": "start"}

    method = make("trace", annotator=first_three, cap=1.0, error="reverse_kl", rewards=None, fade=fade)
    at = moment(method, teacher=False)
    samples = token_samples(Evaluation(settings(shown=12), at, LIMIT), at, step=0)
    kinds = {1.0: "{}", 0.5: "policy + {}", 0.0: "policy"}
    for sample in samples:
        marked = kinds[fade].format("key" if sample["rewards"]["accuracy"] >= 1 else "error")
        written = 0
        for token in sample["tokens"]:
            silent = token["text"] in at.tokenizer.all_special_tokens
            assert token["route"] == (marked if written < 3 and not silent else "policy")
            written += 0 if silent else len(token["text"])
    assert len({sample["rewards"]["accuracy"] for sample in samples}) == 2


def test_samples_need_no_teacher() -> None:
    at = moment(make("sft"), teacher=False)
    evaluation = Evaluation(settings(), at, LIMIT)
    for sample in token_samples(evaluation, at, step=1):
        assert "divergence_name" not in sample
        assert all(
            set(token) == {"text", "entropy", "weight", "scored", "route", "student_top"} for token in sample["tokens"]
        )
    assert not any(name.endswith("_text") for name in grade(evaluation, at, "student", "test"))


def test_the_report_reads_the_grades(tmp_path: Path) -> None:
    at = moment()
    evaluation = Evaluation(settings(), at, LIMIT)
    directory = RunDirectory.create(tmp_path / "run")
    graded = grade(evaluation, at, "student", "test")
    directory.write_evaluation(
        {"student": graded, "untrained": graded, "teacher": grade(evaluation, at, "teacher", "t")}
    )
    (run,) = [row for row in comparison_rows([directory.path]) if row["kind"] == "run"]
    shown = ("avg@k", "pass@4", "entropy", "length", "forward_kl_teacher_text", "reverse_kl_student_text", "distinct_2")
    for name in shown:
        assert run["metrics"][name] == pytest.approx(graded[name])
    assert run["gain"]["value"] == 0.0


# What is refused


def test_settings_and_problems_that_cannot_work_are_refused() -> None:
    at = moment()
    with pytest.raises(ValueError, match=r"evaluate\.samples=4: at evaluate\.temperature=0"):
        Evaluation(settings(temperature=0), at, LIMIT)
    with pytest.raises(ValueError, match=r"no held-out problems.*evaluate\.problems=0"):
        Evaluation(settings(), moment(held_out=0), LIMIT)
    assert Evaluation(settings(problems=0), moment(held_out=0), LIMIT).problems == []
    with pytest.raises(ValueError, match=r"context of 128; lower evaluate\.max_completion to \d+"):
        Evaluation(settings(max_completion=125), at, LIMIT)
    longest = max(len(p.messages[0]["content"]) for p in at.task.held_out) + 3
    assert (
        Evaluation(settings(problems=14), at, 10_000).limit == 128 - longest
    )  # nobody asked for 10,000 here: cut to fit


def test_greedy_grades_are_those_of_the_likeliest_tokens() -> None:
    at = moment()
    evaluation = Evaluation(settings(samples=1, temperature=0, max_completion=4), at, LIMIT)
    text = evaluation.write(at, "student", evaluation.problems, 1)
    ids = evaluation.prompt(at, "student", evaluation.problems[0])
    for token in text.completions[0]:
        with torch.no_grad():
            assert int(at.model("student")(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids = [*ids, token]
    assert max(map(len, text.completions)) == 4
    assert grade(evaluation, at, "student", "test")["entropy"]["value"] > 0  # of the distribution, not of the sampler


def test_damaged_weights_are_an_error_that_says_so() -> None:
    at = moment()
    evaluation = Evaluation(settings(), at, LIMIT)
    at.model("teacher").lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        grade(evaluation, at, "student", "test")
    with pytest.raises(ValueError, match="NaN"):
        grade(evaluation, at, "teacher", "test")
