"""For mkdocstrings: the doctests of a docstring as code blocks."""

from itertools import groupby
from typing import Any

from griffe import Extension, Object


class Doctests(Extension):
    """Fence every run of lines from a `>>>` to the next empty line."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fence(obj.docstring.value)


def fence(text: str) -> str:
    """A docstring with its doctests inside ```pycon."""
    parts = ["\n".join(lines) for _, lines in groupby(text.splitlines(), key=lambda line: bool(line.strip()))]
    fenced = []
    for part in parts:
        lines = part.split("\n")
        start = next((i for i, line in enumerate(lines) if line.lstrip().startswith(">>>")), None)
        if start is None:
            fenced.append(part)
            continue
        indent = " " * (len(lines[start]) - len(lines[start].lstrip()))
        fenced.append("\n".join([*lines[:start], f"{indent}```pycon", *lines[start:], f"{indent}```"]))
    return "\n".join(fenced).rstrip("\n")
