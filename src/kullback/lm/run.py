"""A plan from start to finish: load, train, grade, report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from kullback.lm import memory
from kullback.lm.assemble import assemble, default_device
from kullback.lm.engine import Engine
from kullback.lm.evaluate import Evaluation, grade, probe, token_samples
from kullback.lm.moment import Moment
from kullback.lm.parts import ATTRIBUTE
from kullback.lm.plan import Plan, check
from kullback.lm.shards import check_launch, whole, whole_state
from kullback.lm.trainer import Keeper, Trainer, stop_between_steps
from kullback.run.directory import RunDirectory
from kullback.run.processes import from_all, from_main, is_main, wait_for_all
from kullback.run.progress import ProgressBar
from kullback.run.state import load_state


@dataclass(frozen=True)
class Run:
    """A finished run."""

    directory: Path
    student: Any
    tokenizer: Any
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any] | None


def run(plan: Plan, *, resume: bool = False, console: Console | None = None, overwrite: bool = False) -> Run:
    """Check, load, train, grade and report.

    Raises:
        ValueError: something in the plan is wrong; raised before training where it can be known before.
        KeyboardInterrupt: stopped between two steps by Ctrl-C or SIGTERM; a checkpoint is written and `resume` goes on.
    """
    console = console or Console(stderr=True, highlight=False)
    console.quiet = console.quiet or not is_main()
    transformers.utils.logging.disable_progress_bar()
    words = check(plan)
    check_launch(plan.method, plan.players, plan.train)
    directory = RunDirectory(plan.output)
    if is_main():
        directory = RunDirectory.create(plan.output, resume=resume, overwrite=overwrite)
    arguments = training_arguments(plan)  # from here on processes that were launched together know each other
    checkpoint = from_main(directory.last_checkpoint() if resume and is_main() else None)
    at = assemble(plan)
    at.rank, at.world = arguments.process_index, arguments.world_size
    if plan.train.prompts_per_step < at.world:
        raise ValueError(
            f"train.prompts_per_step={plan.train.prompts_per_step} leaves some of {at.world} processes without any"
        )
    student = at.model("student")
    words += f"\nstep       {plan.train.prompts_per_step} prompts, every mean over all its micro-batches and processes"
    if is_main():
        directory.write_recipe(plan.recipe)
        directory.write_objective(words)
        directory.write_environment({"seed": plan.train.seed, "processes": at.world})
    console.print(words, markup=False)
    rows = -(-plan.train.prompts_per_step * plan.method.samples // plan.train.micro_batches)
    length = plan.method.max_completion + 64
    found = memory.forecast(at.players, rows=rows, length=length, checkpointing=plan.train.gradient_checkpointing)
    console.print(memory.say(found), markup=False)
    evaluation = Evaluation(plan.evaluate, at, plan.method.max_completion)
    graded: dict[str, Any] = (directory.evaluation() or {}) if is_main() else {}
    if plan.evaluate.problems and plan.evaluate.anchors and "untrained" not in graded and is_main():
        graded |= grade_anchors(evaluation, at)
        directory.write_evaluation(graded)

    if is_main() and plan.evaluate.problems and plan.method.readers() and not directory.samples():
        directory.append_samples(token_samples(evaluation, at, step=0))  # routes may fade: as they are at the start
    finished = _train(plan, at, directory, checkpoint, evaluation, arguments)
    if at.parts:
        delattr(student, ATTRIBUTE)  # the model is a plain one again; the parts are in the checkpoints
    state = whole_state(student)
    if is_main():
        student.save_pretrained(directory.model, state_dict=state)
        at.tokenizer.save_pretrained(directory.model)
    failed = from_all((at.task.errors, at.task.last_error))
    if count := sum(errors for errors, _ in failed):
        last = next(error for errors, error in failed if errors)
        console.print(
            f"the verifier failed on {count} samples, which count as unknown, not as wrong; the last: {last}",
            markup=False,
        )
    if not finished:
        raise KeyboardInterrupt(f"stopped; a checkpoint is in {directory.checkpoints}; resume goes on from it")
    with whole(student):
        if is_main():
            _finish(plan, at, directory, evaluation, graded)
        wait_for_all()
    return Run(Path(directory.path), student, at.tokenizer, directory.metrics(), directory.evaluation())


def _finish(plan: Plan, at: Moment, directory: RunDirectory, evaluation: Evaluation, graded: dict[str, Any]) -> None:
    """Grade the trained student, keep samples token by token, and write the report."""
    from kullback.report import write_report

    if plan.evaluate.problems:
        graded["student"] = grade(evaluation, at, "student", label="evaluate")
        directory.write_evaluation(graded)
        if plan.evaluate.shown:
            directory.append_samples(token_samples(evaluation, at, step=plan.train.steps))
    write_report([Path(directory.path)], directory.report_file)


def grade_anchors(evaluation: Evaluation, at: Moment) -> dict[str, Any]:
    """What a run is compared with: the student as it starts, and the teacher."""
    anchors = {"untrained": grade(evaluation, at, "student", label="untrained")}
    if "teacher" in at.players:
        anchors["teacher"] = grade(evaluation, at, "teacher", label="teacher")
    return anchors


def training_arguments(plan: Plan) -> transformers.TrainingArguments:
    """A plan's settings in the words of `transformers`."""
    settings = plan.train
    warm = settings.warmup_steps > 0
    recompute: dict[str, Any] = {"gradient_checkpointing": True} if settings.gradient_checkpointing else {}
    return transformers.TrainingArguments(
        output_dir=str(plan.output / "checkpoints"),
        max_steps=settings.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.micro_batches,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup"
        if warm and settings.lr_schedule == "constant"
        else settings.lr_schedule,
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
        ddp_find_unused_parameters=False,  # the head is used after the forward pass, which DDP would take for unused
        use_cpu=(settings.device or default_device()) == "cpu",
        dataloader_pin_memory=False,
        label_names=[],
    )


def _train(
    plan: Plan,
    at: Moment,
    directory: RunDirectory,
    checkpoint: Path | None,
    evaluation: Evaluation,
    arguments: transformers.TrainingArguments,
) -> bool:
    """True when all steps are done, False when a signal asked to stop."""
    settings = plan.train
    engine = Engine(
        plan.method, at, micro_batches=settings.micro_batches, controllers=plan.schedule, side=settings.padding
    )
    start = 0
    if checkpoint is not None:
        engine.restore(load_state(checkpoint))
        start = RunDirectory.checkpoint_step(checkpoint)
    else:
        engine.begin()
    if is_main():
        directory.truncate_after(
            start
        )  # a run that died before its first checkpoint begins again, in its own directory
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
