"""Numbers per token for all rows of a step, without gradient: what `weight` reads.

Equal rows are measured once, each player's logits are made once for all scores that ask for them, and what frozen
players say of fixed text is kept over the epochs.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.lm.cache import ScoreCache
from kullback.lm.forwards import row_keys, weights_of
from kullback.lm.moment import Moment
from kullback.lm.predictions import FullPredictions
from kullback.lm.rollout import Origin, Rollout
from kullback.lm.statistics import token_scores
from kullback.lm.targets import FrozenTarget, Target

Parts = Callable[[FullPredictions], Mapping[str, Tensor]]


def players_of(score: str) -> tuple[str, ...]:
    """Whose predictions a score reads: "hellinger:reference,student" both, "value:critic" the student's."""
    kind, _, names = score.partition(":")
    return ("student",) if kind == "value" else tuple(names.split(","))


class Scores:
    """Measures scores at a moment.

    Args:
        at: its players, and how many rows it reads at once.
        parts: what is trained beside the student, from the student's predictions to a grid by name.
    """

    def __init__(self, at: Moment, parts: Parts) -> None:
        self.at, self.parts, self.kept = at, parts, ScoreCache()

    @torch.no_grad()
    def measure(
        self, scores: Sequence[str], rollout: Rollout, targets: Mapping[str, Target]
    ) -> dict[str, Float[Tensor, "row completion"]]:
        """One number per token by score, nats; 0 where nothing is scored.

        Args:
            scores: "log_prob:student", "entropy:teacher", "value:critic", "hellinger:reference,student" (target first).
            targets: of the method; a score may name one, otherwise it names a player.

        Raises:
            ValueError: a score asks for more of a target than it knows.
        """
        if not scores:
            return {}
        student = self.at.model("student")
        dtype = torch.promote_types(torch.float32, next(student.parameters()).dtype)
        found = {score: torch.zeros(rollout.completions.shape, dtype=dtype) for score in scores}
        found = {score: grid.to(rollout.completions.device) for score, grid in found.items()}
        weights = {name: self._weights(name, targets) for score in scores for name in players_of(score)}
        trained = [score for score in scores if None in [weights[name] for name in players_of(score)]]
        live = {name for score in trained for name in players_of(score)}
        fixed = [score for score in scores if not live.issuperset(players_of(score))]
        was_training = student.training
        student.eval()
        try:
            moving = [score for score in scores if score not in fixed]
            if moving:
                keys = self._keys(moving, rollout, targets)
                self._fill(found, moving, rollout, range(len(rollout)), targets, keys)
            self._fill_fixed(found, fixed, rollout, targets, weights)
        finally:
            student.train(was_training)
        return found

    def _fill_fixed(
        self,
        found: dict[str, Tensor],
        scores: list[str],
        rollout: Rollout,
        targets: Mapping[str, Target],
        weights: Mapping[str, tuple[int, ...] | None],
    ) -> None:
        """What only frozen players say: from memory where the text was read before."""
        if not scores:
            return
        keys, lengths = self._keys(scores, rollout, targets), rollout.lengths.tolist()
        tables = {score: self.kept.of(score, tuple(weights[name] for name in players_of(score))) for score in scores}
        missing = []
        for i, key in enumerate(keys):
            if all(key in table for table in tables.values()):
                for score, table in tables.items():
                    found[score][i, : lengths[i]] = table[key]
            else:
                missing.append(i)
        self._fill(found, scores, rollout, missing, targets, keys)
        comes_again = (rollout.origin != Origin.STUDENT).all(1).tolist()
        for i in missing:
            if comes_again[i]:
                for score in scores:
                    self.kept.add(score, keys[i], found[score][i, : lengths[i]])

    def _fill(
        self,
        found: dict[str, Tensor],
        scores: list[str],
        rollout: Rollout,
        rows: Sequence[int],
        targets: Mapping[str, Target],
        keys: Sequence[str],
    ) -> None:
        """Measure these rows, those of equal `keys` once, those of like length together."""
        if not rows:
            return
        lengths = rollout.lengths.tolist()
        first: dict[str, int] = {}
        for i in rows:
            first.setdefault(keys[i], i)
        distinct = sorted(first.values(), key=lambda i: lengths[i] + len(rollout.prompts[i]))
        names = list(dict.fromkeys(name for score in scores for name in players_of(score)))
        each = max(self.at.rows_at_once // 8, 1)
        for start in range(0, len(distinct), each):
            piece = distinct[start : start + each]
            part = rollout.rows(piece)
            seen = {name: self._predict(name, part, targets) for name in names}
            both = torch.stack([one.scored for one in seen.values()]).all(0)  # a target may not speak of every row
            seen = {name: one.where(both) for name, one in seen.items()}
            plain = [score for score in scores if not score.startswith("value:")]
            asked = {name: seen[name] for score in plain for name in players_of(score)}
            grids = {score: seen[names[0]].grid(values) for score, values in token_scores(asked, plain).items()}
            if len(plain) < len(scores):
                grids |= {f"value:{name}": grid for name, grid in self.parts(seen["student"]).items()}
            for score in scores:
                found[score][piece, : grids[score].shape[1]] = grids[score].to(found[score].dtype)
        for i in rows:
            for score in scores:
                found[score][i] = found[score][first[keys[i]]]

    def _predict(self, name: str, rollout: Rollout, targets: Mapping[str, Target]) -> FullPredictions:
        if name not in targets:
            return self.at.forwards.predict(name, self.at.model(name), rollout, rollout.prompts)
        seen = targets[name].predict(rollout, self.at)
        if not isinstance(seen, FullPredictions):
            raise ValueError(f"scores: {name!r} has {seen.kind!r} predictions; this score needs the whole vocabulary")
        return seen

    def _weights(self, name: str, targets: Mapping[str, Target]) -> tuple[int, ...] | None:
        """Of the model behind a name; None where it is trained, or a target of a kind that may read anything."""
        target = targets.get(name)
        if target is None:
            return weights_of(self.at.model(name))
        return weights_of(self.at.model(target.player)) if isinstance(target, FrozenTarget) else None

    def _keys(self, scores: Sequence[str], rollout: Rollout, targets: Mapping[str, Target]) -> list[str]:
        """Equal for rows of which all players read the same."""
        names = dict.fromkeys(name for score in scores for name in players_of(score))
        read = [rollout.prompts]
        for target in (targets[name] for name in names if name in targets):
            if not isinstance(target, FrozenTarget):
                return [str(i) for i in range(len(rollout))]
            if target.own_prompt:
                read.append(target.prompts(rollout, self.at))
        return row_keys(rollout, *read)
