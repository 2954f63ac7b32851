"""Text made between writing and scoring: readers look at rows and add notes; a failure costs its row only."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, final

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kullback.lm.annotators import Annotator, Asked
from kullback.lm.moment import Moment
from kullback.lm.rollout import Rollout


class Reader(Protocol):
    """Adds notes to rows. `says` describes it; why it failed on a row stands in the row's notes under "failed"."""

    @property
    def says(self) -> str: ...

    def read(self, rollout: Rollout, at: Moment) -> Rollout: ...

    def rehearse(self, rollout: Rollout) -> Rollout:
        """Made-up rows with the notes that this reader adds."""
        ...


@final
@dataclass(frozen=True)
class Spans:
    """See `spans`."""

    annotator: Annotator
    cap: float
    right: bool
    wrong: bool

    @property
    def says(self) -> str:
        which = "right and wrong" if self.right and self.wrong else "right" if self.right else "wrong"
        return f"spans of {which} responses, marked by {self.annotator.says}, at most {self.cap:.0%} of the tokens"

    def read(self, rollout: Rollout, at: Moment) -> Rollout:
        correct = {}  # by row, of those that are asked about; a row without a verdict is not
        for i, accuracy in enumerate(rollout.rewards["accuracy"].tolist()):
            if (accuracy >= 1 and self.right) or (accuracy < 1 and self.wrong):
                correct[i] = accuracy >= 1
        lengths, notes = rollout.lengths.tolist(), list(rollout.notes)
        ids = {i: rollout.completions[i, : lengths[i]].tolist() for i in correct}
        texts = {i: locate(at.tokenizer, ids[i]) for i in correct}
        rows = [Asked(notes[i]["messages"], texts[i][0], right) for i, right in correct.items()]
        for i, found in zip(correct, self.annotator.annotate(rows, at), strict=True):
            if isinstance(found, Exception):
                notes[i] = {**notes[i], "failed": f"{type(found).__name__}: {found}"}
                continue
            places = overlapping(texts[i][1], found.spans)[: int(self.cap * lengths[i] + 1e-9)]
            if places:
                notes[i] = {**notes[i], "spans": list(map(list, found.spans)), "marked": places, "label": found.label}
        return replace(rollout, notes=notes)

    def rehearse(self, rollout: Rollout) -> Rollout:
        return replace(rollout, notes=[{**note, "marked": [0, 1], "label": "made up"} for note in rollout.notes])


def spans(annotator: Annotator, *, cap: float = 0.25, right: bool = True, wrong: bool = True) -> Reader:
    """Marks the tokens that decided, and says what kind of step they are.

    Adds the notes "marked", places of tokens in the completion; "label"; and "spans", characters of its text. A row
    that the annotator fails on gets "failed" and none of these.

    Args:
        cap: largest share of a completion's tokens that is marked; the spans that come first are kept.
        right, wrong: which responses are asked about.
    """
    if not 0 < cap <= 1:
        raise ValueError(f"source.cap={cap:g} must be above 0 and at most 1: a share of a completion's tokens")
    return Spans(annotator, cap, right, wrong)


def marked(rollout: Rollout) -> Bool[Tensor, "row completion"]:
    """The tokens that a reader marked."""
    mask = torch.zeros(rollout.completions.shape, dtype=torch.bool)
    for i, note in enumerate(rollout.notes):
        mask[i, note.get("marked", [])] = True
    return mask.to(rollout.completions.device)


def locate(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of some tokens, and for each token the characters [start, end) that it writes.

    Tokens that share a character, as the bytes of one do, all have it; special tokens have none. Tokens are decoded
    with the piece before them, which tells how they join, so a text of n tokens takes n short calls.
    """
    special = set(tokenizer.all_special_ids)

    def decode(some: Sequence[int]) -> str:
        kwargs: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(tokenizer.decode(list(some), **kwargs))

    text, found = "", [(0, 0)] * len(ids)
    before = start = 0  # ids[before:start] is the last whole piece, ids[start:] what comes after it
    for t in range(len(ids)):
        known = decode(ids[before:start])
        piece = decode(ids[before : t + 1])[len(known) :]
        if piece.endswith("\ufffd") and t + 1 < len(ids):
            continue  # perhaps the first bytes of a character
        for place in range(start, t + 1):
            silent = ids[place] in special
            found[place] = (len(text), len(text) + (0 if silent else len(piece)))
        text += piece
        before, start = start, t + 1
    return text, found


def overlapping(offsets: Sequence[tuple[int, int]], found: Sequence[tuple[int, int]]) -> list[int]:
    """Places of the tokens that write any character of the spans, those of the first span first, each once."""
    places = [
        t
        for start, end in found
        for t, (first, last) in enumerate(offsets)
        if first < last and first < end and start < last
    ]
    return list(dict.fromkeys(places))
