"""What `kullback frontier` measures: rewards and KLs of a run's start and of what it trained, on held-out problems.

Completions are drawn at temperature 1, because only then are they the policy's own; KL(policy || reference) is summed
over the vocabulary at every token of them, so it is unbiased and far less noisy than the log-ratio of the samples.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.lm.assemble import assemble
from kullback.lm.evaluate import Evaluation, measure, verify
from kullback.lm.moment import Moment
from kullback.lm.recipe import Recipe, make_plan, read_recipe
from kullback.run.progress import ProgressBar


@dataclass(frozen=True)
class Drawn:
    """Samples of one policy.

    Args:
        rewards: NaN where the verifier gave no verdict.
        kl: KL(policy || reference) of the whole completion, nats, estimated from each sample; None for the reference.
    """

    rewards: Float[Tensor, "problem sample"]
    kl: Float[Tensor, "problem sample"] | None


class Ground:
    """The problems of a run, and the student it started from, which is the reference.

    Raises:
        ValueError: the run has no recipe, or it started from a model in memory; there are no held-out problems.
    """

    def __init__(self, run: Path, *, problems: int, samples: int, reward: str = "accuracy") -> None:
        recipe = read_recipe(run)
        self.student, self.task, self.reward = recipe.values["student"], recipe.values["task"], reward
        if isinstance(self.student, str) and self.student.startswith("<"):
            raise ValueError(
                f"student={self.student}: {run} started from a model in memory, which is gone; the frontier needs the "
                "reference, so start the run from a path or a name"
            )
        plan = make_plan(recipe)
        kept = plan.train.model_dump(include={"dtype", "device", "rows_at_once", "compile_decode", "seed"})
        self._values: dict[str, Any] = {
            "method": "sft",  # nothing is trained; this one needs no teacher
            "task": self.task,
            "train": kept,
            "evaluate": {"problems": problems, "samples": samples, "seed": plan.evaluate.seed, "shown": 0},
        }
        self._reference = self._open(self.student)
        settings = self._reference[0].evaluate
        limit = plan.evaluate.max_completion or plan.method.max_completion
        self.evaluation = Evaluation(settings, self._reference[1], limit)

    def check_same(self, run: Path) -> None:
        """
        Raises:
            ValueError: the run had another start or another task, so it has another frontier.
        """
        values = read_recipe(run).values
        for key, ours in (("student", self.student), ("task", self.task)):
            if values[key] != ours:
                raise ValueError(
                    f"{key}={values[key]!r} of {run} is not the first run's {ours!r}: policies are compared with the "
                    "reference they started from, so give runs of another start or task to a call of their own"
                )

    def reference(self) -> Drawn:
        """What the start writes."""
        return self._draw(self._reference[1], None, "reference")

    def trained(self, run: Path) -> Drawn:
        """What the run's model writes to the same problems, and how far it has gone."""
        at = self._open(str(run / "model"))[1]
        at.players["reference"] = self._reference[1].model("student")
        return self._draw(at, "reference", run.name)

    def _open(self, student: Any) -> tuple[Any, Moment]:
        plan = make_plan(Recipe("frontier", {**self._values, "student": student}))
        return plan, assemble(plan)

    def _draw(self, at: Moment, reference: str | None, label: str) -> Drawn:
        problems, samples = self.evaluation.problems, self.evaluation.settings.samples
        rewards = torch.full((len(problems), samples), math.nan, dtype=torch.float64)
        kl = torch.zeros_like(rewards)
        with ProgressBar(len(problems) * samples, label) as progress:
            for chunk in self.evaluation.chunks(at, "student", range(len(problems)), samples):
                texts = self.evaluation.write(at, "student", [problems[i] for i in chunk], samples)
                graded = verify(at, texts)
                if self.reward not in (known := set().union(*graded) - {"error"}):
                    raise ValueError(f"reward={self.reward!r}: the verifier gives {', '.join(sorted(known))}")
                rewards[chunk] = (
                    torch.tensor([row.get(self.reward, math.nan) for row in graded]).double().view(-1, samples)
                )
                if reference is not None:
                    sums = measure(self.evaluation, at, "student", reference, texts)["reverse_kl"]
                    kl[chunk] = sums.view(-1, samples)
                progress.advance(len(chunk) * samples)
        return Drawn(rewards, None if reference is None else kl)
