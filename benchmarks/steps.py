"""A whole optimiser step of distillation, GRPO and DPO against TRL's trainers: time per token and peak memory.

Each turn is a process of its own, so that its peak memory is its own. Same weights, ids, batch, generated lengths,
dtype and optimiser on both sides. On fixed text the losses and the norms of the gradients of all steps must agree
before anything is reported; where the student writes, two smaller steps on fixed text are compared first. TRL has no
off-policy mode: its generation is then replaced by a look-up of the fixed completions. GRPO writes eight samples of
each prompt, all of the full length, and grades them by a function both call. DPO sees new pairs at every step, so that
neither side reads the reference from memory.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, pairwise
from typing import Any, ClassVar
from unittest import mock

import torch
import transformers
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

import kullback as kb
from benchmarks import harness
from kullback.lm import sources
from kullback.lm.chat import prompt_ids, reply_ids
from kullback.lm.generate import Written
from kullback.lm.models import load_model, load_tokenizer
from kullback.run.seeds import generator

WHO = ("TRL", "kullback")
LEARNING_RATE = 1e-4
OPTIMIZER = "adamw_torch_fused"
BETA = {"reverse_kl": 1.0, "jsd(0.5)": 0.5, "forward_kl": 0.0}  # in TRL

# layers and width of student and teacher; prompts and completions in tokens, both ends included
SMALL = {"student": (4, 256), "teacher": (8, 512), "vocab": 32768, "rows": 8, "prompt": (64, 128)}
WIDE = {"student": (4, 512), "teacher": (8, 1024), "vocab": 32768, "rows": 8, "prompt": (64, 128)}
EMBEDDED = {"student": "embedded:student", "teacher": "embedded:teacher", "vocab": 101, "rows": 16, "prompt": (6, 20)}
MATCH = {"trains": "distillation", "samples": 1}
OFF = MATCH | {"own_text": False, "completion": (64, 128), "divergence": "reverse_kl"}
ON = MATCH | {"own_text": True, "completion": (64, 64), "divergence": "reverse_kl"}
GROUP = {"trains": "grpo", "own_text": True, "completion": (64, 64), "samples": 8}
PAIRS = {"trains": "dpo", "own_text": False, "completion": (64, 128), "samples": 2}
CASES: dict[str, dict[str, Any]] = {
    "off-policy, reverse KL": SMALL | OFF | {"steps": 4},
    "off-policy, JSD": SMALL | OFF | {"divergence": "jsd(0.5)", "steps": 4},
    "on-policy, reverse KL": SMALL | ON | {"steps": 3},
    "off-policy, reverse KL, wider": WIDE | OFF | {"steps": 3},
    "off-policy, embedded pair": EMBEDDED | OFF | {"completion": (16, 48), "steps": 40, "limit": True},
    "on-policy, embedded pair": EMBEDDED | ON | {"completion": (48, 48), "steps": 10},
    "GRPO": SMALL | GROUP | {"steps": 2},
    "GRPO, embedded student": EMBEDDED | GROUP | {"completion": (48, 48), "steps": 6},
    "DPO": SMALL | PAIRS | {"steps": 3},
    "DPO, embedded student": EMBEDDED | PAIRS | {"completion": (16, 48), "steps": 20},
}
WARM_UP = 2  # steps that are run and not counted
TURNS = 2
TOLERANCE = 1e-4  # of the losses of every step, relative
OF_NORMS = 1e-3  # of the norms of the gradients, relative


Rows = list[dict[str, Any]]
Steps = tuple[list[float], list[float]]  # the loss and the norm of the gradient, of every step
Theirs = tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]  # rows, options, and what the trainer takes beside


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


def setting(case: dict[str, Any]) -> tuple[Any, Any, Any, Rows]:
    """Student, teacher, tokenizer, and rows {"prompt": turns, "replies": texts}: the rows of a step, of DPO of all."""
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

    rows = [
        {
            "prompt": [{"role": "user", "content": text(case["prompt"])}],
            "replies": [text(case["completion"]) for _ in range(case["samples"])],
        }
        for _ in range(case["rows"] * (WARM_UP + case["steps"] if case["trains"] == "dpo" else 1))
    ]
    if case["own_text"]:  # an end that no model can write: every completion has the full length
        tokenizer.add_special_tokens({"eos_token": "<|never|>"})
        for model in (student, teacher):
            model.generation_config.eos_token_id = None
    return student, teacher.eval().requires_grad_(False), tokenizer, rows


def replies_of(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[list[int]]:
    """The token ids of a row's replies, with their ends."""
    turns = ([{"role": "assistant", "content": text}] for text in row["replies"])
    return [reply_ids(tokenizer, row["prompt"], turn)[0] for turn in turns]


def grade(text: str) -> float:
    """Half of all texts are right, whoever writes them."""
    return float(zlib.crc32(text.encode()) % 2)


def with_kullback(case: dict[str, Any], folder: str) -> Steps:
    from rich.console import Console

    student, teacher, tokenizer, rows = setting(case)
    method, data, own = OURS[case["trains"]](case, teacher, rows)

    def look_up(model: Any, prompts: list[list[int]], *args: Any, **kwargs: Any) -> Written:
        fixed = {tuple(prompt_ids(tokenizer, row["prompt"])): replies_of(tokenizer, row) for row in rows}
        texts = [ids for prompt in prompts for ids in fixed[tuple(prompt)]]
        return Written(texts, [[0.0] * len(ids) for ids in texts], [True] * len(texts))

    with contextlib.nullcontext() if case["own_text"] else mock.patch.object(sources, "generate", look_up):
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
            **own,
        )
    return [row["loss"] for row in run.metrics], [row["gradient_norm"] for row in run.metrics]


def our_distillation(case: dict[str, Any], teacher: Any, rows: Rows) -> tuple[str, Any, dict[str, Any]]:
    data = [{"prompt": row["prompt"], "completion": row["replies"][0]} for row in rows]
    own = {"teacher": teacher, "divergence": case["divergence"], "student_fraction": float(case["own_text"])}
    return "on_policy_distillation", data, own


def our_grpo(case: dict[str, Any], teacher: Any, rows: Rows) -> tuple[str, Any, dict[str, Any]]:
    data = [{"prompt": row["prompt"], "answer": "graded by the function"} for row in rows]
    task = {"data": data, "verifier": lambda problem, text: grade(text), "held_out": 0}
    return "grpo", task, {"samples": case["samples"], "clip": (0.2, 0.2)}


def our_dpo(case: dict[str, Any], teacher: Any, rows: Rows) -> tuple[str, Any, dict[str, Any]]:
    data = [{"prompt": row["prompt"], **dict(zip(SIDES, row["replies"], strict=True))} for row in rows]
    return "dpo", {"data": data, "held_out": 0}, {}


def with_trl(case: dict[str, Any], folder: str) -> Steps:
    import trl
    from datasets import Dataset

    student, teacher, tokenizer, rows = setting(case)
    name, found = THEIRS[case["trains"]]
    data, own, players = found(case, student, teacher, rows)
    if tokenizer.chat_template is None:  # the texts themselves, which TRL joins as they stand
        apart = {"prompt": " "}
        data = [{key: turns[0]["content"] + apart.get(key, "") for key, turns in row.items()} for row in data]
    fixed = {tuple(prompt_ids(tokenizer, row["prompt"])): cycle(replies_of(tokenizer, row)) for row in rows}
    losses: list[torch.Tensor] = []
    norms: list[torch.Tensor] = []

    class Trainer(getattr(trl, f"{name}Trainer")):  # type: ignore[misc]
        """Notes what its steps give; where the text is fixed, looks it up instead of writing it."""

        def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
            if case["own_text"]:
                return super()._generate_single_turn(prompt_ids, *args, **kwargs)
            texts = [next(fixed[tuple(ids)]) for ids in prompt_ids]
            return (texts, None) if name == "GRPO" else texts

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach())
            return loss

        def _clip_grad_norm(self, model: Any) -> Any:
            norms.append(super()._clip_grad_norm(model))
            return norms[-1]

    arguments = getattr(trl, f"{name}Config")(
        output_dir=folder,
        max_steps=WARM_UP + case["steps"],
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim=OPTIMIZER,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **own,
    )
    trainer = Trainer(
        model=student, args=arguments, train_dataset=Dataset.from_list(data), processing_class=tokenizer, **players
    )
    trainer.train()
    return [float(loss) for loss in losses], [float(norm) for norm in norms]


def their_distillation(case: dict[str, Any], student: Any, teacher: Any, rows: Rows) -> Theirs:
    own = {"per_device_train_batch_size": case["rows"], "beta": BETA[case["divergence"]]}
    return every_step(case, rows), own | written(case), {"teacher_model": teacher}


def their_grpo(case: dict[str, Any], student: Any, teacher: Any, rows: Rows) -> Theirs:
    def graded(completions: list[Any], **_: Any) -> list[float]:
        return [grade(text if isinstance(text, str) else text[0]["content"]) for text in completions]

    own = {"per_device_train_batch_size": case["rows"] * case["samples"], "num_generations": case["samples"]}
    return every_step(case, rows), own | written(case), {"reward_funcs": graded}


def their_dpo(case: dict[str, Any], student: Any, teacher: Any, rows: Rows) -> Theirs:
    order = torch.randperm(len(rows), generator=generator(0, "epoch", 0)).tolist()  # as kullback draws them
    data = [
        {"prompt": rows[i]["prompt"]}
        | {side: [{"role": "assistant", "content": text}] for side, text in zip(SIDES, rows[i]["replies"], strict=True)}
        for i in order
    ]
    own = {"per_device_train_batch_size": case["rows"], "train_sampling_strategy": "sequential"}
    return data, own, {"ref_model": copy.deepcopy(student)}


def every_step(case: dict[str, Any], rows: Rows) -> list[dict[str, Any]]:
    """The same prompts at every step of one epoch: a new epoch costs more than a step."""
    return [{"prompt": row["prompt"]} for _ in range(WARM_UP + case["steps"]) for row in rows]


def written(case: dict[str, Any]) -> dict[str, Any]:
    return {"max_completion_length": case["completion"][1] + 1, "shuffle_dataset": False}


def bare(case: dict[str, Any], folder: str) -> Steps:
    """What no step of off-policy distillation can do without, heads and loss left out: both models read its rows, the
    student's gradient, the optimiser. In the fewest lines, on rows that are already there."""
    student, teacher, tokenizer, rows = setting(case)
    texts = [torch.tensor(prompt_ids(tokenizer, row["prompt"]) + replies_of(tokenizer, row)[0][:-1]) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    optimizer = torch.optim.AdamW(student.parameters(), LEARNING_RATE, fused=True)
    clock = Clock()
    for _ in range(WARM_UP + case["steps"]):
        with torch.no_grad():
            teacher.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        student.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.on_step_end()
    return [], []


SIDES = ("chosen", "rejected")
OURS = {"distillation": our_distillation, "grpo": our_grpo, "dpo": our_dpo}
THEIRS = {"distillation": ("Distillation", their_distillation), "grpo": ("GRPO", their_grpo), "dpo": ("DPO", their_dpo)}
RUN: dict[str, Callable[[dict[str, Any], str], Steps]] = {"kullback": with_kullback, "TRL": with_trl, "bare": bare}


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
        losses, norms = RUN[who](case, folder)
    ends = Clock.ends[WARM_UP - 1 :]
    peak = Clock.peaks[-1]
    return {
        "seconds": [b - a for a, b in pairwise(ends)],
        "losses": losses,
        "gradient_norms": norms,
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
    """Scored tokens; of DPO, whose steps differ, on average."""
    _, _, tokenizer, rows = setting(case)
    if case["own_text"]:
        return case["rows"] * case["samples"] * (case["completion"][1] + 1)
    return round(sum(len(ids) for row in rows for ids in replies_of(tokenizer, row)) * case["rows"] / len(rows))


def check(found: dict[str, dict[str, Any]]) -> None:
    """Refuse contestants that do not take the same steps."""
    for what, tolerance in (("losses", TOLERANCE), ("gradient_norms", OF_NORMS)):
        harness.agree({who: tuple(one[what]) for who, one in found.items()}, tolerance)


def compare(name: str, case: dict[str, Any], turns: int) -> list[dict[str, Any]]:
    tokens = tokens_per_step(case)
    if case["own_text"]:
        shorter = {"completion": (case["completion"][1] // 2, case["completion"][1]), "rows": 2, "steps": 0}
        check({who: in_a_process(who, name, case | {"own_text": False} | shorter) for who in WHO})
    found: dict[str, list[dict[str, Any]]] = {who: [] for who in WHO}
    for number in range(turns):
        for who in WHO[number % 2 :] + WHO[: number % 2]:
            found[who].append(in_a_process(who, name, case))
    if not case["own_text"]:
        check({who: found[who][0] for who in WHO})
    limit = in_a_process("bare", name, case)["seconds"] if case.get("limit") else None
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
                "gradient_norms": found[who][0]["gradient_norms"][:4],
                "bare_seconds": None if limit is None else statistics.median(limit),
            }
        )
        print(
            f"{name:32s} {who:9s} {rows[-1]['tokens_per_second']:8.0f} tokens/s  "
            f"{rows[-1]['speed_over_trl']:5.2f} x TRL  {(rows[-1]['peak_bytes'] or 0) / 2**20:6.0f} MiB",
            flush=True,
        )
    return rows


def piece(name: str, quick: bool) -> list[dict[str, Any]]:
    case = CASES[name]
    if quick:
        tiny = {} if isinstance(case["student"], str) else {"student": (1, 128), "teacher": (1, 256), "vocab": 512}
        case = case | tiny | {"steps": 1}
    return compare(name, case, 1 if quick else TURNS)


PIECES: dict[str, Callable[[bool], list[dict[str, Any]]]] = {name: partial(piece, name) for name in CASES}


def run(quick: bool = False, only: Sequence[str] = ()) -> dict[str, Any]:
    """All cases, or some."""
    return {"dtype": "float32", "pieces": harness.in_pieces("steps", PIECES, quick, only)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=turn.__doc__)
    parser.add_argument("who", choices=list(RUN))
    parser.add_argument("case", type=json.loads)
    given = parser.parse_args()
    print("\n" + json.dumps(turn(given.who, given.case)))


if __name__ == "__main__":
    main()
