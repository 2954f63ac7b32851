"""What a piece of work costs here: contestants that take turns in one process, their memory, and the machine."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "trl", "liger-kernel", "transformers")
BUSY = 0.5  # load of other processes, in cores, above which a timing is marked


def take_turns(contestants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, Any]]:
    """Run each once for its memory, then `repeats` rounds in which every one runs once, the first one rotating.

    Returns, per contestant: seconds of each round, their median, the median over rounds of the ratio to the first
    contestant, and the memory in bytes that one run added at its
    peak, gradients included (None where the system does not tell).
    """
    out: dict[str, dict[str, Any]] = {}
    for name, run in contestants.items():
        out[name] = {"seconds": [], "peak_bytes": peak_memory(run)}
    names = list(contestants)
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            gc.collect()
            start = now()
            contestants[name]()
            out[name]["seconds"].append(now() - start)
    for row in out.values():
        row["median"] = statistics.median(row["seconds"])
        # within a round the machine is more alike than over the whole run
        pairs = zip(row["seconds"], out[names[0]]["seconds"], strict=True)
        row["over_limit"] = statistics.median(a / b for a, b in pairs)
    return out


def now() -> float:
    """Seconds of a clock, once the GPU, if there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(run: Callable[[], Any]) -> int | None:
    """The growth of the resident set at its highest during run(); exact to pages, and whatever allocates is counted."""
    gc.collect()
    known = forget_peak()
    before = resident() if known else 0
    run()
    return (peak() or 0) - before if known else None


def forget_peak() -> bool:
    """Start the high-water mark of memory anew; False where the system cannot."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident() -> int:
    """Bytes of this process in memory now; on a GPU, of its tensors there."""
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    return 1024 * _kilobytes(Path("/proc/self/status"), "VmRSS")


def peak() -> int | None:
    """The most since `forget_peak`."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    return 1024 * _kilobytes(status, "VmHWM") if status.exists() else None


def _kilobytes(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field + ":"))


def other_load(seconds: float = 2.0) -> float | None:
    """How many cores everything but this process keeps busy, measured while this process sleeps."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None

    def busy() -> float:
        user, nice, system, *_ = (int(x) for x in stat.read_text().splitlines()[0].split()[1:])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK")

    before = busy()
    time.sleep(seconds)
    return round((busy() - before) / seconds, 2)


def machine() -> dict[str, Any]:
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu)
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": versions,
    }


def agree(values: Mapping[str, tuple[float, ...]], tolerance: float) -> dict[str, float]:
    """Relative difference of each contestant from the first; too much of it is an error, not a measurement."""
    names = list(values)
    reference = values[names[0]]
    apart = {
        name: max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(values[name], reference, strict=True))
        for name in names
    }
    wrong = {name: d for name, d in apart.items() if not d <= tolerance}
    if wrong:
        raise AssertionError(f"contestants do not compute what {names[0]} computes: {wrong}")
    return apart
