"""The methods as data: what each does, whose text it trains on, and its fields, read from their own files."""

import dataclasses
import inspect
import re
import sys
from typing import Any

from kullback.lm.method import Method, fields_of, find_method, methods
from kullback.lm.recipe_schema import field_notes, type_text


def describe_methods() -> list[dict[str, str]]:
    """A row for each method: name, what it does, whose text, the fields that are its own, where it comes from."""
    rows = []
    for name, kind in methods().items():
        own = [
            f"{question}.{field}"
            for question, fields in fields_of(kind).items()
            for field in fields
            if _is_own(kind, field)
        ]
        rows.append(
            {
                "name": name,
                "what": _first_line(kind),
                "text": _example(kind).source().says,
                "own": ", ".join(own),
                "paper": _source(kind),
            }
        )
    return rows


def describe_method(name: str) -> dict[str, Any]:
    """One method: the documentation of its file, and its fields as a recipe names them.

    Raises:
        ValueError: there is no such method, with the nearest names.
    """
    kind = find_method(name)
    notes = field_notes(kind)
    return {
        "name": name,
        "what": _first_line(kind),
        "documentation": inspect.getdoc(sys.modules.get(kind.__module__)) or inspect.getdoc(kind) or "",
        "fields": [
            {
                "key": f"{question}.{field}",
                "needed": item.default is dataclasses.MISSING,
                "default": None if item.default is dataclasses.MISSING else item.default,
                "type": type_text(kind, field),
                "meaning": notes.get(field, ""),
            }
            for question, fields in fields_of(kind).items()
            for field, item in fields.items()
        ],
    }


def _is_own(kind: type[Method], field: str) -> bool:
    return field in inspect.get_annotations(kind)


def _first_line(kind: type[Method]) -> str:
    return (inspect.getdoc(kind) or "").split("\n")[0]


def _source(kind: type[Method]) -> str:
    text = inspect.getdoc(sys.modules.get(kind.__module__)) or ""
    found = re.search(r"arXiv (\d{4}\.\d{4,5})", text)
    return found.group(1) if found else ""


def _example(kind: type[Method]) -> Method:
    """An instance with every default; what has none is named after itself."""
    needed: dict[str, Any] = {
        item.name: item.name for item in dataclasses.fields(kind) if item.default is dataclasses.MISSING
    }
    return kind(**needed)
