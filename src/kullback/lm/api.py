"""Training from loaded objects or names: what the command line calls, and what Python calls."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from kullback.lm import memory
from kullback.lm.cache import TopKCache
from kullback.lm.engine import Engine
from kullback.lm.evaluate import Evaluation, grade, probe, token_samples
from kullback.lm.method import Method, find_method
from kullback.lm.models import (
    check_head,
    check_loadable,
    check_same_tokenizer,
    load_model,
    load_tokenizer,
    tokenizer_fingerprint,
)
from kullback.lm.moment import Lazy, Moment
from kullback.lm.rehearse import objective, rehearse
from kullback.lm.settings import EvaluateSettings, LoraSettings, TrainSettings, describe
from kullback.lm.tasks import Task, load_task
from kullback.lm.trainer import Keeper, Trainer, load_state, stop_between_steps
from kullback.run.controllers import Controller, parse_schedule
from kullback.run.directory import RunDirectory
from kullback.run.progress import ProgressBar
from kullback.run.seeds import derive


@dataclass
class Plan:
    """Everything a run needs, checked but not yet loaded.

    Args:
        student, teacher: a path, a hub name, "embedded:student", or a loaded model; the student also a specification
            of a new small one ({"architecture": "qwen3", ...}).
        tokenizer: None takes the student's.
        recipe: what recipe.yaml will show.
    """

    method: Method
    student: Any
    task: Task
    output: Path
    tokenizer: Any = None
    train: TrainSettings = field(default_factory=TrainSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    schedule: tuple[Controller, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def teacher(self) -> Any:
        return getattr(self.method, "teacher", None)


@dataclass(frozen=True)
class Run:
    """A finished run."""

    directory: Path
    student: Any
    tokenizer: Any
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any] | None


def check(plan: Plan) -> str:
    """Find everything that can be known to be wrong before models are loaded; return the objective in words.

    Raises:
        ValueError: the first thing that is wrong, in a sentence.
    """
    terms = rehearse(plan.method, plan.schedule)
    for name, role in ((plan.student, "student"), (plan.teacher, "target.teacher")):
        if isinstance(name, str):
            check_loadable(name, role=role)
    if not len(plan.task.train):
        raise ValueError(f"task={plan.task.name!r} has no training problems")
    return objective(plan.method, terms, plan.schedule)


def run(plan: Plan, *, resume: bool = False, console: Console | None = None, overwrite: bool = False) -> Run:
    """Check, load, train, grade and report.

    Raises:
        ValueError: something in the plan is wrong; raised before training where it can be known before.
        KeyboardInterrupt: stopped between two steps by Ctrl-C or SIGTERM; a checkpoint is written and `resume` goes on.
    """
    console = console or Console(stderr=True, highlight=False)
    transformers.utils.logging.disable_progress_bar()
    words = check(plan)
    directory = RunDirectory.create(plan.output, resume=resume, overwrite=overwrite)
    checkpoint = directory.last_checkpoint() if resume else None
    at = assemble(plan)
    student = at.model("student")
    words += f"\nstep       {plan.train.prompts_per_step} prompts, every mean over all its micro-batches and processes"
    directory.write_recipe(plan.recipe)
    directory.write_objective(words)
    directory.write_environment({"seed": plan.train.seed})
    console.print(words, markup=False)
    rows = -(-plan.train.prompts_per_step * plan.method.samples // plan.train.micro_batches)
    teacher = at.players.get("teacher")
    console.print(
        memory.say(
            memory.forecast(
                student,
                None if isinstance(teacher, Lazy) else teacher,
                rows=rows,
                length=plan.method.max_completion + 64,
                checkpointing=plan.train.gradient_checkpointing,
            )
        ),
        markup=False,
    )
    evaluation = Evaluation(plan.evaluate, at, plan.method.max_completion)
    graded: dict[str, Any] = {}
    if plan.evaluate.problems and plan.evaluate.anchors and not (directory.evaluation() or {}).get("untrained"):
        graded = grade_anchors(evaluation, at)
        directory.write_evaluation(graded)
    elif directory.evaluation():
        graded = dict(directory.evaluation() or {})

    finished = _train(plan, at, directory, checkpoint, evaluation)
    student.save_pretrained(directory.model)
    at.tokenizer.save_pretrained(directory.model)
    if not finished:
        raise KeyboardInterrupt(f"stopped; a checkpoint is in {directory.checkpoints}; resume=true goes on from it")
    if plan.evaluate.problems:
        graded["student"] = grade(evaluation, at, "student", label="evaluate")
        directory.write_evaluation(graded)
    if plan.evaluate.shown and plan.evaluate.problems:
        directory.append_samples(token_samples(evaluation, at, step=plan.train.steps))
    from kullback.report import write_report

    write_report([Path(directory.path)], directory.report_file)
    return Run(Path(directory.path), student, at.tokenizer, directory.metrics(), graded or None)


def grade_anchors(evaluation: Evaluation, at: Moment) -> dict[str, Any]:
    """What a run is compared with: the student as it starts, and the teacher."""
    anchors = {"untrained": grade(evaluation, at, "student", label="untrained")}
    if "teacher" in at.players:
        anchors["teacher"] = grade(evaluation, at, "teacher", label="teacher")
    return anchors


def assemble(plan: Plan) -> Moment:
    """Load the models, check that they fit together, and put a `Moment` before the first step.

    Raises:
        ValueError: a model cannot be loaded or has damaged weights; teacher and student have different tokenizers.
    """
    settings = plan.train
    torch.manual_seed(derive(settings.seed, "torch"))
    student, tokenizer = _student(plan)
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
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


def _train(plan: Plan, at: Moment, directory: RunDirectory, checkpoint: Path | None, evaluation: Evaluation) -> bool:
    settings = plan.train
    recompute = {"gradient_checkpointing": True} if settings.gradient_checkpointing else {}
    arguments = transformers.TrainingArguments(
        output_dir=str(directory.checkpoints),
        max_steps=settings.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.micro_batches,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        optim=settings.optimizer,
        bf16=settings.autocast == "bfloat16",
        fp16=settings.autocast == "float16",
        **recompute,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 500,
        save_total_limit=settings.keep_checkpoints,
        report_to=settings.trackers or "none",
        seed=settings.seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        ignore_data_skip=True,
        use_cpu=next(at.model("student").parameters()).device.type == "cpu",
        dataloader_pin_memory=False,
        label_names=[],
    )
    at.rank, at.world = arguments.process_index, arguments.world_size
    engine = Engine(
        plan.method, at, micro_batches=settings.micro_batches, controllers=plan.schedule, side=settings.padding
    )
    start = 0
    if checkpoint is not None:
        engine.restore(load_state(checkpoint))
        start = RunDirectory.checkpoint_step(checkpoint)
    directory.truncate_after(start)  # a run that died before its first checkpoint begins again, in its own directory
    with ProgressBar(settings.steps, "train", start=start) as progress:
        keeper = Keeper(
            progress,
            probe=(lambda: probe(evaluation, at)) if plan.evaluate.probe_every else None,
            probe_every=plan.evaluate.probe_every,
        )
        trainer = Trainer(engine, directory, arguments, callbacks=[keeper])
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        keeper.trainer, trainer.say = trainer, progress.print
        with stop_between_steps(keeper):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer.state.global_step >= settings.steps


def train(
    method: Method | str,
    *,
    student: Any,
    data: Any,
    tokenizer: Any = None,
    output: str | Path = "runs/latest",
    schedule: Mapping[str, str] | None = None,
    evaluate: EvaluateSettings | Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    **options: Any,
) -> Run:
    """Train a student with a method, from names or loaded objects.

        kb.train("on_policy_distillation", student=student, teacher=teacher, tokenizer=tokenizer, data=rows, steps=100)

    Args:
        method: a method, or the name of one; its fields may then stand among the options.
        student: path, hub name, "embedded:student" or a loaded causal language model.
        data: a task as a recipe writes it, a `Task`, a `datasets.Dataset`, or a list of rows.
        tokenizer: needed beside a loaded student.
        output: the run directory.
        schedule: fields that change over time: {"signal.temperature": "linear(2 -> 1, steps=100)"}.
        evaluate: see `EvaluateSettings`; left out, data without held-out problems is not graded.
        resume: go on from the last checkpoint in `output`.
        overwrite: replace a run that is there.
        console: where the objective and the memory forecast are printed; standard error by default.
        options: fields of the method (where it is named) and of `TrainSettings`.

    Raises:
        ValueError: an option is unknown or out of range, naming it.
    """
    own = {name: options.pop(name) for name in list(options) if name in TrainSettings.model_fields}
    try:
        settings = TrainSettings(**own)
        grading = evaluate if isinstance(evaluate, EvaluateSettings) else EvaluateSettings(**(evaluate or {}))
    except ValidationError as error:
        raise ValueError(describe(error)) from error
    if isinstance(method, str):
        method = make_method(find_method(method), options)
    elif options:
        raise ValueError(
            f"{next(iter(options))!r} is no training setting; fields of a method go into the method itself"
        )
    task = data if isinstance(data, Task) else load_task(data, seed=settings.seed)
    if evaluate is None and not len(task.held_out):
        grading = EvaluateSettings(problems=0)  # nothing was asked for, and there is nothing to grade on
    controllers = tuple(parse_schedule(name, text) for name, text in (schedule or {}).items())
    plan = Plan(method, student, task, Path(output), tokenizer, settings, grading, controllers)
    plan.recipe = describe_plan(plan)
    return run(plan, resume=resume, overwrite=overwrite, console=console)


def make_method(kind: type[Method], values: Mapping[str, Any]) -> Method:
    """A method from named fields, with types checked.

    Raises:
        ValueError: a field does not exist (with the nearest names), is missing, or has a wrong value.
    """
    known = {item.name for item in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            near = get_close_matches(name, [*known, *TrainSettings.model_fields], n=3, cutoff=0.5) or sorted(known)
            raise ValueError(
                f"{name}={values[name]!r}: no such setting of {kind.__name__}; did you mean {' or '.join(near)}?"
            )
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        raise ValueError(describe(error)) from error


def describe_plan(plan: Plan) -> dict[str, Any]:
    """A plan as a recipe would write it; loaded objects by their class."""

    def plain(value: Any) -> Any:
        return (
            value if isinstance(value, str | int | float | bool | list | dict | None) else f"<{type(value).__name__}>"
        )

    answers: dict[str, dict[str, Any]] = {}
    for item in dataclasses.fields(plan.method):
        answers.setdefault(item.metadata["question"], {})[item.name] = plain(getattr(plan.method, item.name))
    return {
        "method": type(plan.method).__module__.rpartition(".")[2],
        "student": plain(plan.student),
        "task": plan.task.name,
        **answers,
        "train": plan.train.model_dump(),
        "evaluate": plan.evaluate.model_dump(),
    }


def evaluate(
    student: Any,
    *,
    data: Any,
    teacher: Any = None,
    tokenizer: Any = None,
    **settings: Any,
) -> dict[str, Any]:
    """Grade a model on held-out problems; with a teacher, also how far apart the two are. See `EvaluateSettings`."""
    from kullback.lm.methods.on_policy_distillation import OnPolicyDistillation

    try:
        grading = EvaluateSettings(**settings)
    except ValidationError as error:
        raise ValueError(describe(error)) from error
    task = data if isinstance(data, Task) else load_task(data, seed=0)  # held-out problems are the same for every seed
    plan = Plan(OnPolicyDistillation(teacher=teacher), student, task, Path("."), tokenizer, evaluate=grading)
    at = assemble(plan)
    return grade(Evaluation(grading, at, plan.method.max_completion), at, "student", label="evaluate")
