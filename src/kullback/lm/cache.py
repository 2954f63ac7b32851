"""A teacher's likeliest tokens on disk: written as they are first needed, found again by every later run.

A cache is a directory of safetensors shards. Each shard has a small JSON file beside it, written last, with its
checksum; `manifest.json` says whose predictions these are, so that another teacher, tokenizer or k is refused.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from kullback.divergence import TopK
from kullback.lm.predictions import TopKPredictions
from kullback.lm.rollout import Rollout

TOKENS_PER_SHARD = 1 << 18
SCORES_KEPT = 1 << 26  # numbers in memory: 256 MiB in float32
PARTS = ("log_probs", "token_ids", "log_tail", "written")
log = logging.getLogger(__name__)


def row_key(prompt: list[int], completion: list[int], scored: list[int]) -> str:
    """What a row's predictions depend on: the prompt that is read, the completion, and which of its tokens count."""
    return hashlib.sha256(json.dumps([prompt, completion, scored]).encode()).hexdigest()[:32]


class ScoreCache:
    """Numbers per token that frozen players give to fixed text, kept in memory over the epochs of a run.

    Full at `most` tokens: what is there stays, since epochs come round in a circle.
    """

    def __init__(self, most: int = SCORES_KEPT) -> None:
        self._most, self._tokens = most, 0
        self._rows: dict[str, dict[str, Tensor]] = {}
        self._weights: dict[str, tuple[object, ...]] = {}

    def of(self, score: str, weights: tuple[object, ...]) -> dict[str, Tensor]:
        """A score's rows by key, read only; none if the weights that gave them are no longer these.

        After a resume the weights are taken for those that gave what was restored.
        """
        if self._weights.setdefault(score, weights) != weights:
            self._weights[score] = weights
            self._tokens -= sum(len(row) for row in self._rows.pop(score, {}).values())
        return self._rows.get(score, {})

    def add(self, score: str, key: str, values: Float[Tensor, "completion"]) -> None:
        """Keep a row, if there is room."""
        if self._tokens + len(values) <= self._most:
            self._rows.setdefault(score, {})[key] = values.clone()
            self._tokens += len(values)

    def state(self) -> dict[str, object]:
        """For a checkpoint, so that a resumed run reads the very same bits."""
        return {
            score: {
                "keys": list(rows),
                "lengths": [len(row) for row in rows.values()],
                "values": torch.cat(list(rows.values())),
            }
            for score, rows in self._rows.items()
        }

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from a checkpoint's state."""
        self._rows, self._weights, self._tokens = {}, {}, 0
        for score, found in state.items():
            parts = found["values"].to(device).split(found["lengths"])
            for key, values in zip(found["keys"], parts, strict=True):
                self.add(score, key, values)


class TopKCache:
    """A teacher's k likeliest tokens, the mass outside, and the written token's log-probability, for each scored token.

    Args:
        path: the directory, made if it is not there.
        teacher: name or path, as the recipe gives it.
        tokenizer: its fingerprint.
        top_k: how many tokens are kept at each position, sorted by probability.

    Raises:
        ValueError: the directory holds something else, belongs to another teacher, tokenizer or k, or a shard does not
            have the checksum that was written for it.
    """

    def __init__(self, path: str | Path, *, teacher: str, tokenizer: str, top_k: int, rank: int = 0) -> None:
        self.path, self.rank, self.top_k = Path(path), rank, top_k
        identity = {"format": 1, "teacher": teacher, "tokenizer": tokenizer, "top_k": top_k, "temperature": 1.0}
        manifest = self.path / "manifest.json"
        if manifest.is_file():
            self._check_identity(manifest, identity)
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(
                f"target.cache={str(path)!r} holds other files and no manifest.json: give an empty or a new directory"
            )
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            _write_atomically(manifest, json.dumps(identity, indent=1).encode())
        self._rows: dict[str, tuple[Tensor, ...]] = {}
        self._unsaved: list[str] = []
        self._unsaved_tokens = 0
        for side in sorted(self.path.glob("shard-*.json")):
            self._read_shard(side)
        for shard in self.path.glob("shard-*.safetensors"):
            if not shard.with_suffix(".json").is_file():
                log.warning("%s was not finished when it was written; its rows will be made again", shard)

    def _check_identity(self, manifest: Path, identity: dict[str, object]) -> None:
        try:
            found = json.loads(manifest.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(
                f"target.cache={str(self.path)!r}: manifest.json is damaged ({error}); delete the directory"
            ) from error
        for key, value in identity.items():
            if found.get(key) != value:
                raise ValueError(
                    f"target.cache={str(self.path)!r} was made with {key}={found.get(key)!r}, this run has {value!r}: "
                    "give each teacher, tokenizer and top_k a directory of its own"
                )

    def _read_shard(self, side: Path) -> None:
        shard = side.with_suffix(".safetensors")
        try:
            expected = json.loads(side.read_text())["sha256"]
            intact = shard.is_file() and hashlib.sha256(shard.read_bytes()).hexdigest() == expected
        except (json.JSONDecodeError, KeyError):
            intact = False
        if not intact:
            raise ValueError(
                f"target.cache: {shard} does not match its checksum; delete it and {side.name}, "
                "its rows will be made again"
            )
        tensors = load_file(shard)
        counts = tensors["counts"].tolist()
        keys = [bytes(line).hex() for line in tensors["keys"].tolist()]
        parts = (tensors[name].split(counts) for name in PARTS)
        self._rows.update(zip(keys, zip(*parts, strict=True), strict=True))

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self,
        key: str,
        log_probs: Float[Tensor, "scored k"],
        token_ids: Int[Tensor, "scored k"],
        log_tail: Float[Tensor, "scored"],
        written: Float[Tensor, "scored"],
    ) -> None:
        """Keep a row; a full shard is written at once."""
        self._rows[key] = (
            log_probs.float().cpu(),
            token_ids.int().cpu(),
            log_tail.float().cpu(),
            written.float().cpu(),
        )
        self._unsaved.append(key)
        self._unsaved_tokens += len(written)
        if self._unsaved_tokens >= TOKENS_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        """Write what is not on disk yet. A kill leaves either a whole shard or none that counts."""
        if not self._unsaved:
            return
        parts = zip(*(self._rows[key] for key in self._unsaved), strict=True)
        tensors = {name: torch.cat(part) for name, part in zip(PARTS, parts, strict=True)}
        tensors["counts"] = torch.tensor([len(self._rows[key][-1]) for key in self._unsaved])
        tensors["keys"] = torch.tensor([list(bytes.fromhex(key)) for key in self._unsaved], dtype=torch.uint8)
        name = hashlib.sha256("".join(self._unsaved).encode()).hexdigest()[:16]
        shard = self.path / f"shard-{name}.safetensors"
        temporary = shard.with_suffix(f".{os.getpid()}.tmp")
        save_file(tensors, temporary)
        os.replace(temporary, shard)
        digest = hashlib.sha256(shard.read_bytes()).hexdigest()
        _write_atomically(
            shard.with_suffix(".json"), json.dumps({"sha256": digest, "rows": len(self._unsaved)}).encode()
        )
        self._unsaved, self._unsaved_tokens = [], 0

    def predictions(self, keys: list[str], rollout: Rollout) -> TopKPredictions:
        """The rows of a rollout, as a loss reads them."""
        scored, device = rollout.scored, rollout.completions.device
        columns = zip(*(self._rows[key] for key in keys), strict=True)
        log_probs, token_ids, log_tail, written = (torch.cat(column).to(device) for column in columns)
        return TopKPredictions(
            scored, rollout.completions[scored], TopK(log_probs, token_ids.long(), log_tail), written
        )


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(f"{path.suffix}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
