"""What `linear` adds to its matrix products, for every named divergence: all else than the products, from a profile.

Total and products are taken from the same run, so a machine whose speed drifts does not blur it.
"""

from __future__ import annotations

import statistics
from typing import Any

from torch.profiler import ProfilerActivity, profile

import kullback as kb
from benchmarks import harness
from benchmarks.linear import OWN, generator, problem, with_gradient
from kullback.divergence import kernels

FULL = {"tokens": 1024, "width": 1024, "vocab": 32768, "repeats": 2}
QUICK = {"tokens": 64, "width": 32, "vocab": 256, "repeats": 1}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "mkldnn::_linear_pointwise")


def run(quick: bool = False) -> dict[str, Any]:
    size = QUICK if quick else FULL
    x = problem(size["tokens"], size["width"], size["vocab"])
    family = {str(member()): member() for member in kb.divergences().values()}
    loads = [harness.other_load()]
    rows: list[dict[str, Any]] = []
    for name, D in {**family, OWN: kb.FDivergence.from_generator(generator, name="own")}.items():

        def step(D: kb.FDivergence = D) -> Any:
            with kernels.kernels("always"):
                return with_gradient(lambda: D.linear(**x).mean(), x)

        step()
        ratios = []
        for _ in range(size["repeats"]):
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                step()
            spent = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
            products = sum(spent.get(key, 0.0) for key in PRODUCTS)
            ratios.append(sum(spent.values()) / products)
        rows.append({"divergence": name, "over_products": statistics.median(ratios), "all": ratios})
        print(f"{name:22s} total / products {rows[-1]['over_products']:.3f}", flush=True)
    loads.append(harness.other_load())
    return {**{k: size[k] for k in ("tokens", "width", "vocab")}, "other_load": loads, "rows": rows}
