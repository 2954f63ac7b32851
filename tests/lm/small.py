"""Small random models, a task made of rows, and a case of every method: what the engine's tests share."""

import dataclasses
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from kullback.lm.engine import Engine
from kullback.lm.method import Method, find_method
from kullback.lm.moment import Moment
from kullback.lm.parts import ATTRIBUTE, build_parts
from kullback.lm.tasks import load_task
from kullback.lm.tiny import build_tokenizer

ROWS = [
    {"prompt": f"{a}+{b}=", "completion": str(a + b) + " ok" * (a % 4), "answer": str(a + b)}
    for a in range(8)
    for b in range(5)
]


def random_model(seed: int, hidden: int = 16, layers: int = 2, **options: Any) -> Qwen3ForCausalLM:
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.4,  # far from uniform, so that divergences are large
        **options,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config).float().eval()
    model.generation_config.eos_token_id = list(range(3, 100, 9))  # so that untrained models write rows of many lengths
    return model


def make_moment(method: Method, *, dtype: torch.dtype = torch.float32, **options: Any) -> Moment:
    players = {
        "student": random_model(1).to(dtype),
        "teacher": random_model(2, hidden=24).to(dtype).requires_grad_(False),
        "reference": random_model(3).to(dtype).requires_grad_(False),
        "hinted": random_model(4).to(dtype).requires_grad_(False),
    }
    at = Moment(players, build_tokenizer(), load_task(ROWS, seed=0), method, prompts_per_step=8, **options)
    if method.parts():
        at.parts = build_parts(method.parts(), 16, seed=0, device="cpu")
        for index, part in enumerate(at.parts.values()):
            for parameter in part.parameters():  # not the zeros they start from
                torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(index))
        players["student"].add_module(ATTRIBUTE, torch.nn.ModuleDict(at.parts))
    method.begin(at)
    return at


CASES: dict[str, dict[str, Any]] = {
    "sft": {"max_completion": 100},
    "sequence_kd": {"max_completion": 12},
    "word_kd": {"mix": 0.3, "max_completion": 100},
    "gkd": {"max_completion": 12},
    "on_policy_distillation": {
        "divergence": "squared_hellinger",
        "student_fraction": 0.5,
        "otherwise": "teacher",
        "max_completion": 12,
    },
    "minillm": {"max_completion": 12, "samples": 2},
    "four_cells": {"reverse_weight": 0.25, "max_completion": 12},
    "vopd": {"max_completion": 12, "samples": 2},
    "grpo": {
        "rewards": {"accuracy": 1.0, "finished": 0.5},  # an untrained student is never right, but it does stop
        "max_completion": 12,
        "samples": 3,
        "scale": "batch",
        "correction": 2.0,
        "redraws": 1,
        "reference": "initial",
        "penalty": 0.1,
        "horizon": "sequence",
    },
    "dph_rl": {
        "rewards": {"accuracy": 1.0, "finished": 0.5},
        "judge": "finished",
        "updates": 2,
        "attempts": 2,
        "threshold": 2,
        "replay": 4,
        "max_completion": 12,
        "samples": 2,
    },
    "trace": {
        "rewards": {"accuracy": 1.0, "finished": 0.5},
        "max_completion": 12,
        "samples": 2,
        "error": "reverse_kl",
        "template": "{prompt} {hint}",
    },
    "ppo": {"rewards": {"accuracy": 1.0, "finished": 0.5}, "max_completion": 12, "samples": 2},
    "f_dpg": {"score": "posterior(finished, beta=0.5)", "max_completion": 12, "samples": 3},
    "dpo": {
        "divergence": "reverse_kl + jsd(0.3)",
        "pairs": "student",
        "judge": "finished",
        "max_completion": 12,
        "samples": 2,
    },
    "chi_po": {"pairs": "reference", "judge": "finished", "max_completion": 12, "samples": 2},
}


def make(name: str, **changes: Any) -> Method:
    kind = find_method(name)
    options = dict(CASES[name]) | changes
    if "teacher" in {field.name for field in dataclasses.fields(kind)}:
        options["teacher"] = "given"
    return kind(**options)


def gradient(engine: Engine, update: int = 0) -> tuple[float, torch.Tensor]:
    student = engine.at.model("student")
    student.zero_grad()
    total = 0.0
    for micro in engine.prepare(update):
        loss = engine.loss(micro)
        loss.backward()
        total += float(loss)
    return total, torch.cat(
        [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in student.parameters()]
    )
