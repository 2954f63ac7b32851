"""Eight samples of each prompt: tokens per second, ours against the transformers generation of TRL's trainers.

TRL is a GRPOTrainer whose own `_generate_single_turn` is called. Ours returns the behaviour policy's log-probabilities
with the text; TRL gets them from one more forward wherever its text may be older than the model it trains
(`steps_per_generation` not a divisor of `gradient_accumulation_steps`), so it takes part with and without it.

A round's time has a long tail of its own: one text that does not end keeps TRL's whole batch going to the limit. So the
ratio is given twice: of all tokens over all seconds, which is what a run pays, and the median over rounds.
"""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness
from kullback.lm.chat import end_ids, prompt_ids
from kullback.lm.generate import generate
from kullback.lm.models import load_model, load_tokenizer
from kullback.lm.tasks import load_task
from kullback.lm.tiny import build_model

SAMPLES = 8
TRL = ("TRL, text alone", "TRL, with log-probs")
TASK = {"name": "reasoning_gym/chain_sum", "min_terms": 2, "max_terms": 6, "max_digits": 1, "question": "{expression}"}
PIECES: dict[str, dict[str, Any]] = {
    "embedded teacher": {
        "model": lambda: load_model("embedded:teacher", role="teacher"),
        "prompts": 64,
        "limit": 64,
    },
    "long tail": {
        "model": lambda: build_model(hidden_size=128, layers=2, intermediate_size=384, max_length=512),
        "prompts": 32,
        "limit": 256,
    },
}
ROUNDS = 7
QUICK = {"prompts": 2, "limit": 8}
DEVIATIONS = 5  # standard errors between the mean lengths of two contestants' texts


def run(quick: bool = False, only: Sequence[str] = ()) -> dict[str, Any]:
    """All pieces, or some."""
    pieces = {name: partial(measure, setting) for name, setting in PIECES.items()}
    found = harness.in_pieces("rollouts", pieces, quick, only)
    return {"samples": SAMPLES, "repeats": 1 if quick else ROUNDS, "pieces": found}


def measure(setting: dict[str, Any], quick: bool) -> list[dict[str, Any]]:
    """Sums over rounds, end tokens included; every round draws anew."""
    count, limit = (QUICK if quick else setting)["prompts"], (QUICK if quick else setting)["limit"]
    tokenizer = load_tokenizer("embedded:teacher", role="teacher")
    problems = load_task(TASK, seed=0).train
    prompts = [prompt_ids(tokenizer, problems[i].messages) for i in range(count)]
    lengths: dict[str, list[list[int]]] = {}
    writers = _contestants(setting["model"]().eval(), tokenizer, prompts, limit)
    contestants = {who: _counted(write, lengths.setdefault(who, [])) for who, write in writers.items()}
    timed = harness.take_turns(contestants, 1 if quick else ROUNDS)
    check_lengths(lengths)
    rows = []
    for who, row in timed.items():
        counted = lengths[who][1:]  # the first call is the one whose memory is measured
        rows.append(
            {
                "limit": limit,
                "rows": count * SAMPLES,
                "who": who,
                **row,
                "tokens": [sum(call) for call in counted],
                "tokens_per_second": sum(map(sum, counted)) / sum(row["seconds"]),
                "mean_length": statistics.mean(n for call in counted for n in call),
                "longest": [max(call) for call in counted],
                "shares": shares(writers[who]) if who == "kullback" else None,
            }
        )
    for row in rows:
        row["over"] = {peer["who"]: speed_over(row, peer) for peer in rows if peer["who"] in TRL}
        over = ", ".join(f"{total:.2f} ({middle:.2f})" for total, middle in row["over"].values())
        print(f"{row['who']:30s} {row['tokens_per_second']:9.0f} tokens/s, over TRL's {over}", flush=True)
    return rows


def shares(write: Callable[[], Any]) -> dict[str, float]:
    """Of the time of one call, from a profile: what no faster loop around the model would save."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        write()
    spent = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    kinds = {"products": ("mm", "linear"), "attention": ("attention",)}
    return {
        kind: sum(t for key, t in spent.items() if any(part in key for part in parts)) / sum(spent.values())
        for kind, parts in kinds.items()
    }


def speed_over(row: dict[str, Any], peer: dict[str, Any]) -> tuple[float, float]:
    """Ratio of the tokens per second: of all rounds together, and the median over rounds."""
    ours, theirs = ([n / t for n, t in zip(one["tokens"], one["seconds"], strict=True)] for one in (row, peer))
    middle = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return row["tokens_per_second"] / peer["tokens_per_second"], middle


def _counted(write: Callable[[], list[list[int]]], lengths: list[list[int]]) -> Callable[[], None]:
    return lambda: lengths.append([len(text) for text in write()])


def check_lengths(lengths: dict[str, list[list[int]]]) -> None:
    """Contestants that write texts of different lengths are not compared."""
    flat = {who: [float(n) for call in calls for n in call] for who, calls in lengths.items()}
    first = next(iter(flat.values()))
    for who, theirs in flat.items():
        error = math.sqrt(statistics.pvariance(first) / len(first) + statistics.pvariance(theirs) / len(theirs))
        apart = abs(statistics.mean(first) - statistics.mean(theirs))
        if apart > DEVIATIONS * error:
            raise AssertionError(
                f"{who} writes texts of another length: by {apart:.2f} tokens, standard error {error:.2f}"
            )


def _contestants(
    model: Any, tokenizer: Any, prompts: list[list[int]], limit: int
) -> dict[str, Callable[[], list[list[int]]]]:
    trainer = _trainer(copy.deepcopy(model), tokenizer, len(prompts), limit)
    repeated = [prompt for prompt in prompts for _ in range(SAMPLES)]

    def ours(compiled: bool = False) -> list[list[int]]:
        uniforms, ends = torch.rand(len(repeated), limit, dtype=torch.float64), end_ids(tokenizer, model)
        return generate(model, prompts, uniforms, end_ids=ends, samples=SAMPLES, compile_decode=compiled).completions

    ours(compiled=True)  # so that neither time nor memory of a measured call is the compiler's

    def text() -> list[list[int]]:
        written: list[list[int]] = trainer._generate_single_turn(repeated, None, {}, SAMPLES)[0]
        return written

    def text_and_log_probs() -> list[list[int]]:
        from trl.trainer.utils import pad

        written = text()
        ids, mask = [], []
        for parts, side in ((repeated, "left"), (written, "right")):
            tensors = [torch.tensor(part) for part in parts]
            ids.append(pad(tensors, padding_value=tokenizer.pad_token_id, padding_side=side))
            mask.append(pad([torch.ones_like(x) for x in tensors], padding_value=0, padding_side=side))
        with torch.no_grad():
            trainer._get_per_token_logps_and_entropies(
                trainer.model,
                torch.cat(ids, 1),
                torch.cat(mask, 1),
                ids[1].shape[1],
                batch_size=trainer.args.per_device_train_batch_size,
            )
        return written

    return {
        "kullback": ours,
        "kullback, compiled decode": partial(ours, compiled=True),
        TRL[0]: text,
        TRL[1]: text_and_log_probs,
    }


def _trainer(model: Any, tokenizer: Any, prompts: int, limit: int) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=prompts * SAMPLES // 2,
            steps_per_generation=2,  # of one batch of rows, half train at once: then the log-probs are needed
            num_generations=SAMPLES,
            max_completion_length=limit,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to="none",
        )
        return GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": "1+1"}] * prompts),
            processing_class=tokenizer,
        )
