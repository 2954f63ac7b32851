"""Tables as tasks: files, `datasets` and lists of dicts, in the column names of the ecosystem."""

import difflib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kullback.lm import verifiers
from kullback.lm.problems import (
    PREFIX,
    PRESETS,
    ROLES,
    SHARED_OPTIONS,
    Problem,
    Task,
    Turn,
    check_options,
    count_option,
    digest,
    known_names,
    one_line,
    roles_of,
    system_turns,
    verifier_of,
    writer_of,
)

FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
TABLE_OPTIONS = SHARED_OPTIONS | {"split", "held_out_split", "config", "columns"}
COLUMNS = ("messages", "prompt", "completion", "answer", "chosen", "rejected")


def table_task(name: str, options: dict[str, Any], seed: int) -> Task:
    _check_source(name, options.get("data"))
    check_options(name, options, TABLE_OPTIONS | {"data"})
    columns = options.get("columns") or {}
    if not isinstance(columns, Mapping) or not set(columns) <= set(COLUMNS):
        raise ValueError(f"task.columns={columns!r}: map {', '.join(COLUMNS)} to names of the data's own columns")
    writer = writer_of(options.get("reply"))
    train_rows, held_rows = _splits(name, options)
    read = _Reader(name, options, columns, writer, seed)
    train = read.rows(train_rows, "train")
    count = count_option(options, "held_out", len(held_rows) if held_rows is not None else 0, 0)
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
    limit = options.get("verifier_timeout")
    verifier = None if grade is None else verifier_of(grade, options.get("extract"), None, limit)
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
        known = known_names()
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
        close = difflib.get_close_matches(name, known_names(), n=3, cutoff=0.5)
        hint = f"; near it are {', '.join(close)}" if close else ""
        raise ValueError(f"task={name!r} could not be read: {type(error).__name__}: {one_line(error)}{hint}") from error


class _Reader:
    """Rows of a table as problems; a row that cannot be used is named by its number."""

    def __init__(self, name: str, options: dict[str, Any], columns: Mapping[str, str], writer: Any, seed: int):
        self.name, self.options, self.columns, self.writer, self.seed = name, options, columns, writer, seed

    def rows(self, rows: Any, split: str) -> list[Problem]:
        if not hasattr(rows, "__len__"):
            raise ValueError(f"task={self.name!r}: a streamed data set has no length; load it without streaming")
        if len(rows) == 0:
            raise ValueError(f"task={self.name!r}: the {split} rows are empty")
        column = {wanted: self.columns.get(wanted, wanted) for wanted in COLUMNS}
        found = self._columns_of(rows)
        missing = [own for own in self.columns.values() if own not in found]
        if missing or not {column["messages"], column["prompt"], column["chosen"]} & set(found):
            needs = "it needs `messages`, or `prompt` with or without `completion` and `answer`, or pairs"
            what = f"there is no column {missing[0]!r}" if missing else needs
            raise ValueError(
                f"task={self.name!r}: {what}; the columns are {', '.join(found)}: name yours with "
                f"columns: {{prompt: {found[0] if found else '...'}}}"
            )
        present = {wanted: own for wanted, own in column.items() if own in found}
        if ("chosen" in present) != ("rejected" in present):
            raise ValueError(
                f"task={self.name!r}: preference data needs both `chosen` and `rejected`; the columns are "
                f"{', '.join(found)}: name yours with columns: {{chosen: ..., rejected: ...}}"
            )
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
        rejected: list[Turn] | None = None
        reply: list[Turn] | None
        if "chosen" in column:
            messages, reply, rejected = self._pair(row, column, where)
        elif "messages" in column:
            turns = _turns(row.get(column["messages"]), "messages", where, "user")
            first = next((at for at, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
            messages, reply = turns[:first], turns[first:] or None
        else:
            messages = _turns(row.get(column["prompt"]), "prompt", where, "user")
            reply = None
            if "completion" in column:
                reply = _turns(row.get(column["completion"]), "completion", where, "assistant")
        if not messages or messages[-1]["role"] not in ("user", "tool"):
            raise ValueError(f"{where}: the prompt must end with a user turn, and this one has {roles_of(messages)}")
        for continuation in (reply, rejected):
            if continuation is not None and continuation[0]["role"] != "assistant":
                raise ValueError(
                    f"{where}: the completion must start with an assistant turn, and this one has "
                    f"{roles_of(continuation)}"
                )
        for turn in [*(reply or []), *(rejected or [])]:
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
            messages = [*system_turns(self.options), *messages]
        return Problem(id_, messages, reply, answer, {**extra, "question": messages[-1]["content"]}, rejected)

    def _pair(self, row: Mapping[str, Any], column: dict[str, str], where: str) -> tuple[list[Turn], ...]:
        """Prompt, better and worse continuation. Without a prompt it is the turns both conversations begin with."""
        both = [_turns(row.get(column[name]), name, where, "assistant") for name in ("chosen", "rejected")]
        prompt = _turns(row.get(column["prompt"]), "prompt", where, "user") if "prompt" in column else []
        if not prompt:
            first, second = both
            shared = next(
                (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
                min(len(first), len(second)),
            )
            last = max((i + 1 for i, turn in enumerate(first[:shared]) if turn["role"] in ("user", "tool")), default=0)
            prompt, both = first[:last], [turns[last:] for turns in both]
        else:
            both = [turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns for turns in both]
        chosen, rejected = both
        if chosen == rejected or not chosen or not rejected:
            raise ValueError(
                f"{where}: chosen and rejected are the same text, so the pair prefers nothing; remove the row"
            )
        return prompt, chosen, rejected


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
    keys = sorted(first, key=digest)[:count]
    held = set(keys)
    return [problem for problem in problems if _key(problem) not in held], [first[key] for key in keys]


def _key(problem: Problem) -> str:
    return json.dumps([[turn["role"], turn["content"]] for turn in problem.messages])
