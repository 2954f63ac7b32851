"""Chat turns to token ids: what a model reads, and what it is trained to write."""

from array import array
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from kullback.lm.rollout import Origin

Turns = Sequence[dict[str, str]]
KEPT = 1 << 14  # texts whose ids are kept: those of a small data set come again in every epoch
Ids = tuple["array[int]", ...]
_TEXTS: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[Any, ...], Ids]] = WeakKeyDictionary()


def _kept(tokenizer: PreTrainedTokenizerBase, turns: tuple[Any, ...], read: Callable[[], tuple[list[int], ...]]) -> Ids:
    texts = _TEXTS.setdefault(tokenizer, {})
    key = (tokenizer.chat_template, tokenizer.eos_token, repr(turns))
    if key not in texts:
        if len(texts) >= KEPT:
            texts.clear()
        texts[key] = tuple(array("i", ids) for ids in read())
    return texts[key]


def render(tokenizer: PreTrainedTokenizerBase, turns: Turns, *, generation: bool) -> str:
    """The text of a conversation under the tokenizer's chat template; the bare contents where it has none."""
    if tokenizer.chat_template is None:
        return "\n".join(turn["content"] for turn in turns)
    return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=generation))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, turns: Turns, *, system: str | None = None) -> list[int]:
    """Token ids up to where the assistant starts to write. `system` replaces or adds the system turn."""
    if system is not None:
        turns = [{"role": "system", "content": system}, *(turn for turn in turns if turn["role"] != "system")]

    def read() -> tuple[list[int]]:
        text = render(tokenizer, turns, generation=True)
        return (tokenizer(text, add_special_tokens=tokenizer.chat_template is None)["input_ids"],)

    return list(_kept(tokenizer, ("prompt", list(turns)), read)[0])


def reply_ids(tokenizer: PreTrainedTokenizerBase, turns: Turns, reply: Turns) -> tuple[list[int], list[int]]:
    """Token ids of the turns after a prompt, and their origins: the assistant's are the data set's, others' a tool's.

    Each assistant turn ends in the end-of-sequence token, which is trained; what a template adds after it is only read.

    Raises:
        ValueError: the template rewrites earlier turns, so that no text is the beginning of the next.
    """
    ids, origins = _kept(tokenizer, ("reply", list(turns), list(reply)), lambda: _reply_ids(tokenizer, turns, reply))
    return list(ids), list(origins)


def _reply_ids(tokenizer: PreTrainedTokenizerBase, turns: Turns, reply: Turns) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    origins: list[int] = []
    before = render(tokenizer, turns, generation=True)
    plain = tokenizer.chat_template is None
    for number, turn in enumerate(reply):
        written = turn["role"] == "assistant"
        last = number == len(reply) - 1
        after = (
            before + ("" if not ids else "\n") + turn["content"]
            if plain
            else render(tokenizer, [*turns, *reply[: number + 1]], generation=not written and not last)
        )
        if not after.startswith(before):
            raise ValueError(
                f"the chat template rewrites turn {number} of a reply when a later turn follows; "
                "split the conversation so that each row ends with its only assistant turn"
            )
        piece = list(tokenizer(after[len(before) :], add_special_tokens=False)["input_ids"])
        end = tokenizer.eos_token_id
        if written and end is not None:
            stop = piece.index(end) + 1 if end in piece else len(piece)
            tail = [] if last else piece[stop:]
            piece = piece[:stop] if end in piece else [*piece, end]
            ids += piece
            origins += [int(Origin.DATASET)] * len(piece)
            ids += tail
            origins += [int(Origin.TOOL)] * len(tail)
        else:
            ids += piece
            origins += [int(Origin.DATASET if written else Origin.TOOL)] * len(piece)
        before = after
    return ids, origins


def end_ids(tokenizer: PreTrainedTokenizerBase, model: Any) -> list[int]:
    """Every id that ends a completion: models often have several."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return sorted(end for end in ends if end is not None)
