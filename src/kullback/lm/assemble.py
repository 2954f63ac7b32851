"""Loading what a plan names, and checking that it fits together."""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from kullback.lm.cache import TopKCache
from kullback.lm.decode import check_compiles
from kullback.lm.models import check_head, check_same_tokenizer, load_model, load_tokenizer, tokenizer_fingerprint
from kullback.lm.moment import Moment
from kullback.lm.parts import ATTRIBUTE, build_parts
from kullback.lm.plan import Plan
from kullback.lm.players import INITIAL, Lazy, initial
from kullback.lm.settings import LoraSettings
from kullback.run.seeds import derive


def assemble(plan: Plan) -> Moment:
    """Load the models, check that they fit together, and put a `Moment` before the first step.

    Raises:
        ValueError: a model cannot be loaded or has damaged weights; teacher and student have different tokenizers.
    """
    settings = plan.train
    torch.manual_seed(derive(settings.seed, "torch"))
    student, tokenizer = _student(plan)
    device = settings.device or default_device()
    check_head(student, role="student")
    if settings.compile_decode:
        check_compiles(student)
    if settings.lora is not None:
        student = _adapt(student, settings.lora)
    player: dict[str, Any] = {"student": student.to(device)}
    at = Moment(
        player,
        tokenizer,
        plan.task,
        plan.method,
        seed=settings.seed,
        prompts_per_step=settings.prompts_per_step,
        rows_at_once=settings.rows_at_once,
        compile_decode=settings.compile_decode,
    )
    for name, model in plan.players.items():
        if isinstance(model, str) and model == INITIAL:
            at.players[name] = initial(student)
            continue
        if isinstance(model, str):
            check_same_tokenizer(tokenizer, load_tokenizer(model, role=f"target.{name}"), role=name)
        at.players[name] = Lazy(partial(_player, model, name, plan.train.dtype, device))
        cache, top_k = getattr(plan.method, "cache", None), getattr(plan.method, "top_k", None)
        if cache is None or name != "teacher":
            at.model(name)
        else:
            called = model if isinstance(model, str) else type(model).__name__
            at.caches[cache] = TopKCache(
                cache, teacher=called, tokenizer=tokenizer_fingerprint(tokenizer), top_k=top_k or 0
            )
    parts = plan.method.parts()
    if parts:
        width = student.config.get_text_config().hidden_size
        at.parts = build_parts(parts, width, seed=settings.seed, device=device)
        student.add_module(ATTRIBUTE, nn.ModuleDict(at.parts))
    return at


def _student(plan: Plan) -> tuple[Any, Any]:
    if isinstance(plan.student, Mapping):
        from kullback.lm.tiny import build

        return build(plan.student)
    if isinstance(plan.student, str):
        tokenizer = plan.tokenizer or load_tokenizer(plan.student, role="student")
        return load_model(plan.student, role="student", dtype=plan.train.dtype), tokenizer
    if plan.tokenizer is None:
        raise ValueError(
            "tokenizer=None: a loaded student needs its tokenizer, give tokenizer=AutoTokenizer.from_pretrained(...)"
        )
    return plan.student, plan.tokenizer


def _player(model: Any, name: str, dtype: str, device: str) -> Any:
    """A frozen model, loaded where it is only named."""
    role = f"target.{name}"
    if isinstance(model, str):
        model = load_model(model, role=role, dtype=dtype)
    model = model.to(device).eval().requires_grad_(False)
    check_head(model, role=role)
    return model


def _adapt(model: Any, lora: LoraSettings) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def default_device() -> str:
    """This process's GPU, or the CPU where there is none."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
