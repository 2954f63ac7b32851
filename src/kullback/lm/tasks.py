"""Tasks: problems with a training and a held-out split, and the verifier that grades a completion.

    task = load_task("reasoning_gym/chain_sum", seed=0)
    task = load_task({"name": "reasoning_gym/chain_sum", "max_terms": 3, "reply": "answer", "held_out": 200}, seed=0)
    task = load_task({"name": "data/train.jsonl", "columns": {"prompt": "question"}, "held_out": 100}, seed=0)

A task is a reasoning-gym data set by name, "embedded:arithmetic" (that of the shipped models), a file (.jsonl, .json,
.parquet), a directory, a name on the Hugging Face hub, or an object already in memory. No question of `held_out` occurs
in `train`, for any seed and any two counts: which side a procedural question belongs to is decided by a hash of its
text. `held_out` does not depend on the seed, so runs that differ in nothing else are compared on the same problems.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from kullback.lm.problems import (
    PREFIX,
    PRESETS,
    SHARED_OPTIONS,
    Problem,
    Task,
    check_options,
    count_option,
    digest,
    nearest,
    one_line,
    system_turns,
    verifier_of,
    writer_of,
)
from kullback.lm.tables import table_task

HELD_OUT_SHARE = 0.2  # of all questions that a procedural task can ask
PROCEDURAL_OPTIONS = SHARED_OPTIONS | {"size", "question"}


def load_task(spec: Any, *, seed: int) -> Task:
    """The task that `spec` describes.

    Args:
        spec: a name; a mapping with `name` and options; a `datasets.Dataset` or a list of dicts; or a mapping with
            `data` (one of those two) and options.
        seed: decides the training problems of a procedural task, and which worked solution each one shows.

    Options of every task:
        system: text of a system turn, put first where there is none.
        verifier: "auto" (reasoning-gym's own; "exact" for tables with answers), "exact", "math", or file.py:function.
        verifier_timeout: seconds that a verifier which is somebody's code may take for one completion, 30 by default; a
            call that takes longer is an error of that sample alone. 0 sets no limit. For "math" 5 by default. See
            `verifiers.in_time`.
        extract: where the answer stands in a completion, see `verifiers.extract_answer`.
        reply: "answer", the name of a writer in `kullback.lm.worked`, or file.py:function of (question, answer,
            metadata, rng).
        held_out: number of held-out problems.
    Of reasoning-gym tasks, beside the data set's own (such as min_terms):
        size: number of training problems, made when they are read.
        question: a template over the item's metadata, such as "{expression}"; default, its question text.
    Of tables:
        columns: their names, {"prompt": "question"}; needed are `messages`, or `prompt` with or without `completion`
            and `answer`, or the pairs of preference data, `chosen` and `rejected`, with or without a `prompt`: without
            one it is what the two conversations have in common. Each is text or a list of turns.
        split, held_out_split, config: as in `datasets.load_dataset`.

    Raises:
        ValueError: one sentence with the option, its value and the fix.
    """
    options = _options(spec)
    if "data" in options:
        return table_task("data", options, seed)
    name = options.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"task={spec!r}: name the task, for example {PREFIX}chain_sum or data/train.jsonl")
    if name in PRESETS:
        options = {**PRESETS[name], **{key: value for key, value in options.items() if key != "name"}}
    if options["name"].startswith(PREFIX):
        return _procedural_task(options, seed, name)
    return table_task(name, options, seed)


def _options(spec: Any) -> dict[str, Any]:
    if isinstance(spec, str | Path):
        return {"name": str(spec)}
    if isinstance(spec, Mapping) and not hasattr(spec, "column_names"):  # a DatasetDict is a mapping too
        return dict(spec)
    return {"data": spec}


# Procedural tasks


def _procedural_task(options: dict[str, Any], seed: int, name: str) -> Task:
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(f"task={name!r} needs reasoning-gym: pip install reasoning-gym") from error
    dataset_name = options["name"].removeprefix(PREFIX)
    if dataset_name not in DATASETS:
        raise ValueError(f"task={name!r}: reasoning-gym has no such data set{nearest(dataset_name, DATASETS, PREFIX)}")
    make, config_class = DATASETS[dataset_name]
    own = {f.name for f in dataclasses.fields(config_class)} - {"seed", "size"}
    check_options(name, options, PROCEDURAL_OPTIONS | own)
    config = {key: value for key, value in options.items() if key in own}
    size, held_out = count_option(options, "size", 10_000, 1), count_option(options, "held_out", 500, 0)
    writer = writer_of(options.get("reply"))

    def dataset(split: str, split_seed: int, length: int) -> Any:
        base = int.from_bytes(digest(f"{dataset_name}|{split}|{split_seed}")[:4], "big") >> 1
        try:
            settings = config_class(**config, seed=base, size=length)
            return make(settings)
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(f"task={name!r}: {one_line(error)} (options {config})") from error

    def problem(item: dict[str, Any], split: str, index: int) -> Problem:
        id_ = f"{dataset_name}/{split}/{index}"
        metadata = {**item["metadata"], "question": item["question"]}
        question = item["question"]
        if "question" in options:
            try:
                question = str(options["question"]).format(**metadata)
            except (KeyError, IndexError, ValueError) as error:
                raise ValueError(
                    f"task.question={options['question']!r}: {one_line(error)} is not in this data set's metadata, "
                    f"which has {', '.join(map(str, metadata))}"
                ) from error
        messages = [*system_turns(options), {"role": "user", "content": question}]
        reply = None
        if writer is not None:
            # One generator for each problem: a reply does not depend on which others were read before it.
            text = writer(question, item["answer"], metadata, random.Random(f"{seed if split == 'train' else 0}|{id_}"))
            if not text or item["answer"] is None:
                raise ValueError(f"task.reply={options['reply']!r}: {id_} has no answer to write; leave `reply` out")
            reply = [{"role": "assistant", "content": text}]
        return Problem(id_, messages, reply, item["answer"], metadata)

    train = dataset("train", seed, size * _Fresh.tries)
    held = dataset("held_out", 0, max(1, held_out) * 200)
    grade = options.get("verifier", "auto")
    verifier = verifier_of(
        "reasoning_gym" if grade == "auto" else grade,
        options.get("extract"),
        train.score_answer,
        options.get("verifier_timeout"),
    )
    return Task(
        name,
        _Fresh(train, size, lambda item, index: problem(item, "train", index), name),
        _Distinct(held, held_out, lambda item, index: problem(item, "held_out", index), name),
        verifier,
        dict(options),
    )


class _Lazy(Sequence[Problem]):
    """A sequence of problems that are made when they are read."""

    def __init__(self, length: int):
        self._length = length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(f"problem {index} of {self._length}")
        return self._make(index % self._length)

    def _make(self, index: int) -> Problem:
        raise NotImplementedError


class _Fresh(_Lazy):
    """Training problems: problem i is the first of items i, i + size, i + 2 size, ... that is not for holding out.

    So any problem is made without its predecessors, in any order.
    """

    tries = 64  # one question in five is held out: 64 in a row happen only where the data set asks one question

    def __init__(self, items: Any, size: int, make: Callable[[Any, int], Problem], name: str):
        super().__init__(size)
        self._items, self._convert, self._name = items, make, name

    def _make(self, index: int) -> Problem:
        for attempt in range(self.tries):
            item = self._items[index + attempt * self._length]
            if not _is_held_out(item["question"]):
                return self._convert(item, index)
        raise ValueError(f"task={self._name!r}: its options allow too few different questions to hold any out")


class _Distinct(_Lazy):
    """Held-out problems: different questions, all of the held-out side, made in one go when the first one is read."""

    def __init__(self, items: Any, count: int, make: Callable[[Any, int], Problem], name: str):
        super().__init__(count)
        self._items, self._convert, self._name = items, make, name
        self._problems: list[Problem] = []

    def _make(self, index: int) -> Problem:
        if not self._problems:
            self._problems = self._collect()
        return self._problems[index]

    def _collect(self) -> list[Problem]:
        problems: list[Problem] = []
        seen: set[str] = set()
        for at in range(self._length * 200):
            item = self._items[at]
            if item["question"] not in seen and _is_held_out(item["question"]):
                seen.add(item["question"])
                problems.append(self._convert(item, len(problems)))
                if len(problems) == self._length:
                    return problems
        raise ValueError(
            f"task={self._name!r}: only {len(problems)} different held-out questions exist under these options; set "
            f"held_out to at most that, or widen the options"
        )


def _is_held_out(question: str) -> bool:
    return int.from_bytes(digest(" ".join(question.split()))[:4], "big") < HELD_OUT_SHARE * 2**32
