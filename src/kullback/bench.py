"""`kullback doctor --bench`: what kullback does in a second on this machine, checked and timed in under a minute."""

from __future__ import annotations

import math
import os
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kullback.divergence import FDivergence, divergence, kernels
from kullback.run import measure
from kullback.run.progress import ProgressBar

Formula = Callable[[Tensor, Tensor], Tensor]  # (log target, log model) -> nats per token

APART = 2e-4  # of the naive values, in float32; a wrong formula is off by much more
COMPILING = 12.0  # seconds spent on compiling divergences after which no other is begun
UNCOMPILED = ", uncompiled"


@dataclass(frozen=True)
class Sizes:
    """What is measured. The defaults take about forty seconds on two cores of 2024; a GPU gets more tokens."""

    width: int = 1024
    vocab: int = 32768
    tokens: int | None = None  # None: the power of two, up to 4096, whose products take `seconds`
    seconds: float = 0.5
    rounds: int = 2
    prompts: int = 64
    completion: int = 32
    steps: int = 4


@dataclass(frozen=True)
class Row:
    """One measurement. Ratio: of its time to the four products without which there is no exact loss."""

    what: str
    seconds: float
    ratio: float | None = None
    tokens_per_second: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Bench:
    """Everything measured, how far the values of each loss are from the naive ones, and what to mend."""

    tokens: int
    width: int
    vocab: int
    rows: list[Row]
    apart: dict[str, float]
    advice: list[str]
    machine: dict[str, Any]

    @property
    def agrees(self) -> bool:
        return all(difference <= APART for difference in self.apart.values())  # NaN does not

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "agrees": self.agrees}


def softened(u: Tensor) -> Tensor:
    """An f in a user's words: f-distill's softened reverse KL (Wen et al., arXiv 2307.15190)."""
    return (u + 1) * torch.log((u + 1) / (2 * u))


def _reverse_kl(t: Tensor, m: Tensor) -> Tensor:
    return (m.exp() * (m - t)).sum(-1)


def _jsd(t: Tensor, m: Tensor) -> Tensor:
    middle = torch.logaddexp(t, m) - math.log(2)
    return 0.5 * (t.exp() * (t - middle) + m.exp() * (m - middle)).sum(-1)


def _softened(t: Tensor, m: Tensor) -> Tensor:
    return (m.exp() * softened((t - m).exp())).sum(-1)


def losses() -> dict[str, tuple[FDivergence, Formula]]:
    """By name: kullback's, and what one would write of both log-probabilities."""
    return {
        "reverse_kl": (divergence("reverse_kl"), _reverse_kl),
        "jsd": (divergence("jsd(0.5)"), _jsd),
        "own f": (FDivergence.from_generator(softened, name="softened"), _softened),
    }


def bench(sizes: Sizes | None = None) -> Bench:
    """Measure, on the GPU if there is one."""
    sizes = sizes or Sizes()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    load = measure.other_load(1.0)
    with ProgressBar(5, "bench") as progress, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        tokens = sizes.tokens or _tokens_for(sizes, device)
        x = problem(tokens, sizes.width, sizes.vocab, device)
        progress.advance(part="losses")
        rows, apart = _losses(x, sizes.rounds)
        progress.advance(part="statistics")
        rows.append(_statistics(x, sizes.rounds))
        del x
        progress.advance(part="rollouts")
        rows.append(_rollouts(sizes, device))
        progress.advance(part="distillation")
        rows.append(_distillation(sizes))
        progress.advance()
    advice = [*_advice(rows, apart, load), *_compiler(warned)]
    return Bench(tokens, sizes.width, sizes.vocab, rows, apart, advice, measure.machine())


def problem(tokens: int, width: int, vocab: int, device: torch.device) -> dict[str, Tensor]:
    """Hidden states [tokens, width] and heads [vocab, width] of both sides; logits of standard deviation 2."""
    rng = torch.Generator().manual_seed(0)
    rows = {"target_hidden": tokens, "target_head": vocab, "model_hidden": tokens, "model_head": vocab}
    x = {name: torch.randn(count, width, generator=rng) for name, count in rows.items()}
    for side in ("target", "model"):
        x[f"{side}_head"] *= 2 / math.sqrt(width)
    x = {name: value.to(device) for name, value in x.items()}
    for name in ("model_hidden", "model_head"):
        x[name].requires_grad_()
    return x


def products(x: dict[str, Tensor]) -> Callable[[], None]:
    """The four products of any exact loss, into memory that is there: logits of both, gradients of states and head."""
    th, tw, states, head = (x[n].detach() for n in ("target_hidden", "target_head", "model_hidden", "model_head"))
    logits = states.new_empty(len(states), len(head))
    grad_states, grad_head = torch.empty_like(states), torch.empty_like(head)

    def run() -> None:
        torch.mm(th, tw.t(), out=logits)
        torch.mm(states, head.t(), out=logits)
        torch.mm(logits, head, out=grad_states)
        torch.mm(logits.t(), states, out=grad_head)

    return run


def _tokens_for(sizes: Sizes, device: torch.device) -> int:
    least = 64
    run = products(problem(least, sizes.width, sizes.vocab, device))
    run()
    start = measure.now()
    run()
    fit = least * sizes.seconds / (measure.now() - start)
    return 2 ** max(4, min(12, math.floor(math.log2(fit))))


def _losses(x: dict[str, Tensor], rounds: int) -> tuple[list[Row], dict[str, float]]:
    """Each with its gradients; the run that measures the memory also gives the numbers that must agree."""
    seen: dict[str, tuple[float, ...]] = {}

    def contestant(name: str, loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            value = loss()
            gradients = torch.autograd.grad(value, (x["model_hidden"], x["model_head"]))
            if name not in seen:
                seen[name] = (value.item(), *(number for g in gradients for number in _fingerprint(g)))

        return run

    timed: dict[str, Callable[[], Any]] = {"four matrix products (L)": products(x)}
    pairs, compiling = [], 0.0
    for name, (D, formula) in losses().items():
        compiled = compiling < COMPILING
        ours, naive = partial(_ours, D, x, "always" if compiled else "never"), partial(_naive, formula, x)
        start = measure.now()
        ours().backward()  # compiles, outside the measurement of memory and time
        compiling += measure.now() - start
        x["model_hidden"].grad = x["model_head"].grad = None
        pairs.append((f"{name}, naive", f"{name}, kullback{'' if compiled else UNCOMPILED}"))
        for who, loss in zip(pairs[-1], (naive, ours), strict=True):
            timed[who] = contestant(who, loss)
    result = measure.take_turns(timed, rounds)
    count = len(x["model_hidden"])
    rows = [
        Row(who, row["median"], row["over_limit"], count / row["median"], row["peak_bytes"])
        for who, row in result.items()
    ]
    return rows, {fused: _difference(seen[plain], seen[fused]) for plain, fused in pairs}


def _ours(D: FDivergence, x: dict[str, Tensor], mode: kernels.Mode) -> Tensor:
    with kernels.kernels(mode):
        return D.linear(x["target_hidden"], x["target_head"], x["model_hidden"], x["model_head"]).mean()


def _naive(formula: Formula, x: dict[str, Tensor]) -> Tensor:
    t = torch.log_softmax(x["target_hidden"] @ x["target_head"].t(), -1)
    m = torch.log_softmax(x["model_hidden"] @ x["model_head"].t(), -1)
    return formula(t, m).mean()


def _fingerprint(gradient: Tensor) -> tuple[float, float]:
    """Its norm, and 1 plus the cosine to a fixed direction."""
    flat = gradient.flatten()
    along = torch.arange(flat.numel(), dtype=flat.dtype, device=flat.device).sin_()
    norm = flat.norm()
    return norm.item(), 1 + (flat @ along / (norm * along.norm())).item()


def _difference(reference: tuple[float, ...], values: tuple[float, ...]) -> float:
    return max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(values, reference, strict=True))


def _seconds(run: Callable[[], Any], rounds: int) -> tuple[float, int | None]:
    """Median over the rounds, after one that measures the memory."""
    result = measure.take_turns({"it": run}, rounds)["it"]
    return result["median"], result["peak_bytes"]


def _statistics(x: dict[str, Tensor], rounds: int) -> Row:
    """Entropies, agreement and four divergences of every token."""
    from kullback.lm.models import Head
    from kullback.lm.predictions import HiddenPredictions
    from kullback.lm.statistics import token_statistics

    count = len(x["model_hidden"])
    scored = torch.ones(1, count, dtype=torch.bool, device=x["model_hidden"].device)
    tokens = torch.arange(count, device=scored.device) % len(x["model_head"])
    model, target = (
        HiddenPredictions(scored, tokens, x[f"{side}_hidden"].detach(), Head(x[f"{side}_head"].detach(), None))
        for side in ("model", "target")
    )
    seconds, peak = _seconds(lambda: token_statistics(model, target), rounds)
    return Row("statistics of each token", seconds, None, count / seconds, peak)


def _rollouts(sizes: Sizes, device: torch.device) -> Row:
    """The embedded student answers problems of its task; no row stops before the limit, so the work is known."""
    from kullback.lm.chat import prompt_ids
    from kullback.lm.generate import generate
    from kullback.lm.models import load_model, load_tokenizer
    from kullback.lm.tasks import load_task

    name = "embedded:student"
    model = load_model(name, role="student", device=str(device))
    tokenizer = load_tokenizer(name, role="student")
    problems = load_task("embedded:arithmetic", seed=0).train
    prompts = [prompt_ids(tokenizer, problems[i].messages) for i in range(sizes.prompts)]
    uniforms = torch.rand(sizes.prompts, sizes.completion, generator=torch.Generator().manual_seed(0))
    seconds, peak = _seconds(lambda: generate(model, prompts, uniforms, end_ids=[]), sizes.rounds)
    written = sizes.prompts * sizes.completion
    return Row("rollouts, embedded student", seconds, None, written / seconds, peak)


def _distillation(sizes: Sizes) -> Row:
    """Whole steps on the embedded pair: rollouts, both models' predictions, loss, gradient and update."""
    from rich.console import Console

    from kullback.lm.api import train

    before = os.environ.get("KULLBACK_PROGRESS")
    os.environ["KULLBACK_PROGRESS"] = "0"  # one bar at a time
    try:
        with tempfile.TemporaryDirectory() as folder:
            metrics = train(
                "on_policy_distillation",
                student="embedded:student",
                teacher="embedded:teacher",
                data="embedded:arithmetic",
                output=Path(folder) / "run",
                max_completion=sizes.completion,
                steps=sizes.steps + 1,
                prompts_per_step=sizes.prompts,
                evaluate={"problems": 0},
                console=Console(quiet=True),
            ).metrics
    finally:
        if before is None:
            del os.environ["KULLBACK_PROGRESS"]
        else:
            os.environ["KULLBACK_PROGRESS"] = before
    # the first step warms up
    steps = [(b["time"] - a["time"], b["tokens"]) for a, b in pairwise(metrics)]
    seconds = statistics.median(time for time, _ in steps)
    return Row("distillation step, embedded pair", seconds, None, statistics.median(n / time for time, n in steps))


def _advice(rows: list[Row], apart: Mapping[str, float], load: float | None) -> Iterator[str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, cuda = torch.get_num_threads(), torch.cuda.is_available()
    for name, difference in apart.items():
        if not difference <= APART:
            yield f"{name} is {difference:.1e} from the naive loss: please report this with the versions above"
    if load is not None and load > measure.BUSY:
        yield f"other processes keep {load:g} cores busy: run this again when the machine is idle"
    if threads > cores:
        yield f"{threads} threads share {cores} cores: set OMP_NUM_THREADS={cores}"
    elif threads < cores and not cuda:
        yield f"{threads} of {cores} cores are used: set OMP_NUM_THREADS={cores}"
    capability = torch.backends.cpu.get_cpu_capability()
    if not cuda and capability in ("DEFAULT", "AVX2"):
        yield f"torch finds no AVX512 here ({capability}): expect about half the speed of a processor that has it"
    if any(name.endswith(UNCOMPILED) for name in apart):
        yield "to stay within a minute not every loss was compiled: run this again, what was compiled is kept on disk"
    at = {row.what: row for row in rows}
    for name in apart:
        ours, naive = at[name], at[f"{name.partition(',')[0]}, naive"]
        if ours.seconds > 1.15 * naive.seconds and not name.endswith(UNCOMPILED):
            yield f"{name} took {ours.seconds / naive.seconds:.2f} times the naive loss: fewer threads may be faster"


def _compiler(warned: list[warnings.WarningMessage]) -> Iterator[str]:
    """Whether the divergences ran compiled."""
    if any("no compiled kernel" in str(item.message) for item in warned):
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        yield (
            f"the divergences ran uncompiled although there is {compiler}: see KULLBACK_KERNELS=always for the reason"
            if compiler
            else "the divergences ran uncompiled, for want of a C++ compiler: install g++"
        )
