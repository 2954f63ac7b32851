"""The benchmarks by name."""

from collections.abc import Callable
from typing import Any

from benchmarks import linear, overhead, rollouts, skipping, statistics, steps

BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {
    "linear": linear.run,
    "overhead": overhead.run,
    "rollouts": rollouts.run,
    "skipping": skipping.run,
    "statistics": statistics.run,
    "steps": steps.run,
}

PIECES: dict[str, tuple[str, ...]] = {  # of `--only`
    "linear": tuple(linear.PIECES),
    "rollouts": tuple(rollouts.PIECES),
    "steps": tuple(steps.PIECES),
}
