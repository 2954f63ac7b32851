"""The state of a run on disk: JSON for what is plain, safetensors for what is a tensor. Nothing is pickled."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

NAME = "kullback_state"


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
    """What `save_state` wrote."""
    path = folder / f"{NAME}.safetensors"
    tensors = load_file(path) if path.is_file() else {}

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            if set(value) == {"__tensor__"}:
                return tensors[value["__tensor__"]]
            return {key: whole(item) for key, item in value.items()}
        return [whole(item) for item in value] if isinstance(value, list) else value

    state: dict[str, Any] = whole(json.loads((folder / f"{NAME}.json").read_text()))
    return state
