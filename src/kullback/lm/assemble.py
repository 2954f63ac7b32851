"""Loading what a plan names, and checking that it fits together."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from kullback.lm.cache import TopKCache
from kullback.lm.models import check_head, check_same_tokenizer, load_model, load_tokenizer, tokenizer_fingerprint
from kullback.lm.moment import Lazy, Moment
from kullback.lm.plan import Plan
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
    )
    if plan.teacher is not None:
        if isinstance(plan.teacher, str):
            check_same_tokenizer(tokenizer, load_tokenizer(plan.teacher, role="target.teacher"), role="teacher")
        at.players["teacher"] = _teacher(plan, device)
        cache, top_k = getattr(plan.method, "cache", None), getattr(plan.method, "top_k", None)
        if cache is None:
            at.model("teacher")
        else:
            name = plan.teacher if isinstance(plan.teacher, str) else type(plan.teacher).__name__
            at.caches[cache] = TopKCache(
                cache, teacher=name, tokenizer=tokenizer_fingerprint(tokenizer), top_k=top_k or 0
            )
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


def _teacher(plan: Plan, device: str) -> Any:
    def load() -> Any:
        model = plan.teacher
        if isinstance(model, str):
            model = load_model(model, role="target.teacher", dtype=plan.train.dtype)
        model = model.to(device).eval().requires_grad_(False)
        check_head(model, role="target.teacher")
        return model

    return Lazy(load)


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
