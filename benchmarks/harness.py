"""Where the results of a benchmark are kept. How it measures: `kullback.run.measure`."""

from __future__ import annotations

import datetime
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kullback.run.measure import (
    BUSY,
    agree,
    forget_peak,
    machine,
    other_load,
    peak,
    peak_memory,
    resident,
    take_turns,
)

__all__ = [
    "BUSY",
    "RESULTS",
    "agree",
    "forget_peak",
    "in_pieces",
    "machine",
    "other_load",
    "peak",
    "peak_memory",
    "resident",
    "save",
    "take_turns",
]

RESULTS = Path(__file__).parent / "results"


def save(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """One JSON per benchmark; the newest run replaces the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    path.write_text(json.dumps({"name": name, "when": stamp, "machine": machine(), **result}, indent=1) + "\n")
    return path


def in_pieces(
    name: str, pieces: Mapping[str, Callable[[bool], list[dict[str, Any]]]], quick: bool, only: Sequence[str] = ()
) -> dict[str, Any]:
    """A benchmark's pieces by name, all or some; one that is not run keeps the rows and the time of its last run."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()).get("pieces", {}) if path.exists() and not quick else {}
    for piece in only or pieces:
        load = [other_load()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = pieces[piece](quick)
        load.append(other_load())
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
        found[piece] = {"when": stamp, "machine": machine(), "other_load": load, "rows": rows}
    return found
