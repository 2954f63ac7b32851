"""Where the results of a benchmark are kept. How it measures: `kullback.run.measure`."""

from __future__ import annotations

import datetime
import json
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
