"""The run directory: everything one training run leaves behind, and the only thing a report reads.

    RUN/recipe.yaml  objective.txt  environment.json  metrics.jsonl  samples.jsonl  evaluation.json  report.html
    RUN/model/  checkpoints/checkpoint-N/complete

A process may be killed at any byte. So whole files are written beside their place and renamed into it, a log line that
was cut short is dropped with a warning when read, and a checkpoint counts only once its marker file `complete` stands.

JSON is strict: NaN is written as null, infinities as the strings "inf" and "-inf". The readers turn them back into
floats wherever a number is expected, and nowhere else: a token may well read "inf".
"""

import json
import math
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path
from types import NoneType
from typing import Any

import torch
import yaml

COMPLETE = "complete"  # the marker file of a checkpoint that was written to its end
PACKAGES = ("kullback", "torch", "transformers", "accelerate", "datasets", "peft", "safetensors", "numpy")


class RunDirectoryError(ValueError):
    """The output directory cannot be used; the message names the field, the value and the fix in one sentence."""


class RunDirectory:
    """One run on disk. Opening it (`RunDirectory(path)`) touches nothing; `create` prepares it for writing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._tail_checked: set[Path] = set()

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], resume: bool = False, overwrite: bool = False, *, field: str = "output"
    ) -> "RunDirectory":
        """Make `path` ready for a run, or say why it cannot be.

        Args:
            resume: keep what is there and go on; nothing there is fine too (a job that is restarted until it is done).
            overwrite: remove the files of the run that is there. Files that are not a run's are never touched.
            field: what the caller calls this path; error messages use it.

        Raises:
            RunDirectoryError: a file stands in the way, the place is read-only, or a run is there already.
        """
        self = cls(path)
        blocking = next((p for p in (self.path, *self.path.parents) if p.exists()), None)
        if blocking is not None and not blocking.is_dir():
            raise RunDirectoryError(f"{field}={self.path}: {blocking} is a file; choose a directory, or move that file")
        if self.has_run and overwrite and not resume:
            self._remove()
        if self.has_run and not resume:
            state = "a finished run" if self.is_finished else "an unfinished run"
            go_on = "" if self.is_finished else "resume it, "
            raise RunDirectoryError(
                f"{field}={self.path}: {state} is already there; {go_on}choose another output "
                f"(for example {_free_name(self.path)}), or ask to overwrite it"
            )
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise RunDirectoryError(
                f"{field}={self.path}: cannot write there ({reason}); choose a writable directory"
            ) from error
        if not self.has_run:  # what a run left that died before its first step must not stand in front of this one
            self.metrics_file.unlink(missing_ok=True)
            self.samples_file.unlink(missing_ok=True)
        return self

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    # The files

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def objective_file(self) -> Path:
        return self.path / "objective.txt"

    @property
    def environment_file(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples_file(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def evaluation_file(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def has_run(self) -> bool:
        """Whether at least one step, a checkpoint, a model or an evaluation is there."""
        logged = self.metrics_file.is_file() and self.metrics_file.stat().st_size > 0
        return logged or self.model.is_dir() or self.evaluation_file.is_file() or any(self._checkpoints())

    @property
    def is_finished(self) -> bool:
        """Whether the trained student (configuration and weights) or its evaluation is there."""
        saved = (self.model / "config.json").is_file() or (self.model / "adapter_config.json").is_file()
        return self.evaluation_file.is_file() or (saved and any(self.model.glob("*.safetensors")))

    # Whole files

    def write_recipe(self, recipe: Mapping[str, Any]) -> None:
        """The resolved recipe, keys in the order given. Plain numbers, strings, lists and mappings only."""
        _write_atomically(self.recipe_file, yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True))

    def recipe(self) -> dict[str, Any] | None:
        if not self.recipe_file.is_file():
            return None
        try:
            return yaml.safe_load(self.recipe_file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            warnings.warn(f"{self.recipe_file} is not readable as YAML and is left out: {error}", stacklevel=2)
            return None

    def write_objective(self, text: str) -> None:
        _write_atomically(self.objective_file, text if text.endswith("\n") else text + "\n")

    def objective(self) -> str | None:
        """The objective in words, without the closing newline; None where it was never written."""
        if not self.objective_file.is_file():
            return None
        return self.objective_file.read_text(encoding="utf-8", errors="replace").rstrip("\n")

    def write_environment(self, extra: Mapping[str, Any] | None = None) -> None:
        """Versions, device, threads, start time (UTC) and command; `extra` is added and wins on equal keys."""
        write_json(self.environment_file, {**describe_environment(), **(extra or {})})

    def environment(self) -> dict[str, Any] | None:
        return read_json(self.environment_file)

    def write_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """{"student", "untrained", "teacher": METRICS}; METRICS: {name: {"value", "standard_error"}}."""
        write_json(self.evaluation_file, evaluation)

    def evaluation(self) -> dict[str, Any] | None:
        """What was written, each "value" a float again; a "standard_error" that is unknown stays None."""
        stored = read_json(self.evaluation_file)
        if not isinstance(stored, dict):
            return None
        for metrics in stored.values():
            for name, metric in metrics.items() if isinstance(metrics, dict) else ():
                if isinstance(metric, dict) and "value" in metric:
                    error = metric.get("standard_error")
                    metrics[name] = {
                        **metric,
                        "value": to_float(metric["value"]),
                        "standard_error": None if error is None else to_float(error),
                    }
        return stored

    # Logs

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """One optimiser step: "step", "time" (seconds since the start) and any number of named scalars."""
        self._append(self.metrics_file, [row])

    def metrics(self) -> list[dict[str, Any]]:
        """All logged steps in order. null reads as NaN and "inf" as infinity: a diverged run stays one."""
        return [{key: _number_or_same(value) for key, value in row.items()} for row in _read_lines(self.metrics_file)]

    def append_samples(self, samples: Iterable[Mapping[str, Any]]) -> None:
        self._append(self.samples_file, samples)

    def samples(self) -> list[dict[str, Any]]:
        """All kept samples in order; the numbers of their rewards and tokens are floats, their texts untouched."""
        return [_with_numbers(sample) for sample in _read_lines(self.samples_file)]

    def truncate_after(self, step: int) -> int:
        """Forget what came after `step`, so that a run resumed there logs each step once.

        Drops the rows of both logs with a later step and the checkpoints of later steps, whole or half-written.

        Returns: how many log rows were dropped.
        """
        dropped = 0
        for file in (self.metrics_file, self.samples_file):
            if not file.is_file():
                continue
            rows = list(_read_lines(file))
            kept = [row for row in rows if to_float(row.get("step", 0)) <= step]
            dropped += len(rows) - len(kept)
            _write_atomically(file, "".join(map(_to_line, kept)))
        for later, path in self._checkpoints():
            if later > step:
                shutil.rmtree(path)
        return dropped

    # Checkpoints

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of `step` (optimiser steps done) belongs; it may not exist."""
        return self.checkpoints / f"checkpoint-{step}"

    def mark_complete(self, checkpoint: str | os.PathLike[str]) -> None:
        """Say that all files of `checkpoint` are written. To be called last, after they are on disk."""
        _write_atomically(Path(checkpoint) / COMPLETE, "")

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint; newer ones without the marker `complete` are skipped with a warning."""
        for _, path in sorted(self._checkpoints(), reverse=True):
            if (path / COMPLETE).is_file():
                return path
            warnings.warn(f"{path} was not written to its end (no {COMPLETE!r} in it) and is skipped", stacklevel=2)
        return None

    @staticmethod
    def checkpoint_step(checkpoint: str | os.PathLike[str]) -> int:
        """The N of checkpoint-N."""
        return int(Path(checkpoint).name.removeprefix("checkpoint-"))

    def _checkpoints(self) -> Iterator[tuple[int, Path]]:
        for path in self.checkpoints.glob("checkpoint-*"):
            number = path.name.removeprefix("checkpoint-")
            if path.is_dir() and number.isdecimal():
                yield int(number), path

    def _append(self, file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        lines = "".join(map(_to_line, rows))
        if not lines:
            return
        if file not in self._tail_checked:  # a killed writer may have left half a line: do not write onto its end
            _cut_half_line(file)
            self._tail_checked.add(file)
        with file.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as stream:
            stream.write(lines)

    def _remove(self) -> None:
        for directory in (self.model, self.checkpoints):
            if directory.is_dir():
                shutil.rmtree(directory)
        for file in (
            self.recipe_file,
            self.objective_file,
            self.environment_file,
            self.metrics_file,
            self.samples_file,
            self.evaluation_file,
            self.report_file,
        ):
            file.unlink(missing_ok=True)


def write_comparison(
    path: str | os.PathLike[str], *, recipe: str, vary: Mapping[str, list[Any]], runs: list[Mapping[str, Any]]
) -> Path:
    """COMPARE/comparison.json. Each run: {"directory": name below `path`, "label": str, "varied": {field: value}}."""
    file = Path(path) / "comparison.json"
    write_json(file, {"recipe": recipe, "vary": vary, "runs": runs})
    return file


def describe_environment() -> dict[str, Any]:
    """What this process runs on: facts only, no names of people or machines."""
    cuda = torch.cuda.is_available()
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv else [],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "devices": torch.cuda.device_count() if cuda else 0,
        "cuda": torch.version.cuda,
        "versions": {name: _version(name) for name in PACKAGES},
    }


def to_float(value: Any) -> float:
    """A stored number as a float: null and what is no number are NaN, "inf" and "-inf" the infinities."""
    try:
        return math.nan if value is None else float(value)
    except (TypeError, ValueError):
        return math.nan


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Strict JSON, whole or not at all: written beside `path`, then renamed."""
    _write_atomically(Path(path), json.dumps(strict(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of `path`; None where it is absent, or (with a warning) not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        warnings.warn(f"{path} is not readable as JSON and is left out: {error}", stacklevel=2)
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _free_name(path: Path) -> Path:
    return next(p for n in range(2, 10_000) if not (p := path.with_name(f"{path.name}-{n}")).exists())


def _plain(value: Any) -> Any:
    """Mappings, sequences, tensors, arrays and paths as what JSON and YAML know; anything else as its text."""
    kind = type(value)
    if kind in (str, int, float, bool, NoneType):
        return value
    if kind in (list, tuple, set, frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # tensors and arrays, with or without dimensions
        return _plain(value.tolist())
    if isinstance(value, list | tuple):  # subclasses, which YAML refuses
        return _plain(list(value))
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    return str(value.value if isinstance(value, Enum) else value)


def strict(value: Any) -> Any:
    """`value` as plain data that strict JSON can hold: tensors as lists, NaN as None, infinities as their names."""
    kind = type(value)
    if kind is float:
        return value if math.isfinite(value) else None if math.isnan(value) else "inf" if value > 0 else "-inf"
    if kind in (str, int, bool, NoneType):
        return value
    if kind in (list, tuple):
        return [strict(item) for item in value]
    if kind is dict:
        return {str(key): strict(item) for key, item in value.items()}
    return strict(_plain(value))


def _to_line(row: Mapping[str, Any]) -> str:
    return json.dumps(strict(row), ensure_ascii=False, allow_nan=False, separators=(", ", ": ")) + "\n"


def _write_atomically(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # backslashreplace: a lone surrogate in a model's text becomes its JSON escape instead of an exception
        with beside.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _cut_half_line(file: Path) -> None:
    if not file.is_file() or not (content := file.read_bytes()) or content.endswith(b"\n"):
        return
    end = content.rfind(b"\n") + 1
    warnings.warn(f"{file}: the last line was cut short ({len(content) - end} bytes) and is dropped", stacklevel=4)
    with file.open("r+b") as stream:
        stream.truncate(end)


def _read_lines(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    lines = file.read_bytes().split(b"\n")  # never splitlines: U+2028 is text here
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TypeError("not an object")
        except (ValueError, TypeError):
            what = "the last line was cut short" if number == len(lines) else f"line {number} is not a JSON object"
            warnings.warn(f"{file}: {what} and is dropped", stacklevel=3)
            continue
        yield row


def _number_or_same(value: Any) -> Any:
    return to_float(value) if value is None or value in ("inf", "-inf") else value


def _with_numbers(sample: dict[str, Any]) -> dict[str, Any]:
    if isinstance(sample.get("rewards"), dict):
        sample["rewards"] = {name: to_float(value) for name, value in sample["rewards"].items()}
    for token in sample.get("tokens") or ():
        for name in ("divergence", "entropy", "weight"):
            if name in token:
                token[name] = to_float(token[name])
        for name in ("teacher_top", "student_top"):
            if token.get(name):
                token[name] = [[text, to_float(probability)] for text, probability in token[name]]
    return sample
