"""What the student could already do, kept: answers of its own from before the first step, read again while it learns.

`collect` runs once, before training: it asks every problem, splits them by pass rate, and keeps right answers of those
that are mastered, with their log-probabilities. `beside` draws them next to rollouts on the other problems, and
`held` is a divergence to the initial student on them. The stored numbers are the target, so no reference model is read.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from rich.console import Console
from torch import Tensor

from kullback.divergence import FDivergence, divergence
from kullback.lm.advantages import MAX_LOG_RATIO
from kullback.lm.batch import Batch
from kullback.lm.beforehand import ask
from kullback.lm.moment import Moment
from kullback.lm.rollout import Origin, Rollout, build_rollout, concatenate
from kullback.lm.sampling import Around
from kullback.lm.sources import Placed, Source
from kullback.run.processes import from_all, is_main
from kullback.run.progress import ProgressBar
from kullback.run.seeds import generator
from kullback.run.terms import Term

RATE = "mastered"  # in the ledger: the share of a problem's first answers that were seen to be right
KEPT = "replay"  # in the store: problem id -> {"place", "rows": [[prompt, completion, log_probs], ...]}
OPEN = "explore"  # in the store: the places of the problems that are not mastered


def collect(at: Moment, *, attempts: int, threshold: int, answers: int, judge: str = "accuracy") -> None:
    """Fill the store with what the student masters as it is now, and with the places of what it does not.

    A problem is mastered if `threshold` of `attempts` answers are right; one whose verifier fails is not counted as
    right. Of each mastered problem `answers` more are looked at and the right ones kept: those that decided are not,
    since they are right by selection. Processes share the problems. `judge` is the grade that is 1 where an answer is
    right.

    Raises:
        ValueError: the verifier gives no such grade; every problem is mastered, so that nothing is left to learn.
    """
    each = max(at.rows_at_once // (attempts + answers), 1)
    places = range(at.rank, len(at.task.train), at.world)
    chunks = (
        [(place, at.task.train[place]) for place in places[start : start + each]]
        for start in range(0, len(places), each)
    )
    asked = ask(
        "student", chunks, at, samples=attempts + answers, grades=[judge], field=f"source.judge={judge!r}", once=True
    )
    right: list[tuple[str, Tensor]] = []
    kept: list[tuple[int, str, list[list[Any]]]] = []
    open_places: list[int] = []
    console = None if is_main() else Console(quiet=True)
    with ProgressBar(len(places), "collect", console=console) as progress:
        for chunk, rollout, grades in asked:
            for index, (place, problem) in enumerate(chunk):
                good = grades[index, :, 0] == 1
                first = good[:attempts].double()
                right.append((problem.id, first))
                if first.sum() < threshold:
                    open_places.append(place)
                    continue
                further = good[attempts:].nonzero()[:, 0] + attempts + index * (attempts + answers)
                kept.append((place, problem.id, [_row(rollout, row) for row in further.tolist()]))
            progress.advance(len(chunk), mastered=len(kept))
        at.ledger.add(RATE, [i for i, first in right for _ in first], torch.cat([first for _, first in right]))
        everything = sorted(item for part in from_all(kept) for item in part)
        opened = sorted(place for part in from_all(open_places) for place in part)
        at.store[KEPT] = {i: {"place": place, "rows": rows} for place, i, rows in everything if rows}
        at.store[OPEN] = {"places": opened}
        rows = sum(len(item["rows"]) for item in at.store[KEPT].values())
        progress.print(
            f"{len(everything)} of {len(at.task.train)} problems are mastered ({threshold} of {attempts} answers "
            f"right), {rows} right answers to them are kept, {len(opened)} problems are left to learn"
        )
        if not rows:
            progress.print("nothing is replayed: without kept answers the divergence has nothing to hold")
    if not opened:
        raise ValueError(
            f"task={at.task.name!r}: all {len(at.task.train)} problems are mastered ({threshold} of {attempts} answers "
            "right), nothing is left to learn: take harder ones, or raise source.threshold"
        )


def _row(rollout: Rollout, row: int) -> list[Any]:
    n = int(rollout.lengths[row])
    return [rollout.prompts[row], rollout.completions[row, :n].tolist(), rollout.log_probs[row, :n].tolist()]


@final
@dataclass(frozen=True)
class OpenSource(Around):
    """A source that is asked only the problems that were not mastered."""

    @property
    def says(self) -> str:  # type: ignore[override]
        return f"{self.source.says}, on problems it had not mastered"

    def problems(self, at: Moment, turn: int = 0) -> Placed:
        return at.problems(turn, among=at.store[OPEN]["places"])


@final
@dataclass(frozen=True)
class BesideSource(Around):
    """See `beside`."""

    count: int

    @property
    def writes(self) -> frozenset[Origin]:  # type: ignore[override]
        return self.source.writes | {Origin.DATASET}

    @property
    def says(self) -> str:  # type: ignore[override]
        own = f"{self.count} answers a step that it gave before training to problems it had mastered"
        return f"{self.source.says}; and {own}"

    def draw(self, at: Moment) -> Rollout:
        rows = self._rows(at)
        fresh = self.source.draw(at)
        return concatenate([fresh, rows]) if rows is not None else fresh

    def _rows(self, at: Moment) -> Rollout | None:
        """This rank's kept answers of the step: all of them once in each epoch, in an order of its own."""
        kept = [(i, item["place"], row) for i, item in at.store[KEPT].items() for row in item["rows"]]
        chosen = []
        for slot in range(at.rank, self.count if kept else 0, at.world):
            epoch, place = divmod(at.step * self.count + slot, len(kept))
            order = torch.randperm(len(kept), generator=generator(at.seed, "replay", epoch))
            chosen.append(kept[int(order[place])])
        if not chosen:
            return None
        return build_rollout(
            [row[0] for _, _, row in chosen],
            [row[1] for _, _, row in chosen],
            [[int(Origin.DATASET)] * len(row[1]) for _, _, row in chosen],
            log_probs=[row[2] for _, _, row in chosen],
            notes=[
                {"problem_id": i, "place": place, "messages": at.task.train[place].messages, "source": "replay"}
                for i, place, _ in chosen
            ],
        )


def unmastered(source: Source) -> Source:
    """The source, asked only what the student had not mastered when `collect` ran."""
    return OpenSource(source)


def beside(source: Source, count: int) -> Source:
    """The source's rows, and beside them `count` kept answers a step, over all processes.

    Kept answers are rows of `Origin.DATASET`, whose log_probs are the initial student's; they have no rewards.

    Raises:
        ValueError: count is negative.
    """
    if count < 0:
        raise ValueError(f"source.replay={count} must be at least 0")
    return BesideSource(source, count) if count else source


def held(
    which: str | FDivergence,
    batch: Batch,
    *,
    centred: bool = True,
    cap: float | None = None,
    over: str = "replay",
    name: str = "replay",
    coefficient: float = 1.0,
) -> Term:
    """A divergence to whoever wrote the text, from its stored log-probabilities alone.

        value per token = f(u) / u,    u = writer / model,    gradient through log model

    whose mean over the writer's tokens is D(writer, model) at each prefix; only its tokens may be in `over`. For
    forward KL the sum over a row is unbiased for the KL between whole completions; for the others it is a sum of
    conditional divergences, not that between completions. At model = writer value and gradient are 0 for every token.

    Args:
        centred: f'(1) = 0. Without it the textbook generator is used: for forward KL the value is log writer - log
            model, with the gradient of plain rehearsal, which repeated text sharpens the model onto.
        cap: value of a token, in nats, above which it counts as `cap` and pulls no more; the metric "capped" counts
            them. A token that the model made far likelier than its writer did grows linearly in the ratio otherwise,
            and one that it has all but lost pulls, with forward KL, until it is 1 + cap nats below.

    Source: Li et al., arXiv 2509.07430, its generators with u turned round. Log-ratios are cut at 20 nats.
    """
    D = divergence(which)
    mask = batch[over].bool()
    target = torch.where(mask, batch.rollout.log_probs, 0.0)
    model = torch.where(mask, batch.model.log_probs(), 0.0)
    target = target.to(model.dtype)
    model = target + (model - target).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    value = D.surrogate(target, model, drawn_from="target")
    if not centred:  # f_plain(u) / u = f(u) / u + slope * (1 - 1 / u)
        value = value + D.plain_slope * (1 - (model - target).exp())
    seen = {"ratio": (model - target).detach().exp()}
    if cap is not None:
        seen["capped"] = (value > cap).detach()
        value = value.clamp(max=cap)
    form = "" if centred else ", textbook generator"
    says = f"{D} of the student from itself before training{form}; value: f(u) / u at stored tokens; gradient: its own"
    says += f", up to {cap:g} nats a token" if cap is not None else ""
    return Term(name, value, over=over, mean=batch.aggregate, coefficient=coefficient, says=says, seen=seen)
