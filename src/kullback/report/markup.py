"""Small things that the parts of the page share: text and JSON made safe, looks, numbers, words."""

import html
import json
import math
from collections.abc import Iterable
from typing import Any

from kullback.report.style import Style
from kullback.run.directory import strict

TEXT_BUDGET = 1_200  # characters of a prompt or completion in the table of samples


def escape(value: Any) -> str:
    return html.escape(str(value), quote=True)


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can close the element or start another."""
    text = json.dumps(strict(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def look_of(look: Style, kind: str = "run") -> dict[str, Any]:
    return {"color": look.color, "dash": look.dash, "kind": None if kind == "run" else kind}


def swatch(look: Style, kind: str) -> str:
    return f'<span class="swatch" data-swatch="{escape(json.dumps(look_of(look, kind)))}"></span>'


def rounded(value: float, digits: int = 5) -> float | str | None:
    """For the page's JSON: so many significant digits; NaN is null, the infinities are "inf" and "-inf"."""
    if not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return float(f"{value:.{digits}g}")


def count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def join(words: Iterable[str]) -> str:
    words = list(words)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def cut(text: Any, more: str = " … ({characters:,} characters in samples.jsonl)") -> str:
    """Its first `TEXT_BUDGET` characters; `more` says what is missing."""
    text = "" if text is None else str(text)
    return text if len(text) <= TEXT_BUDGET else text[:TEXT_BUDGET] + more.format(characters=len(text))
