"""How long and how hard to train, and how to grade: the settings that belong to no method."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt


class Settings(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


class LoraSettings(Settings):
    """Low-rank adapters through peft."""

    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"


class TrainSettings(Settings):
    """The `train:` section of a recipe."""

    steps: PositiveInt = 200  # optimiser steps
    prompts_per_step: PositiveInt = 16  # over all processes
    micro_batches: PositiveInt = 1  # pieces a step is cut into on each process; more need less memory
    learning_rate: float = Field(default=1e-5, gt=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta2: float = Field(default=0.999, gt=0, lt=1)
    max_grad_norm: float = Field(default=1.0, ge=0)  # 0 switches clipping off
    optimizer: str = "adamw_torch"  # any name that transformers.TrainingArguments takes
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights as loaded
    autocast: Literal["none", "bfloat16", "float16"] = "none"  # of the forward pass
    gradient_checkpointing: bool = False
    padding: Literal["right", "left", "packed"] = "right"
    lora: LoraSettings | None = None
    seed: int = Field(default=0, ge=0)
    device: str | None = None  # None: a GPU where there is one
    rows_at_once: PositiveInt = 1024  # rows that are written or scored together
    compile_decode: bool = False  # the steps that write: pays in long runs whose steps write few rows
    save_every: int = Field(default=0, ge=0)  # steps between checkpoints; 0: only when stopped
    keep_checkpoints: PositiveInt = 2
    trackers: list[str] = []  # "wandb", "trackio", "tensorboard", ...


class EvaluateSettings(Settings):
    """The `evaluate:` section of a recipe: what is measured after a run, and by the probe during it."""

    problems: int = Field(default=200, ge=0)  # held-out problems; 0 switches it off
    samples: PositiveInt = 4  # completions of each
    temperature: float = Field(default=1.0, ge=0)
    max_completion: PositiveInt | None = None  # tokens; None takes source.max_completion
    divergence_problems: int = Field(
        default=64, ge=0
    )  # problems on whose text both KLs and JSD to the teacher are measured
    shown: int = Field(default=6, ge=0)  # samples kept token by token for the report
    anchors: bool = True  # also grade the untrained student and the teacher
    seed: int = Field(default=1234, ge=0)
    probe_every: int = Field(default=0, ge=0)  # steps; 0: no probe during training
    probe_problems: PositiveInt = 64


def describe(error: Any) -> str:
    """The first complaint of a pydantic error in one sentence with its field, value and what is allowed."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}={first.get('input')!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
