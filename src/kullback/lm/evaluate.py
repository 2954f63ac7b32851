"""How good a model is, how undecided, and how far from its teacher: numbers on held-out problems, with their errors.

Every model is asked the same problems with the same uniform numbers, so that two models differ by what they are and not
by their luck. All numbers per token are exact sums over the vocabulary at the tokens that were written.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence import divergence
from kullback.lm.batch import Batch, base_columns
from kullback.lm.chat import end_ids, prompt_ids
from kullback.lm.generate import generate
from kullback.lm.models import context_length
from kullback.lm.moment import Moment
from kullback.lm.predictions import FullPredictions
from kullback.lm.rehearse import rehearse
from kullback.lm.rollout import Origin, Rollout, build_rollout
from kullback.lm.scores import Scores
from kullback.lm.settings import EvaluateSettings
from kullback.lm.statistics import token_statistics
from kullback.lm.targets import read
from kullback.lm.tasks import Problem
from kullback.run.progress import ProgressBar
from kullback.run.seeds import generator
from kullback.run.terms import multipliers

Metric = dict[str, float | None]
TO_TEACHER = ("forward_kl", "reverse_kl", "jsd")
TOP = 5  # likeliest tokens that a shown sample keeps


@dataclass(frozen=True)
class Texts:
    """Completions of problems, `samples` rows each, problem after problem."""

    problems: list[Problem]
    samples: int
    completions: list[list[int]]
    finished: list[bool]


class Evaluation:
    """Which problems are asked, with which uniform numbers, and what the teacher wrote: fixed for a whole run.

    The first n problems of `settings.seed` are the same for every n, and so are the uniforms of a problem's j-th
    sample. A teacher that reads a system prompt of its own reads it here too: it is graded as the target that it is.

    Args:
        max_completion: tokens; used where `settings.max_completion` is None, and then cut to the student's context.

    Raises:
        ValueError: there are no held-out problems; a prompt leaves no room for a completion; several samples of a
            greedy model.
    """

    def __init__(self, settings: EvaluateSettings, at: Moment, max_completion: int) -> None:
        self.settings = settings
        if settings.temperature == 0 and settings.samples > 1:
            raise ValueError(
                f"evaluate.samples={settings.samples}: at evaluate.temperature=0 all samples of a problem are the "
                "same; set evaluate.samples=1"
            )
        held_out = at.task.held_out
        wanted = max(settings.problems, settings.shown if settings.problems else 0)
        wanted = max(wanted, settings.probe_problems if settings.probe_every else 0)
        if wanted and not len(held_out):
            raise ValueError(
                f"task={at.task.name!r} has no held-out problems: give it some with task.held_out, or set "
                "evaluate.problems=0 and evaluate.probe_every=0"
            )
        order = torch.randperm(len(held_out), generator=generator(settings.seed, "problems")).tolist()
        self._asked = [held_out[i] for i in order[:wanted]]
        self._prompts: dict[tuple[str, str | None], list[int]] = {}
        self._teacher_texts: dict[tuple[str, int], tuple[list[int], bool]] = {}
        self.limit = self._limit(at, max_completion)

    @property
    def problems(self) -> list[Problem]:
        return self._asked[: self.settings.problems]

    @property
    def probe_problems(self) -> list[Problem]:
        return self._asked[: self.settings.probe_problems]

    @property
    def shown_problems(self) -> list[Problem]:
        return self._asked[: self.settings.shown]

    def prompt(self, at: Moment, player: str, problem: Problem) -> list[int]:
        """What a player reads before it writes, token ids."""
        system = getattr(at.method, "teacher_system", None) if player == "teacher" else None
        key = (problem.id, system)
        if key not in self._prompts:
            self._prompts[key] = prompt_ids(at.tokenizer, problem.messages, system=system)
        return self._prompts[key]

    def uniforms(self, problems: Sequence[Problem], samples: int) -> Float[Tensor, "row completion"]:
        """In [0, 1); they belong to a problem and a sample number, whoever writes."""
        draws = [
            generator(self.settings.seed, "evaluate", problem.id, j) for problem in problems for j in range(samples)
        ]
        return torch.stack([torch.rand(self.limit, generator=draw, dtype=torch.float64) for draw in draws])

    def write(self, at: Moment, player: str, problems: list[Problem], samples: int) -> Texts:
        """Completions of `problems`, in their order. The teacher's are kept, since it never changes."""
        keys = [(problem.id, j) for problem in problems for j in range(samples)]
        kept: dict[tuple[str, int], tuple[list[int], bool]] = self._teacher_texts if player == "teacher" else {}
        fresh = [problem for problem in problems if any((problem.id, j) not in kept for j in range(samples))]
        if fresh:
            model = at.model(player)
            prompts = [self.prompt(at, player, problem) for problem in fresh]
            room, longest = context_length(model), max(map(len, prompts))
            if room is not None and longest + self.limit > room:
                raise ValueError(
                    f"a held-out prompt of {longest} tokens and evaluate.max_completion={self.limit} exceed "
                    f"the {player}'s context of {room}: lower evaluate.max_completion"
                )
            written = generate(
                model,
                prompts,
                self.uniforms(fresh, samples),
                end_ids=end_ids(at.tokenizer, model),
                samples=samples,
                temperature=self.settings.temperature,
                rows_at_once=at.rows_at_once,
                compile_decode=at.compile_decode,
            )
            new = [(problem.id, j) for problem in fresh for j in range(samples)]
            kept |= dict(zip(new, zip(written.completions, written.finished, strict=True), strict=True))
        return Texts(problems, samples, [kept[key][0] for key in keys], [kept[key][1] for key in keys])

    def chunks(self, at: Moment, player: str, places: Sequence[int], samples: int) -> list[list[int]]:
        """Problems of like prompt length go together, as many as the rows that are written at once."""
        problems, size = self.problems, max(at.rows_at_once // samples, 1)
        order = sorted(places, key=lambda i: len(self.prompt(at, player, problems[i])))
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _limit(self, at: Moment, max_completion: int) -> int:
        limit, room = self.settings.max_completion or max_completion, context_length(at.model("student"))
        if room is None or not self._asked:
            return limit
        longest = max(self._asked, key=lambda problem: len(self.prompt(at, "student", problem)))
        length = len(self.prompt(at, "student", longest))
        left = room - length
        if left < 1 or (self.settings.max_completion is not None and left < limit):
            fix = f"lower evaluate.max_completion to {left}" if left > 0 else "shorten or drop it"
            raise ValueError(
                f"held-out problem {longest.id!r}: its {length} prompt tokens and evaluate.max_completion={limit} "
                f"exceed the student's context of {room}; {fix}"
            )
        return min(limit, left)


def grade(evaluation: Evaluation, at: Moment, player: str, label: str) -> dict[str, Any]:
    """Everything that is measured of one player on the held-out problems.

    With n problems, k samples of each, c_i of them right, and T_i tokens written for problem i:

        avg@k       mean over problems of c_i / k; also under its number, as avg@4
        pass@j      mean over problems of 1 - C(k - c_i, j) / C(k, j), unbiased: one of j samples is right
        entropy     sum over tokens of the entropy of the model's distribution there / sum_i T_i, nats per token
        length      tokens per completion, the one that ends it included
        finished    share of completions that ended by themselves
        distinct_j  mean over problems of: different j-grams of tokens in its k completions / all their j-grams
        distinct_completions    mean over problems of how many of its k completions differ

    and, where there is another player "teacher", on the first `divergence_problems` problems, in nats per token:
    {forward_kl, reverse_kl, jsd}_{student_text, teacher_text}, target = teacher, model = this player, on what each of
    the two wrote. Distributions are taken at temperature 1, whatever the temperature of sampling. Other grades that the
    verifier gives stand as "reward/NAME".

    Standard errors are clustered: a problem is drawn, its samples and their tokens come with it (`ratio`).

    Returns:
        {"value", "standard_error"} by name, and the plain counts "problems", "samples" and "verifier_errors": problems
        for which the verifier failed. Those, and problems without a gold answer, take no part in accuracy.

    Raises:
        ValueError: logits are NaN.
    """
    settings, problems = evaluation.settings, evaluation.problems
    samples, compared = settings.samples, 0
    if "teacher" in at.players and player != "teacher":
        compared = min(settings.divergence_problems, len(problems))
    grades = _Grades(len(problems), samples)
    with ProgressBar((len(problems) + compared) * samples, label) as progress:
        for part, target in ((range(compared), "teacher"), (range(compared, len(problems)), None)):
            for chunk in evaluation.chunks(at, player, part, samples):
                texts = evaluation.write(at, player, [problems[i] for i in chunk], samples)
                grades.add(chunk, texts, verify(at, texts), measure(evaluation, at, player, target, texts))
                progress.advance(len(chunk) * samples, **grades.live())
        for chunk in evaluation.chunks(at, "teacher", range(compared), samples):
            texts = evaluation.write(at, "teacher", [problems[i] for i in chunk], samples)
            grades.add_teacher_text(chunk, texts, measure(evaluation, at, player, "teacher", texts))
            progress.advance(len(chunk) * samples)
    return grades.metrics(compared)


def probe(evaluation: Evaluation, at: Moment) -> dict[str, float]:
    """A quick look during training: one sample of each of the first `probe_problems` problems.

    Sampled as in `grade` and with the same uniforms, so that the curve moves because the student does.

    Returns:
        "accuracy" (left out where no verifier gave a verdict), "entropy" in nats per token of its own text, "length" in
        tokens; nothing where there are no held-out problems.
    """
    problems = evaluation.probe_problems
    if not problems:
        return {}
    texts = evaluation.write(at, "student", problems, 1)
    entropy = float(measure(evaluation, at, "student", None, texts)["entropy"].sum())
    lengths = [len(completion) for completion in texts.completions]
    known = [rewards["accuracy"] for rewards in verify(at, texts) if not math.isnan(rewards["accuracy"])]
    found = {"accuracy": sum(known) / len(known)} if known else {}
    return found | {"entropy": entropy / sum(lengths), "length": sum(lengths) / len(lengths)}


def token_samples(evaluation: Evaluation, at: Moment, step: int) -> list[dict[str, Any]]:
    """A completion of the student for each of the first `shown` problems, token by token, as samples.jsonl keeps it.

    "divergence" is the method's own where it has one, forward KL otherwise, and "divergence_name" says which; it is
    there only with a teacher. "route" names the terms of the objective that would train the token.
    """
    problems = evaluation.shown_problems
    if not problems:
        return []
    texts = evaluation.write(at, "student", problems, 1)
    name = str(getattr(at.method, "divergence", None) or "forward_kl")
    target = "teacher" if "teacher" in at.players else None
    rewards = verify(at, texts)
    routes = _routes(evaluation, at, texts, rewards)
    shown = []
    for row, problem in enumerate(problems):  # one by one: a few rows, and each keeps its likeliest tokens
        one = Texts([problem], 1, [texts.completions[row]], [texts.finished[row]])
        with torch.no_grad(), _evaluating(at, "student", target):
            model = _read(evaluation, at, "student", one)
            theirs = _read(evaluation, at, target, one) if target else None
        numbers = token_statistics(model, theirs, divergences=(name,))
        tokens: list[dict[str, Any]] = [
            {"text": at.tokenizer.decode([token]), "entropy": entropy, "weight": 1.0, "scored": True, "route": route}
            for token, entropy, route in zip(
                texts.completions[row], _short(numbers["entropy"]), routes[row], strict=True
            )
        ]
        for seen, column in ((model, "student_top"), (theirs, "teacher_top")):
            for token, top in zip(tokens, _likeliest(at, seen) if seen is not None else [], strict=False):
                token[column] = top
        sample: dict[str, Any] = {
            "step": step,
            "prompt": at.tokenizer.decode(evaluation.prompt(at, "student", problem)),
            "completion": at.tokenizer.decode(texts.completions[row], skip_special_tokens=True),
            "origin": "student",
            "problem_id": problem.id,
            "rewards": rewards[row],
        }
        if theirs is not None:
            sample["divergence_name"] = str(divergence(name))
            for token, value in zip(tokens, _short(numbers[name]), strict=True):
                token["divergence"] = value
        shown.append({**sample, "tokens": tokens})
    return shown


def _routes(evaluation: Evaluation, at: Moment, texts: Texts, rewards: list[dict[str, float]]) -> list[list[str]]:
    """For each token of each text the terms that would train it now.

    Where readers mark tokens, they read these texts, and a term trains a token to which its weights give a share.
    Otherwise all terms train all tokens.
    """
    terms = rehearse(at.method)
    every = " + ".join(term.name for term in terms)
    if not at.method.readers():
        return [[every] * len(completion) for completion in texts.completions]
    rollout = build_rollout(
        [evaluation.prompt(at, "student", problem) for problem in texts.problems],
        texts.completions,
        [[int(Origin.STUDENT)] * len(completion) for completion in texts.completions],
        rewards=[
            {"finished": float(finished), **found} for found, finished in zip(rewards, texts.finished, strict=True)
        ],
        notes=[
            {"problem_id": problem.id, "messages": problem.messages, "source": "student"} for problem in texts.problems
        ],
    )
    for reader in at.method.readers():
        rollout = reader.read(rollout, at)
    rollout = rollout.to(next(at.model("student").parameters()).device)
    columns = base_columns(rollout)
    measured = Scores(at, lambda seen: {}).measure(at.method.scores, rollout, at.method.targets())
    step = Batch(rollout, columns | measured, aggregate=at.method.aggregate)
    columns = dict(step.columns) | at.method.weight(step)
    names: list[list[list[str]]] = [[[] for _ in completion] for completion in texts.completions]
    for term in terms:
        weights = multipliers(columns, term.over, term.mean, term.weight)[0]
        weights = weights if weights.dim() == 2 else weights[:, None].expand_as(rollout.completions)
        for row, row_names in enumerate(names):
            for t, here in enumerate(row_names):
                if float(weights[row, t]) != 0:
                    here.append(term.name)
    return [[" + ".join(here) or "none" for here in row] for row in names]


def pass_at(correct: int, samples: int, j: int) -> float:
    """1 - C(samples - correct, j) / C(samples, j): the chance that j of the samples have a right one among them.

    Source: Chen et al., arXiv 2107.03374, equation 1.

    >>> pass_at(1, 4, 2)
    0.5
    """
    return 1.0 - math.comb(samples - correct, j) / math.comb(samples, j)


def ratio(sums: Float[Tensor, "problem"], counts: Float[Tensor, "problem"]) -> Metric:
    """sum_i s_i / sum_i n_i over problems i, and its standard error when problems are drawn at random.

        standard_error^2 = N / (N - 1) sum_i (s_i - value n_i)^2 / (sum_i n_i)^2

    With all n_i equal, that is the standard error of the mean of the N problem means. None for fewer than two problems
    or a value that is not finite.
    """
    sums, counts = sums.double(), counts.double()
    total, problems = counts.sum(), int((counts > 0).sum())
    value = float(sums.sum() / total) if total > 0 else math.nan
    if problems < 2 or not math.isfinite(value):
        return {"value": value, "standard_error": None}
    spread = float((sums - value * counts).square().sum()) * problems / (problems - 1)
    return {"value": value, "standard_error": math.sqrt(spread) / float(total)}


def mean(values: Sequence[float]) -> Metric:
    """Over problems; None where it needs two."""
    return ratio(torch.tensor(values, dtype=torch.float64), torch.ones(len(values)))


class _Grades:
    """Sums per problem, filled chunk by chunk in any order."""

    def __init__(self, problems: int, samples: int) -> None:
        self.problems, self.samples = problems, samples
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}  # tokens, by whose text
        self.right: dict[int, int] = {}  # of problems with a verdict on every sample
        self.failed = 0
        self.distinct: dict[str, list[float]] = {"distinct_1": [], "distinct_2": [], "distinct_completions": []}
        self.rewards: dict[str, dict[int, list[float]]] = {}

    def add(
        self, chunk: Sequence[int], texts: Texts, rewards: list[dict[str, float]], measured: dict[str, Tensor]
    ) -> None:
        k = self.samples
        self._fill("tokens", chunk, torch.tensor([len(c) for c in texts.completions]), self.counts)
        self._fill("finished", chunk, torch.tensor(texts.finished), self.sums)
        for name, values in measured.items():
            self._fill(f"{name}_student_text" if name in TO_TEACHER else name, chunk, values, self.sums)
        for place, problem in enumerate(chunk):
            mine = slice(place * k, (place + 1) * k)
            accuracies = [row["accuracy"] for row in rewards[mine]]
            self.failed += any(row.get("error") for row in rewards[mine])
            if not any(map(math.isnan, accuracies)):
                self.right[problem] = sum(value >= 1 for value in accuracies)
            for row in rewards[mine]:
                for name, value in row.items():
                    if name not in ("accuracy", "error") and not math.isnan(value):
                        self.rewards.setdefault(name, {}).setdefault(problem, []).append(value)
            completions = texts.completions[mine]
            for n in (1, 2):
                share = distinct(completions, n)
                if share is not None:
                    self.distinct[f"distinct_{n}"].append(share)
            self.distinct["distinct_completions"].append(len(set(map(tuple, completions))))

    def add_teacher_text(self, chunk: Sequence[int], texts: Texts, measured: dict[str, Tensor]) -> None:
        self._fill("teacher_tokens", chunk, torch.tensor([len(c) for c in texts.completions]), self.counts)
        for name in TO_TEACHER:
            self._fill(f"{name}_teacher_text", chunk, measured[name], self.sums)

    def live(self) -> dict[str, float]:
        """What the progress bar shows."""
        return {"accuracy": sum(self.right.values()) / (len(self.right) * self.samples)} if self.right else {}

    def metrics(self, compared: int) -> dict[str, Any]:
        """All of them; divergences over the first `compared` problems."""
        k, n = self.samples, self.problems
        found: dict[str, Any] = {"problems": n, "samples": k, "verifier_errors": self.failed}
        if n == 0:
            return found
        if self.right:
            found[f"avg@{k}"] = mean([right / k for right in self.right.values()])
            found["avg@k"] = found[f"avg@{k}"]  # the name under which a table finds it, whatever k is
            for j in (2**power for power in range(k.bit_length())):
                found[f"pass@{j}"] = mean([pass_at(right, k, j) for right in self.right.values()])
        rows, tokens = torch.full((n,), k), self.counts["tokens"]
        found["entropy"] = ratio(self.sums["entropy"], tokens)
        found["length"] = ratio(tokens, rows)
        found["finished"] = ratio(self.sums["finished"], rows)
        found |= {name: mean(values) for name, values in self.distinct.items() if values}
        for whose, counted in (("student_text", "tokens"), ("teacher_text", "teacher_tokens")):
            for name in TO_TEACHER if compared else ():
                counts = self.counts[counted][:compared]
                found[f"{name}_{whose}"] = ratio(self.sums[f"{name}_{whose}"][:compared], counts)
        for name, by_problem in sorted(self.rewards.items()):
            sums = torch.tensor([sum(values) for values in by_problem.values()])
            found[f"reward/{name}"] = ratio(sums, torch.tensor([len(values) for values in by_problem.values()]))
        return found

    def _fill(self, name: str, chunk: Sequence[int], rows: Tensor, into: dict[str, Tensor]) -> None:
        per_problem = into.setdefault(name, torch.zeros(self.problems, dtype=torch.float64))
        per_problem[list(chunk)] = rows.double().view(len(chunk), self.samples).sum(1)


def distinct(completions: Sequence[Sequence[int]], n: int) -> float | None:
    """Different n-grams / all n-grams of some completions together; None where none is n tokens long.

    >>> distinct([[1, 2, 1], [1, 2]], 2)
    0.6666666666666666
    """
    grams = [tuple(tokens[i : i + n]) for tokens in completions for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def verify(at: Moment, texts: Texts) -> list[dict[str, float]]:
    """What the task's verifier says of each row; "accuracy" is NaN where it gave no verdict."""
    decoded = at.tokenizer.batch_decode(texts.completions, skip_special_tokens=True)
    grades = []
    for row, text in enumerate(decoded):
        found = at.task.verify(texts.problems[row // texts.samples], text)
        grades.append({"accuracy": math.nan, **found})
    return grades


@torch.no_grad()
def measure(
    evaluation: Evaluation, at: Moment, player: str, target: str | None, texts: Texts
) -> dict[str, Float[Tensor, "row"]]:
    """Sums over each row's tokens of the player's entropy and, with a target, of its divergences from it."""
    owners = [problem for problem in texts.problems for _ in range(texts.samples)]
    widths = [len(evaluation.prompt(at, player, owner)) for owner in owners]
    order = sorted(range(len(owners)), key=lambda row: widths[row] + len(texts.completions[row]))
    rows_each = max(at.rows_at_once // 8, 1)  # as in the engine: no cache, but hidden states of whole rows
    sums: dict[str, Tensor] = {}
    with _evaluating(at, player, target):
        for start in range(0, len(order), rows_each):
            rows = order[start : start + rows_each]
            part = Texts([owners[row] for row in rows], 1, [texts.completions[row] for row in rows], [])
            model = _read(evaluation, at, player, part)
            theirs = _read(evaluation, at, target, part) if target else None
            for name, values in token_statistics(model, theirs, divergences=TO_TEACHER).items():
                total = sums.setdefault(name, torch.zeros(len(order), dtype=torch.float64))
                total[rows] = model.grid(values).double().sum(1).cpu()
    return {name: sums[name] for name in ("entropy", *TO_TEACHER) if name in sums}


def _read(evaluation: Evaluation, at: Moment, player: str, texts: Texts) -> FullPredictions:
    """One sample a problem; the player reads its own prompt before somebody's completion."""
    prompts = [evaluation.prompt(at, player, problem) for problem in texts.problems]
    origins = [[int(Origin.STUDENT)] * len(completion) for completion in texts.completions]
    rollout: Rollout = build_rollout(prompts, texts.completions, origins)
    model = at.model(player)
    return read(model, rollout.to(next(model.parameters()).device), pad_id=at.tokenizer.pad_token_id or 0)


@contextmanager
def _evaluating(at: Moment, *players: str | None) -> Iterator[None]:
    """Dropout is off while inside."""
    models = [at.model(player) for player in players if player is not None]
    before = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, training in zip(models, before, strict=True):
            model.train(training)


def _likeliest(at: Moment, seen: FullPredictions) -> list[list[list[Any]]]:
    top = seen.top(TOP)
    return [
        [[at.tokenizer.decode([token]), p] for token, p in zip(tokens, _short(log_p.exp()), strict=True)]
        for tokens, log_p in zip(top.token_ids.tolist(), top.log_probs, strict=True)
    ]


def _short(values: Tensor) -> list[float]:
    """Five significant digits: what is shown, and a third of the bytes."""
    return [float(f"{value:.5g}") for value in values.tolist()]
