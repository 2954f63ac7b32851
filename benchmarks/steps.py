"""A whole optimiser step of distillation, GRPO and DPO against TRL's trainers: time per token and peak memory.

Each turn is a process of its own, so that its peak memory is its own. Same weights, ids, batch, generated lengths,
dtype and optimiser on both sides; the losses of the fixed-text steps must agree before anything is reported. TRL's
trainer has no off-policy mode: there its generation is replaced by a look-up of the fixed completions. GRPO writes
eight samples of each prompt, all of the full length, and grades them by a function both call. DPO sees new pairs at
every step, so that neither side reads the reference from memory.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import torch
import transformers
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

import kullback as kb
from benchmarks import harness
from kullback.lm.chat import prompt_ids, reply_ids
from kullback.lm.models import load_model, load_tokenizer

WHO = ("TRL", "kullback")
LEARNING_RATE = 1e-4
OPTIMIZER = "adamw_torch_fused"
BETA = {"reverse_kl": 1.0, "jsd(0.5)": 0.5, "forward_kl": 0.0}  # in TRL

# layers and width of student and teacher; prompts and completions in tokens, both ends included
SMALL = {"student": (4, 256), "teacher": (8, 512), "vocab": 32768, "rows": 8, "prompt": (64, 128)}
WIDE = {"student": (4, 512), "teacher": (8, 1024), "vocab": 32768, "rows": 8, "prompt": (64, 128)}
EMBEDDED = {"student": "embedded:student", "teacher": "embedded:teacher", "vocab": 101, "rows": 16, "prompt": (6, 20)}
OFF, ON = {"own_text": False, "completion": (64, 128)}, {"own_text": True, "completion": (64, 64)}
CASES: dict[str, dict[str, Any]] = {
    "off-policy, reverse KL": SMALL | OFF | {"divergence": "reverse_kl", "steps": 4},
    "off-policy, JSD": SMALL | OFF | {"divergence": "jsd(0.5)", "steps": 4},
    "on-policy, reverse KL": SMALL | ON | {"divergence": "reverse_kl", "steps": 3},
    "off-policy, reverse KL, wider": WIDE | OFF | {"divergence": "reverse_kl", "steps": 3},
    "off-policy, embedded pair": EMBEDDED | OFF | {"completion": (16, 48), "divergence": "reverse_kl", "steps": 40},
    "on-policy, embedded pair": EMBEDDED | ON | {"completion": (48, 48), "divergence": "reverse_kl", "steps": 10},
}
GROUP = {"trains": "grpo", "own_text": True, "completion": (64, 64), "samples": 8}
PAIRS = {"trains": "dpo", "own_text": False, "completion": (64, 128), "samples": 2}
CASES |= {
    "GRPO": SMALL | GROUP | {"steps": 2},
    "GRPO, embedded student": EMBEDDED | GROUP | {"completion": (48, 48), "steps": 6},
    "DPO": SMALL | PAIRS | {"steps": 3},
    "DPO, embedded student": EMBEDDED | PAIRS | {"completion": (16, 48), "steps": 20},
}
WARM_UP = 2  # steps that are run and not counted
TURNS = 2
TOLERANCE = 1e-4  # of the losses of every step, relative


def words(vocab: int) -> PreTrainedTokenizerBase:
    """One word for each id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<unknown>", "<end>", *(f"w{i}" for i in range(3, vocab))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": names[0], "unk_token": names[1], "eos_token": names[2]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def random_model(layers: int, width: int, vocab: int) -> Any:
    torch.manual_seed(layers * width)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(width // 128, 1),
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config).float()


def setting(case: dict[str, Any]) -> tuple[Any, Any, Any, list[dict[str, Any]]]:
    """Student, teacher, tokenizer, and rows {"prompt": turns, "completion": text}."""
    draw = torch.Generator().manual_seed(0)

    def length(ends: tuple[int, int]) -> int:
        return int(torch.randint(ends[0], ends[1] + 1, (), generator=draw))

    if isinstance(case["student"], str):
        tokenizer = load_tokenizer(case["student"], role="student")
        student, teacher = (load_model(case[role], role=role) for role in ("student", "teacher"))
        joint, first = "", 6
    else:
        tokenizer = words(case["vocab"])
        student, teacher = (random_model(*case[role], case["vocab"]) for role in ("student", "teacher"))
        joint, first = " ", 3

    def text(ends: tuple[int, int]) -> str:
        ids = torch.randint(first, case["vocab"], (length(ends),), generator=draw)
        return joint.join(tokenizer.convert_ids_to_tokens(ids.tolist()))

    steps = WARM_UP + case["steps"] if case.get("trains") == "dpo" else 1
    rows = [
        {"prompt": [{"role": "user", "content": text(case["prompt"])}], "completion": text(case["completion"])}
        for _ in range(case["rows"] * steps)
    ]
    if case.get("trains") == "dpo":
        rows = [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": text(case["completion"])} for row in rows
        ]
    if case["own_text"]:  # an end that no model can write: every completion has the full length
        tokenizer.add_special_tokens({"eos_token": "<|never|>"})
        for model in (student, teacher):
            model.generation_config.eos_token_id = None
    return student, teacher.eval().requires_grad_(False), tokenizer, rows


def with_kullback(case: dict[str, Any], folder: str) -> list[float]:
    from rich.console import Console

    student, teacher, tokenizer, rows = setting(case)
    run = kb.train(
        "on_policy_distillation",
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        data=rows,
        output=folder,
        divergence=case["divergence"],
        student_fraction=float(case["own_text"]),
        max_completion=case["completion"][1] + 1,
        steps=WARM_UP + case["steps"],
        prompts_per_step=case["rows"],
        learning_rate=LEARNING_RATE,
        optimizer=OPTIMIZER,
        evaluate={"problems": 0},
        console=Console(quiet=True),
        overwrite=True,
    )
    return [row["loss"] for row in run.metrics]


def with_trl(case: dict[str, Any], folder: str) -> list[float]:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    student, teacher, tokenizer, rows = setting(case)
    conversational = tokenizer.chat_template is not None
    fixed = {
        tuple(prompt_ids(tokenizer, row["prompt"])): reply_ids(
            tokenizer, row["prompt"], [{"role": "assistant", "content": row["completion"]}]
        )[0]
        for row in rows
    }
    losses: list[torch.Tensor] = []

    class Distillation(DistillationTrainer):
        def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
            if case["own_text"]:
                return super()._generate_single_turn(prompt_ids, *args, **kwargs)
            return [fixed[tuple(ids)] for ids in prompt_ids]

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    args = DistillationConfig(
        output_dir=folder,
        max_steps=WARM_UP + case["steps"],
        per_device_train_batch_size=case["rows"],
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim=OPTIMIZER,
        beta=BETA[case["divergence"]],
        max_completion_length=case["completion"][1] + 1,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    prompts = [row["prompt"] if conversational else row["prompt"][0]["content"] for row in rows]
    trainer = Distillation(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )
    trainer.train()
    return [float(loss) for loss in losses]


def grade(text: str) -> float:
    """Half of all texts are right, whoever writes them."""
    return float(zlib.crc32(text.encode()) % 2)


def train_ours(method: str, case: dict[str, Any], folder: str, data: Any, **options: Any) -> list[float]:
    from rich.console import Console

    student, _, tokenizer, _ = setting(case)
    run = kb.train(
        method,
        student=student,
        tokenizer=tokenizer,
        data=data,
        output=folder,
        max_completion=case["completion"][1] + 1,
        steps=WARM_UP + case["steps"],
        prompts_per_step=case["rows"],
        learning_rate=LEARNING_RATE,
        optimizer=OPTIMIZER,
        evaluate={"problems": 0},
        console=Console(quiet=True),
        overwrite=True,
        **options,
    )
    return [row["loss"] for row in run.metrics]


def their_options(case: dict[str, Any], folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": WARM_UP + case["steps"],
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": OPTIMIZER,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def losses_of(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def grpo_with_kullback(case: dict[str, Any], folder: str) -> list[float]:
    _, _, _, rows = setting(case)
    data = {
        "data": [{"prompt": row["prompt"], "answer": "graded by the function"} for row in rows],
        "verifier": lambda problem, text: grade(text),
        "held_out": 0,
    }
    return train_ours("grpo", case, folder, data, samples=case["samples"], clip=(0.2, 0.2))


def grpo_with_trl(case: dict[str, Any], folder: str) -> list[float]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    student, _, tokenizer, rows = setting(case)
    conversational = tokenizer.chat_template is not None
    prompts = [row["prompt"] if conversational else row["prompt"][0]["content"] for row in rows]

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [grade(text if isinstance(text, str) else text[0]["content"]) for text in completions]

    arguments = GRPOConfig(
        **their_options(case, folder),
        per_device_train_batch_size=case["rows"] * case["samples"],
        num_generations=case["samples"],
        max_completion_length=case["completion"][1] + 1,
        beta=0.0,
    )
    trainer = GRPOTrainer(
        model=student,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )
    trainer.train()
    return losses_of(trainer)


def dpo_with_kullback(case: dict[str, Any], folder: str) -> list[float]:
    _, _, _, rows = setting(case)
    return train_ours("dpo", case, folder, {"data": rows, "held_out": 0})


def dpo_with_trl(case: dict[str, Any], folder: str) -> list[float]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    student, _, tokenizer, rows = setting(case)
    if tokenizer.chat_template is not None:
        rows = [row | {side: [{"role": "assistant", "content": row[side]}] for side in SIDES} for row in rows]
    else:
        rows = [row | {"prompt": row["prompt"][0]["content"] + " "} for row in rows]
    arguments = DPOConfig(**their_options(case, folder), per_device_train_batch_size=case["rows"])
    trainer = DPOTrainer(
        model=student,
        ref_model=copy.deepcopy(student),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    return losses_of(trainer)


SIDES = ("chosen", "rejected")
RUN: dict[str, Callable[[dict[str, Any], str], list[float]]] = {"kullback": with_kullback, "TRL": with_trl}
TRAINS: dict[str, dict[str, Callable[[dict[str, Any], str], list[float]]]] = {
    "distillation": RUN,
    "grpo": {"kullback": grpo_with_kullback, "TRL": grpo_with_trl},
    "dpo": {"kullback": dpo_with_kullback, "TRL": dpo_with_trl},
}


class Clock(transformers.TrainerCallback):
    """When each step ended, and the high-water mark of memory since the warm-up."""

    ends: ClassVar[list[float]] = []
    peaks: ClassVar[list[int | None]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if len(self.ends) == WARM_UP - 1:
            harness.forget_peak()
        self.ends.append(time.perf_counter())
        self.peaks.append(harness.peak())


def turn(who: str, case: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: seconds of each counted step, losses, and the peak beyond what the imports took."""
    import datasets  # noqa: F401
    import trl  # noqa: F401
    from trl import DistillationTrainer  # noqa: F401

    import kullback.lm.run
    import kullback.report  # noqa: F401

    transformers.trainer.DEFAULT_CALLBACKS.append(Clock)
    before = harness.resident()
    with tempfile.TemporaryDirectory() as folder:
        losses = TRAINS[case.get("trains", "distillation")][who](case, folder)
    ends = Clock.ends[WARM_UP - 1 :]
    peak = Clock.peaks[-1]
    return {
        "seconds": [b - a for a, b in pairwise(ends)],
        "losses": losses,
        "peak_bytes": None if peak is None else peak - before,
    }


def in_a_process(who: str, name: str, case: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.steps", who, json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1"})
    if done.returncode:
        raise RuntimeError(f"{who}, {name}:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def tokens_per_step(case: dict[str, Any]) -> int:
    _, _, tokenizer, rows = setting(case | {"student": case["student"]})
    if case["own_text"]:
        return case["rows"] * case.get("samples", 1) * (case["completion"][1] + 1)
    if case.get("trains") == "dpo":  # of an average step: which pairs come together differs
        texts = [(row["prompt"], [{"role": "assistant", "content": row[side]}]) for row in rows for side in SIDES]
        total = sum(len(reply_ids(tokenizer, prompt, reply)[0]) for prompt, reply in texts)
        return round(total / (WARM_UP + case["steps"]))
    replies = ([{"role": "assistant", "content": row["completion"]}] for row in rows)
    return sum(len(reply_ids(tokenizer, row["prompt"], reply)[0]) for row, reply in zip(rows, replies, strict=True))


def compare(name: str, case: dict[str, Any], turns: int) -> list[dict[str, Any]]:
    tokens = tokens_per_step(case)
    found: dict[str, list[dict[str, Any]]] = {who: [] for who in WHO}
    for number in range(turns):
        for who in WHO[number % 2 :] + WHO[: number % 2]:
            found[who].append(in_a_process(who, name, case))
    if not case["own_text"] and case.get("trains") != "dpo":  # the two shuffle pairs differently
        harness.agree({who: tuple(found[who][0]["losses"]) for who in WHO}, TOLERANCE)
    rows = []
    for who in WHO:
        seconds = [statistics.median(one["seconds"]) for one in found[who]]
        against = [statistics.median(one["seconds"]) for one in found["TRL"]]
        peaks = [one["peak_bytes"] for one in found[who] if one["peak_bytes"] is not None]
        rows.append(
            {
                "case": name,
                "who": who,
                "seconds": seconds,
                "tokens": tokens,
                "tokens_per_second": tokens / statistics.median(seconds),
                "speed_over_trl": statistics.median(b / a for a, b in zip(seconds, against, strict=True)),
                "peak_bytes": statistics.median(peaks) if peaks else None,
                "losses": found[who][0]["losses"][:4],
            }
        )
        print(
            f"{name:32s} {who:9s} {rows[-1]['tokens_per_second']:8.0f} tokens/s  "
            f"{rows[-1]['speed_over_trl']:5.2f} x TRL  {(rows[-1]['peak_bytes'] or 0) / 2**20:6.0f} MiB",
            flush=True,
        )
    return rows


def run(quick: bool = False) -> dict[str, Any]:
    rows, loads = [], [harness.other_load()]
    for name, case in CASES.items():
        if quick:
            tiny = {} if isinstance(case["student"], str) else {"student": (1, 128), "teacher": (1, 256), "vocab": 512}
            case = case | tiny | {"steps": 1}
        rows += compare(name, case, 1 if quick else TURNS)
        loads.append(harness.other_load())
    return {"turns": TURNS, "dtype": "float32", "other_load": loads, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=turn.__doc__)
    parser.add_argument("who", choices=WHO)
    parser.add_argument("case", type=json.loads)
    given = parser.parse_args()
    print("\n" + json.dumps(turn(given.who, given.case)))


if __name__ == "__main__":
    main()
