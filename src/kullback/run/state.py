"""The state of a run on disk: JSON for what is plain, safetensors for what is a tensor. Nothing is pickled."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

NAME = "kullback_state"


class Saved(dict[str, Any]):
    """A mapping out of a checkpoint: to ask it for what is not there says so in a sentence."""

    def __init__(self, folder: Path, path: str, items: dict[str, Any]) -> None:
        super().__init__(items)
        self.folder, self.path = folder, path

    def __missing__(self, key: str) -> Any:
        raise ValueError(_unlike(self.folder, f"{self.path}{key}"))


def _unlike(folder: Path, what: str) -> str:
    return (
        f"checkpoint={str(folder)!r} has no {what!r}: another version of kullback, or another method, wrote it; resume "
        "with that one, or start over with another output or --overwrite"
    )


def save_state(state: dict[str, Any], folder: Path) -> None:
    """Write nested dictionaries, lists, numbers, texts and tensors; keys become texts, tuples lists."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value.detach().cpu().clone().contiguous()
            return {"__tensor__": path}
        if isinstance(value, dict):
            return {str(key): plain(item, f"{path}/{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item, f"{path}/{index}") for index, item in enumerate(value)]
        return value

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(state, ""))
    if tensors:
        save_file(tensors, folder / f"{NAME}.safetensors")
    temporary = folder / f"{NAME}.json.tmp"
    temporary.write_text(text)
    os.replace(temporary, folder / f"{NAME}.json")


def load_state(folder: Path) -> dict[str, Any]:
    """What `save_state` wrote.

    Raises:
        ValueError: nothing is there, or (when it is asked for) a key is missing: the checkpoint has an earlier layout.
    """
    text, path = folder / f"{NAME}.json", folder / f"{NAME}.safetensors"
    if not text.is_file():
        raise ValueError(_unlike(folder, text.name))
    tensors = Saved(folder, f"{path.name}:", load_file(path) if path.is_file() else {})

    def whole(value: Any, at: str) -> Any:
        if isinstance(value, dict):
            if set(value) == {"__tensor__"}:
                return tensors[value["__tensor__"]]
            return Saved(folder, at, {key: whole(item, f"{at}{key}/") for key, item in value.items()})
        return [whole(item, at) for item in value] if isinstance(value, list) else value

    state: dict[str, Any] = whole(json.loads(text.read_text()), "")
    return state
