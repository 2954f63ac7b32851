"""What a run will hold, before it starts."""

from collections.abc import Mapping
from typing import Any

from kullback.lm.players import Lazy
from kullback.lm.predictions import LOGITS_PER_CHUNK


def forecast(players: Mapping[str, Any], *, rows: int, length: int, checkpointing: bool) -> dict[str, float]:
    """Bytes by purpose, from shapes alone.

    Weights that two players share count once: a reference that is the student without its adapters costs nothing. What
    is trained beside the student (a value head) is among its weights. A player that is not loaded is not counted.
    Activations are counted as 34 bytes per token, layer and unit of width at two bytes an entry (Korthikanti et al.,
    arXiv 2205.05198, without the attention matrix, which modern kernels do not keep); with checkpointing 2 bytes.

    Args:
        players: by name, "student" among them.
        rows, length: of the largest micro-batch, in rows and tokens.
    """
    student = players["student"]
    config, entry = student.config.get_text_config(), next(student.parameters()).element_size()
    trained = sum(p.numel() * p.element_size() for p in student.parameters() if p.requires_grad)
    per_unit = (2 if checkpointing else 34) * entry / 2
    counted: set[int] = set()
    found: dict[str, float] = {}
    for name, player in sorted(players.items(), key=lambda item: item[0] != "student"):
        model = player.loaded if isinstance(player, Lazy) else player
        own = {} if model is None else {id(p): p.numel() * p.element_size() for p in model.parameters()}
        if size := sum(own[key] for key in own.keys() - counted):
            found[f"{name} weights"] = float(size)
        counted |= own.keys()
    return found | {
        "gradients": float(trained),
        "optimizer (two moments)": float(2 * trained),
        "activations": float(rows * length * config.hidden_size * config.num_hidden_layers * per_unit),
        "logits, one chunk of each side": float(2 * 4 * min(LOGITS_PER_CHUNK, rows * length * config.vocab_size)),
    }


def say(found: dict[str, float]) -> str:
    """One line: the sum, then its parts, largest first."""
    parts = ", ".join(f"{name} {_size(size)}" for name, size in sorted(found.items(), key=lambda item: -item[1]))
    return f"memory, about {_size(sum(found.values()))}: {parts}"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"
