"""The benchmarks by name."""

from collections.abc import Callable
from typing import Any

from benchmarks import linear, overhead, skipping

BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {
    "linear": linear.run,
    "overhead": overhead.run,
    "skipping": skipping.run,
}
