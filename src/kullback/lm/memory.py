"""What a run will hold, before it starts."""

from typing import Any

from kullback.lm.predictions import LOGITS_PER_CHUNK


def forecast(model: Any, teacher: Any | None, *, rows: int, length: int, checkpointing: bool) -> dict[str, float]:
    """Bytes by purpose, from shapes alone.

    Activations are counted as 34 bytes per token, layer and unit of width at two bytes an entry (Korthikanti et al.,
    arXiv 2205.05198, without the attention matrix, which modern kernels do not keep); with checkpointing 2 bytes.

    Args:
        rows, length: of the largest micro-batch, in rows and tokens.
    """
    config = model.config.get_text_config()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    entry = next(model.parameters()).element_size()
    per_unit = (2 if checkpointing else 34) * entry / 2
    found = {
        "student weights": float(own),
        "gradients": float(trained * entry),
        "optimizer (two moments)": float(trained * entry * 2),
        "activations": float(rows * length * config.hidden_size * config.num_hidden_layers * per_unit),
        "logits, one chunk of each side": float(2 * 4 * min(LOGITS_PER_CHUNK, rows * length * config.vocab_size)),
    }
    if teacher is not None:
        found["teacher weights"] = float(sum(p.numel() * p.element_size() for p in teacher.parameters()))
    return found


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
