"""What this machine has and what it lacks for kullback, with what to do about each thing that is missing."""

import dataclasses
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from kullback import __version__

NEEDED = ("torch", "transformers", "accelerate", "datasets", "peft", "safetensors", "reasoning-gym", "math-verify")
LEAST_SPACE = 2e9  # bytes; a checkpoint of the shipped models needs far less, one of a real model more


@dataclass(frozen=True)
class Finding:
    """One thing examined. "missing" stops work, "note" does not."""

    what: str
    state: Literal["ok", "note", "missing"]
    found: str
    fix: str = ""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def examine() -> list[Finding]:
    """Everything, in the order to mend it."""
    return [*_versions(), *_device(), *_extras(), *_output(Path("runs")), *_shipped_models()]


def _versions() -> Iterator[Finding]:
    enough = sys.version_info >= (3, 11)
    yield Finding(
        "python", "ok" if enough else "missing", platform.python_version(), "" if enough else "use Python 3.11 or newer"
    )
    yield Finding("kullback", "ok", __version__)
    for package in NEEDED:
        version = _version(package)
        fix = "" if version else f"pip install {package}"
        yield Finding(package, "ok" if version else "missing", version or "not installed", fix)


def _device() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        yield Finding("device", "ok", f"cuda: {names}")
    else:
        yield Finding("device", "note", "cpu", "the shipped models train here in minutes; larger ones want a GPU")
    cores, threads = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        torch.get_num_threads(),
    )
    many = threads > cores
    yield Finding(
        "threads",
        "note" if many else "ok",
        f"{threads} for {cores} cores",
        f"set OMP_NUM_THREADS={cores}" if many else "",
    )


def _extras() -> Iterator[Finding]:
    """Optional packages, by the extra of kullback's that brings them."""
    try:
        about = metadata.metadata("kullback")
    except metadata.PackageNotFoundError:
        yield Finding("extras", "note", "unknown: kullback runs from its source tree", "pip install -e .")
        return
    for extra in about.get_all("Provides-Extra") or []:
        mark = re.compile(rf"extra == ['\"]{re.escape(extra)}['\"]")
        requirements = [text for text in about.get_all("Requires-Dist") or [] if mark.search(text)]
        wanted = [match.group() for text in requirements if (match := re.match(r"[\w.-]+", text))]
        absent = [package for package in wanted if _version(package) is None]
        found = f"without {', '.join(absent)}" if absent else ", ".join(wanted)
        yield Finding(
            f"extra {extra}", "note" if absent else "ok", found, f'pip install "kullback[{extra}]"' if absent else ""
        )


def _output(folder: Path) -> Iterator[Finding]:
    place = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        yield Finding(
            "output", "missing", f"{folder}: cannot write there ({reason})", "write output=DIRECTORY in the recipe"
        )
        return
    free = shutil.disk_usage(place).free
    tight = free < LEAST_SPACE
    yield Finding(
        "output", "note" if tight else "ok", f"{folder}: {free / 1e9:.1f} GB free", "make room" if tight else ""
    )


def _shipped_models() -> Iterator[Finding]:
    """Load each and compare its logits with what kullback computes from hidden states and head."""
    from transformers.utils import logging

    from kullback.lm.models import SHIPPED, check_head, check_same_tokenizer, load_model, load_tokenizer

    logging.disable_progress_bar()
    tokenizers = []
    for which in SHIPPED:
        name = f"embedded:{which}"
        try:
            model = load_model(name, role=which)
            check_head(model, role=which)
            tokenizers.append(load_tokenizer(name, role=which))
        except (ValueError, OSError) as error:
            yield Finding(
                name, "missing", str(error).partition(";")[0], "install kullback again: its assets are incomplete"
            )
            continue
        yield Finding(name, "ok", f"{model.num_parameters():,} parameters")
    if len(tokenizers) == len(SHIPPED):
        check_same_tokenizer(*tokenizers, role="teacher")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
