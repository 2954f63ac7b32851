"""The one driver for text: an `Engine` in `transformers.Trainer`, for devices, sharding, callbacks and trackers."""

import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader

from kullback.lm.engine import Engine
from kullback.lm.shards import whole
from kullback.run.directory import RunDirectory
from kullback.run.processes import from_main, is_main, sum_over_ranks
from kullback.run.progress import ProgressBar
from kullback.run.state import save_state


class Trainer(transformers.Trainer):
    """`transformers.Trainer` with three answers of its own: where batches come from, what the loss is, what is logged.

    A draw must see the weights that the last step left, so batches are made when the step begins; the loader that the
    base class insists on only counts.
    """

    def __init__(
        self, engine: Engine, directory: RunDirectory, args: transformers.TrainingArguments, **kwargs: Any
    ) -> None:
        self.engine, self.directory = engine, directory
        self.started, self.told = time.monotonic(), False
        self.new_metrics: dict[str, float] = {}
        self.say: Callable[[str], None] = print
        super().__init__(model=engine.at.model("student"), args=args, train_dataset=[0] * args.max_steps, **kwargs)
        self.model_accepts_loss_kwargs = True  # with a count of items the base class leaves our normalisation alone

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([0] * (self.args.max_steps * self.args.gradient_accumulation_steps), batch_size=1)  # type: ignore[arg-type]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        for _ in range(num_batches):
            next(epoch_iterator)
        batches = self.engine.prepare(self.state.global_step)
        if not self.told:
            self.told = True
            scored = int(sum_over_ranks(self.engine.step_batch["scored"].sum())) if self.engine.step_batch else 0
            self.say(f"step {self.state.global_step + 1} has {scored:,} scored tokens")
        return [{"batch": batch, "input_ids": batch.rollout.completions} for batch in batches], torch.ones(
            (), device=device
        )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        wrapped = model if model is not self.engine.at.model("student") else None
        loss = self.engine.loss(inputs["batch"], wrapped=wrapped)
        if not loss.isfinite():
            raise FloatingPointError(
                f"the loss is {float(loss)} at step {self.state.global_step}: "
                "lower train.learning_rate, or train.max_grad_norm; "
                "`kullback inspect` shows the batch, the last checkpoint is kept"
            )
        return loss * self.engine.at.world  # DDP divides gradients by the number of ranks

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class makes it, with a group of its own for each part that has a learning rate of its own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        for name, part in self.engine.method.parts().items():
            if part.learning_rate is None:
                continue
            own = list(self.engine.at.parts[name].parameters())
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if all(p is not other for other in own)]
            optimizer.add_param_group({"params": own, "lr": part.learning_rate, "weight_decay": 0.0})
        return optimizer

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the base class goes through all parameters for it at every step."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        row = {
            "loss": logs.get("loss"),
            "learning_rate": logs.get("learning_rate"),
            "gradient_norm": logs.get("grad_norm"),
        }
        row = {name: value for name, value in row.items() if value is not None}
        if "loss" in row:
            row |= self.new_metrics
            seconds = time.monotonic() - self.started
            if self.is_world_process_zero():
                self.directory.append_metrics({"step": self.state.global_step, "time": round(seconds, 3), **row})
            super().log(logs | self.new_metrics, start_time)
        else:
            super().log(logs, start_time)


class Keeper(transformers.TrainerCallback):
    """Between steps: collects metrics, probes, shows progress, and keeps what a resumed run needs."""

    def __init__(
        self, progress: ProgressBar, *, probe: Callable[[], dict[str, float]] | None, probe_every: int
    ) -> None:
        self.progress, self.probe, self.probe_every = progress, probe, probe_every
        self.trainer: Trainer | None = None
        self.stop = self.owed = False  # asked to stop; a checkpoint that has to wait for the end of a draw
        self.step_started = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        engine = self.trainer.engine
        optimizer: Any = self.trainer.optimizer
        for parameter in engine.after(state.global_step):
            optimizer.state.pop(parameter, None)  # moments of weights that are gone
        metrics = engine.metrics()
        if self.probe is not None and state.global_step % self.probe_every == 0:
            with whole(engine.at.model("student")):
                measured = from_main(self.probe() if is_main() else {})
            found = {f"probe/{name}": value for name, value in measured.items()}
            engine.seen |= found
            engine.control("probe", state.global_step)
            metrics |= found
        self.trainer.new_metrics = metrics
        shown: dict[str, Any] = {
            name.removeprefix("rollout/").removeprefix("term/"): value
            for name, value in metrics.items()
            if name in _SHOWN or name.startswith("term/")
        }
        self.progress.advance(**shown)
        # In the middle of a draw nothing is saved: its rows and columns are not in the checkpoint.
        between = state.global_step % engine.method.passes == 0 or state.global_step >= args.max_steps
        self.owed = control.should_save = control.should_save or self.owed
        stop = sum_over_ranks(torch.tensor(float(self.stop), device=args.device)) > 0  # all stop after the same step
        if between and stop:
            control.should_save = control.should_training_stop = True
        if between:
            self.owed = False
        else:
            control.should_save = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.flush()

    def flush(self) -> None:
        """Put what the teacher's caches hold on disk."""
        assert self.trainer is not None
        for cache in self.trainer.engine.at.caches.values():
            cache.flush()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.flush()
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        save_state(self.trainer.engine.state(), folder)
        self.trainer.directory.mark_complete(folder)


_SHOWN = {"rollout/accuracy", "rollout/length", "rollout/entropy"}


@contextmanager
def stop_between_steps(keeper: Keeper) -> Any:
    """On Ctrl-C or SIGTERM finish the step, write a checkpoint and return; a second signal stops at once."""
    before = {}

    def ask(number: int, frame: Any) -> None:
        if keeper.stop:
            raise KeyboardInterrupt
        keeper.stop = True

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    except ValueError:  # only the main thread may set handlers; elsewhere the owner of the signals decides
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
