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
import difflib
import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final, overload

from kullback.lm import verifiers
from kullback.lm.worked import WRITERS

Turn = dict[str, str]

ROLES = ("system", "user", "assistant", "tool")
PREFIX = "reasoning_gym/"
HELD_OUT_SHARE = 0.2  # of all questions that a procedural task can ask
PRESETS: dict[str, dict[str, Any]] = {
    "embedded:arithmetic": {  # what the shipped teacher and student were trained on
        "name": "reasoning_gym/chain_sum",
        "min_terms": 4,
        "max_terms": 4,
        "max_digits": 1,
        "question": "{expression}",
        "reply": "sum_steps",
        "extract": "equals",
    }
}

FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}

_SHARED = {"system", "verifier", "extract", "reply", "held_out"}
_PROCEDURAL = _SHARED | {"size", "question"}
_TABLE = _SHARED | {"split", "held_out_split", "config", "columns"}
_COLUMNS = ("messages", "prompt", "completion", "answer")


@dataclass(frozen=True)
class Problem:
    """One thing to answer."""

    id: str
    messages: list[Turn]  # what the student reads; ends before the first assistant turn
    reply: list[Turn] | None  # the data set's continuation, from its first assistant turn on; None: prompts only
    answer: Any = None  # gold answer for the verifier
    metadata: dict[str, Any] = field(default_factory=dict)


@final
@dataclass
class Task:
    """Problems and how to grade them. `spec` is what `load_task` was given, without loaded objects."""

    name: str
    train: Sequence[Problem]
    held_out: Sequence[Problem]
    verifier: verifiers.Verifier | None = None
    spec: dict[str, Any] = field(default_factory=dict)
    errors: int = 0  # how often the verifier failed
    last_error: str = ""

    def verify(self, problem: Problem, completion: str) -> dict[str, float]:
        """Grades: "accuracy" 0 or 1, and whatever else the verifier says. It never raises.

        nan accuracy means nobody knows: the problem has no gold answer, or the verifier failed. Then "error" is 1, and
        `errors` and `last_error` say how often and why.
        """
        if self.verifier is None:
            return {"accuracy": float("nan")}
        try:
            return self.verifier(problem, completion)
        except Exception as error:  # a user's function may raise anything, and one row must not end a run
            self.errors += 1
            self.last_error = f"{problem.id}: {type(error).__name__}: {error}"
            return {"accuracy": float("nan"), "error": 1.0}


def load_task(spec: Any, *, seed: int) -> Task:
    """The task that `spec` describes.

    Args:
        spec: a name; a mapping with `name` and options; a `datasets.Dataset` or a list of dicts; or a mapping with
            `data` (one of those two) and options.
        seed: decides the training problems of a procedural task, and which worked solution each one shows.

    Options of every task:
        system: text of a system turn, put first where there is none.
        verifier: "auto" (reasoning-gym's own; "exact" for tables with answers), "exact", "math", or file.py:function.
        extract: where the answer stands in a completion, see `verifiers.extract_answer`.
        reply: "answer", the name of a writer in `kullback.lm.worked`, or file.py:function of (question, answer,
            metadata, rng).
        held_out: number of held-out problems.
    Of reasoning-gym tasks, beside the data set's own (such as min_terms):
        size: number of training problems, made when they are read.
        question: a template over the item's metadata, such as "{expression}"; default, its question text.
    Of tables:
        columns: their names, {"prompt": "question"}; needed are `messages`, or `prompt` with or without `completion`
            and `answer`. A prompt or completion is text or a list of turns.
        split, held_out_split, config: as in `datasets.load_dataset`.

    Raises:
        ValueError: one sentence with the option, its value and the fix.
    """
    options = _options(spec)
    if "data" in options:
        return _table_task("data", options, seed)
    name = options.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"task={spec!r}: name the task, for example {PREFIX}chain_sum or data/train.jsonl")
    if name in PRESETS:
        options = {**PRESETS[name], **{key: value for key, value in options.items() if key != "name"}}
    if options["name"].startswith(PREFIX):
        return _procedural_task(options, seed, name)
    return _table_task(name, options, seed)


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
        raise ValueError(f"task={name!r}: reasoning-gym has no such data set{_nearest(dataset_name, DATASETS, PREFIX)}")
    make, config_class = DATASETS[dataset_name]
    own = {f.name for f in dataclasses.fields(config_class)} - {"seed", "size"}
    _check_keys(name, options, _PROCEDURAL | own)
    config = {key: value for key, value in options.items() if key in own}
    size, held_out = _count(options, "size", 10_000, 1), _count(options, "held_out", 500, 0)
    writer = _writer(options.get("reply"))

    def dataset(split: str, split_seed: int, length: int) -> Any:
        base = int.from_bytes(_digest(f"{dataset_name}|{split}|{split_seed}")[:4], "big") >> 1
        try:
            settings = config_class(**config, seed=base, size=length)
            return make(settings)
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(f"task={name!r}: {_one_line(error)} (options {config})") from error

    def problem(item: dict[str, Any], split: str, index: int) -> Problem:
        id_ = f"{dataset_name}/{split}/{index}"
        metadata = {**item["metadata"], "question": item["question"]}
        question = item["question"]
        if "question" in options:
            try:
                question = str(options["question"]).format(**metadata)
            except (KeyError, IndexError, ValueError) as error:
                raise ValueError(
                    f"task.question={options['question']!r}: {_one_line(error)} is not in this data set's metadata, "
                    f"which has {', '.join(map(str, metadata))}"
                ) from error
        messages = [*_system(options), {"role": "user", "content": question}]
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
    verifier = _verifier("reasoning_gym" if grade == "auto" else grade, options.get("extract"), train.score_answer)
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
    return int.from_bytes(_digest(" ".join(question.split()))[:4], "big") < HELD_OUT_SHARE * 2**32


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


# Tables


def _table_task(name: str, options: dict[str, Any], seed: int) -> Task:
    _check_source(name, options.get("data"))
    _check_keys(name, options, _TABLE | {"data"})
    columns = options.get("columns") or {}
    if not isinstance(columns, Mapping) or not set(columns) <= set(_COLUMNS):
        raise ValueError(f"task.columns={columns!r}: map {', '.join(_COLUMNS)} to names of the data's own columns")
    writer = _writer(options.get("reply"))
    train_rows, held_rows = _splits(name, options)
    read = _Reader(name, options, columns, writer, seed)
    train = read.rows(train_rows, "train")
    count = _count(options, "held_out", len(held_rows) if held_rows is not None else 0, 0)
    if held_rows is not None:
        held = read.rows(held_rows, "held_out")[:count]
    else:
        train, held = _hold_out(train, count, name)
    keys = {_key(problem) for problem in held}
    train = [problem for problem in train if _key(problem) not in keys]
    if not train:
        raise ValueError(f"task={name!r}: no training problem is left beside the {len(held)} held out; lower held_out")
    grade = options.get("verifier", "auto")
    has_answers = any(problem.answer is not None for problem in train + held)
    if grade == "auto":
        grade = "exact" if has_answers else None
    elif grade in verifiers.NAMES and not has_answers:
        raise ValueError(f"task.verifier={grade!r}: {name} has no answers; name their column, columns: {{answer: ...}}")
    verifier = None if grade is None else _verifier(grade, options.get("extract"), None)
    return Task(name, train, held, verifier, {key: value for key, value in options.items() if key != "data"})


def _splits(name: str, options: dict[str, Any]) -> tuple[Any, Any | None]:
    """The rows of the training split, and of the held-out split where one is named."""
    data = options["data"] if "data" in options else _open(name, options)
    split, held_split = options.get("split", "train"), options.get("held_out_split")
    if isinstance(data, Mapping):
        for key, wanted in (("split", split), ("held_out_split", held_split)):
            if wanted is not None and wanted not in data:
                raise ValueError(f"task.{key}={wanted!r}: {name} has the splits {', '.join(map(str, data))}")
        return data[split], None if held_split is None else data[held_split]
    if held_split is not None:
        raise ValueError(f"task.held_out_split={held_split!r}: {name} has no splits; set held_out, a number of rows")
    return data, None


def _check_source(name: str, data: Any) -> None:
    """What is no table is refused before its options are looked at: a misspelt task has another task's options."""
    if data is not None:
        if not (hasattr(data, "column_names") or isinstance(data, Sequence | Mapping)) or isinstance(data, str):
            raise ValueError(
                f"task.data: {type(data).__name__} is no table; give a datasets.Dataset or a list of dicts"
            )
        return
    path = Path(name).expanduser()
    if path.suffix in FILES and not path.is_file():
        raise ValueError(f"task={name!r}: there is no file {path.resolve()}")
    if path.exists() or path.suffix in FILES:
        return
    ours = name.startswith(("embedded:", PREFIX.replace("_", "-")))
    if ours or "/" not in name:
        known = _known_names()
        close = difflib.get_close_matches(name, [full for full in known if full.endswith("/" + name)], n=1, cutoff=0.1)
        close = close or difflib.get_close_matches(name, known, n=3, cutoff=0.3 if ours else 0.6)
        if close or ours:
            raise ValueError(f"task={name!r} is not a task; did you mean {' or '.join(close or PRESETS)}?")


def _open(name: str, options: dict[str, Any]) -> Any:
    """Files through the readers of `datasets`; a directory or any other name through its `load_dataset`."""
    path = Path(name).expanduser()
    kind = FILES.get(path.suffix)
    import datasets

    try:
        if kind:
            return datasets.load_dataset(kind, data_files=str(path), split="train")
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # written by save_to_disk
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(str(path) if path.exists() else name, options.get("config"))
    except Exception as error:  # the hub, the network, the readers and Arrow each raise their own
        close = difflib.get_close_matches(name, _known_names(), n=3, cutoff=0.5)
        hint = f"; near it are {', '.join(close)}" if close else ""
        raise ValueError(
            f"task={name!r} could not be read: {type(error).__name__}: {_one_line(error)}{hint}"
        ) from error


class _Reader:
    """Rows of a table as problems; a row that cannot be used is named by its number."""

    def __init__(self, name: str, options: dict[str, Any], columns: Mapping[str, str], writer: Any, seed: int):
        self.name, self.options, self.columns, self.writer, self.seed = name, options, columns, writer, seed

    def rows(self, rows: Any, split: str) -> list[Problem]:
        if not hasattr(rows, "__len__"):
            raise ValueError(f"task={self.name!r}: a streamed data set has no length; load it without streaming")
        if len(rows) == 0:
            raise ValueError(f"task={self.name!r}: the {split} rows are empty")
        column = {wanted: self.columns.get(wanted, wanted) for wanted in _COLUMNS}
        found = self._columns_of(rows)
        missing = [own for own in self.columns.values() if own not in found]
        if missing or not {column["messages"], column["prompt"]} & set(found):
            needs = "it needs `messages`, or `prompt` with or without `completion` and `answer`"
            what = f"there is no column {missing[0]!r}" if missing else needs
            raise ValueError(
                f"task={self.name!r}: {what}; the columns are {', '.join(found)}: name yours with "
                f"columns: {{prompt: {found[0] if found else '...'}}}"
            )
        present = {wanted: own for wanted, own in column.items() if own in found}
        return [self._problem(row, present, f"{split}/{index}", index) for index, row in enumerate(rows)]

    def _columns_of(self, rows: Any) -> list[str]:
        if hasattr(rows, "column_names"):
            return list(rows.column_names)
        for index, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise ValueError(f"task={self.name!r}, row {index}: {row!r} is no row; write a dict of columns")
        return list(dict.fromkeys(column for row in rows for column in row))

    def _problem(self, row: Mapping[str, Any], column: dict[str, str], id_: str, index: int) -> Problem:
        where = f"task={self.name!r}, row {index}"
        answer = row.get(column["answer"]) if "answer" in column else None
        extra = {key: value for key, value in row.items() if key not in column.values()}
        if "messages" in column:
            turns = _turns(row.get(column["messages"]), "messages", where, "user")
            first = next((at for at, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
            messages, reply = turns[:first], turns[first:] or None
        else:
            messages = _turns(row.get(column["prompt"]), "prompt", where, "user")
            reply = None
            if "completion" in column:
                reply = _turns(row.get(column["completion"]), "completion", where, "assistant")
        if not messages or messages[-1]["role"] not in ("user", "tool"):
            raise ValueError(f"{where}: the prompt must end with a user turn, and this one has {_roles(messages)}")
        if reply is not None and reply[0]["role"] != "assistant":
            raise ValueError(
                f"{where}: the completion must start with an assistant turn, and this one has {_roles(reply)}"
            )
        for turn in reply or []:
            if turn["role"] == "assistant" and not turn["content"].strip():
                raise ValueError(
                    f"{where}: the completion is empty, so there is nothing to learn; remove the row or fill it"
                )
        if self.writer is not None:
            rng = random.Random(f"{self.seed}|{id_}")
            text = self.writer(messages[-1]["content"], answer, extra, rng)
            if not text:
                raise ValueError(f"{where}: reply={self.options['reply']!r} wrote an empty completion")
            reply = [{"role": "assistant", "content": str(text)}]
        if messages[0]["role"] != "system":
            messages = [*_system(self.options), *messages]
        return Problem(id_, messages, reply, answer, {**extra, "question": messages[-1]["content"]})


def _turns(value: Any, column: str, where: str, role: str) -> list[Turn]:
    """Text as one turn of `role`, or a list of turns, checked."""
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{where}: the {column} is empty; remove the row or fill it")
        return [{"role": role, "content": value}]
    if not isinstance(value, Sequence) or not value:
        raise ValueError(f"{where}: the {column} is {value!r}; write text, or a list of {{role, content}} turns")
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise ValueError(
                f"{where}: {turn!r} is no turn; it needs a role ({', '.join(ROLES)}) and its text as content"
            )
        turns.append({"role": turn["role"], "content": turn["content"]})
    return turns


def _hold_out(problems: list[Problem], count: int, name: str) -> tuple[list[Problem], list[Problem]]:
    """The `count` different prompts whose hash is smallest, and the rest: a choice that no seed changes."""
    first = {_key(problem): problem for problem in reversed(problems)}  # of repeated prompts, the first row
    if count >= len(first):
        raise ValueError(
            f"task.held_out={count}: {name} has {len(first)} different prompts, and some must be left to train on"
        )
    keys = sorted(first, key=_digest)[:count]
    held = set(keys)
    return [problem for problem in problems if _key(problem) not in held], [first[key] for key in keys]


def _key(problem: Problem) -> str:
    return json.dumps([[turn["role"], turn["content"]] for turn in problem.messages])


# Shared


def _verifier(name: Any, extract: str | None, score_answer: Callable[..., float] | None) -> verifiers.Verifier:
    if callable(name):
        return verifiers.from_callable(name)
    if not isinstance(name, str):
        raise ValueError(f"task.verifier={name!r}: write a name or path/to/file.py:function")
    verifiers.extract_answer("", extract or "auto")  # an unknown way of extracting is refused now, not while training
    if name == "reasoning_gym" and score_answer is not None:
        return verifiers.reasoning_gym(score_answer, extract or "auto")
    if name == "exact":
        return verifiers.exact(extract or "auto")
    if name == "math":
        return verifiers.math_answer(extract)
    if ".py" in name:
        return verifiers.user_function(name)
    names = ["auto", "exact", "math"]
    raise ValueError(
        f"task.verifier={name!r}: choose auto, exact, math or path/to/file.py:function{_nearest(name, names)}"
    )


def _writer(name: Any) -> Callable[..., str] | None:
    if name is None:
        return None
    if callable(name):
        return name
    if name == "answer":
        return lambda question, answer, metadata, rng: "" if answer is None else str(answer)
    if name in WRITERS:
        return WRITERS[name]
    if isinstance(name, str) and ".py" in name:
        return verifiers.load_function(name, "task.reply")
    names = ["answer", *WRITERS]
    raise ValueError(
        f"task.reply={name!r}: choose {', '.join(names)} or path/to/file.py:function{_nearest(str(name), names)}"
    )


def _check_keys(name: str, options: dict[str, Any], valid: set[str]) -> None:
    for key in options:
        if key not in valid | {"name"}:
            raise ValueError(
                f"task.{key}={options[key]!r}: {name} has no such option{_nearest(key, valid)} "
                f"(it has {', '.join(sorted(valid - {'data'}))})"
            )


def _count(options: dict[str, Any], key: str, default: int, least: int) -> int:
    value = options.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"task.{key}={value!r}: choose a whole number, {least} or more")
    return value


def _system(options: dict[str, Any]) -> list[Turn]:
    return [{"role": "system", "content": str(options["system"])}] if options.get("system") else []


def _roles(turns: Sequence[Turn]) -> str:
    return ", ".join(turn["role"] for turn in turns) or "no turn"


def _known_names() -> list[str]:
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        return list(PRESETS)
    return [*PRESETS, *(PREFIX + name for name in DATASETS)]


def _nearest(name: str, names: Any, prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(prefix + match for match in close)}?" if close else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
