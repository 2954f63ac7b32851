"""What `weight` and `signal` read: rows, named columns, and the distributions of the model and its targets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from kullback.lm.ledger import Ledger
from kullback.lm.predictions import Predictions
from kullback.lm.rollout import Rollout
from kullback.run.terms import Mean


@dataclass(frozen=True)
class Batch:
    """The whole step in `weight`, one micro-batch in `signal` (only there `model` and `targets` are filled).

    `batch["scored"]` is the mask of trained tokens, `batch["rows"]` the rows that have any; the other columns are the
    scores a method asked for and what its `weight` made of them. `parts` are the outputs of what is trained beside the
    student (in `signal`), `ledger` numbers by problem that outlive a step. `aggregate` is how the method averages,
    `sampling_temperature` what the writer's logits were divided by.
    """

    rollout: Rollout
    columns: Mapping[str, Tensor]
    predictions: Predictions | None = None
    targets: Mapping[str, Predictions] = field(default_factory=dict)
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    aggregate: Mean = "token"
    sampling_temperature: float = 1.0

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.columns:
            raise KeyError(f"column {name!r} does not exist; this step has {', '.join(sorted(self.columns))}")
        return self.columns[name]

    @property
    def model(self) -> Predictions:
        """The student's next-token distributions, with gradient."""
        if self.predictions is None:
            raise ValueError("batch.model is only there in `signal`: name what `weight` needs in `scores`")
        return self.predictions

    def rows(self, index: Sequence[int]) -> "Batch":
        """Some rows: a micro-batch of the step."""
        part = self.rollout.rows(index)
        width = part.completions.shape[1]
        columns = {
            name: values[list(index)] if values.dim() == 1 else values[list(index), :width]
            for name, values in self.columns.items()
        }
        return replace(self, rollout=part, columns=columns)


def base_columns(rollout: Rollout) -> dict[str, Tensor]:
    """The columns every step has."""
    scored = rollout.scored
    return {"scored": scored, "rows": scored.any(1)}
