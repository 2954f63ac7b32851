"""The JSON schema of recipes, for editors: every key with its type, its default and what it means."""

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import BaseModel, TypeAdapter

from kullback.lm.method import Method, fields_of, find_method, methods
from kullback.lm.recipe import CONTROLLERS, SETTINGS

OPEN = {"student", "task"}  # their own modules check them
HEAD: dict[str, dict[str, Any]] = {
    "student": {
        "description": 'the model to train: a directory, a hub name, "embedded:student", or the sizes of a new one',
        "type": ["string", "object"],
    },
    "task": {
        "description": "the problems: reasoning_gym/NAME, a .jsonl or .parquet file, a hub name, or options",
        "type": ["string", "object"],
    },
    "output": {"description": "the run directory; default runs/NAME", "type": "string"},
}
SECTIONS: dict[str, str] = {
    "source": "whose text",
    "target": "match what",
    "signal": "which divergence, through which gradient",
    "weight": "how much each token counts",
    "schedule": 'what changes over time, such as signal.temperature: "linear(2 -> 1, steps=200)"',
    "train": "how long and how hard",
    "evaluate": "what is measured after the run, and by the probe during it",
    "compare": "what `kullback compare` varies",
}


def recipe_schema(method: str | None = None) -> dict[str, Any]:
    """Draft 2020-12. With a method, of its recipes alone; without, of all, each method's fields behind its name."""
    properties: dict[str, Any] = dict(HEAD)
    definitions: dict[str, Any] = {}
    for name, model in SETTINGS.items():
        properties[name] = {"description": SECTIONS[name], **_settings(model, definitions)}
    if method is not None:
        kind = find_method(method)
        properties = {
            "method": {"const": method, "description": (inspect.getdoc(kind) or "").split("\n")[0]}
        } | properties
        properties |= _questions(kind)
        rules: list[Any] = []
    else:
        known = methods()
        own = {"type": "string", "pattern": r"\.py(:\w+)?$", "description": "your own, as file.py:Class"}
        properties = {"method": {"anyOf": [{"enum": sorted(known)}, own]}} | properties
        properties |= {
            question: {"type": "object", "description": SECTIONS[question]} for question in _questions(Method)
        }
        rules = [
            {
                "if": {"properties": {"method": {"const": name}}, "required": ["method"]},
                "then": {"properties": _questions(kind)},
            }
            for name, kind in known.items()
        ]
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"kullback recipe{f' for {method}' if method else ''}",
        "type": "object",
        "required": ["method", "student", "task"],
        "additionalProperties": False,
        "properties": properties,
        "$defs": definitions,
    }
    return schema | ({"allOf": rules} if rules else {})


def field_notes(kind: type[Any]) -> dict[str, str]:
    """What the `Args:` of a method and of its bases say of each field."""
    notes: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        _, _, arguments = inspect.cleandoc(base.__doc__ or "").partition("\nArgs:\n")
        for names, text in re.findall(r"^    ([\w, ]+): (.*(?:\n {8,}.*)*)", arguments, re.MULTILINE):
            notes |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return notes


def type_text(kind: type[Any], name: str) -> str:
    """A field's type in a few words: "float", "exact, none or a whole number"."""
    schema = TypeAdapter(get_type_hints(kind)[name]).json_schema()
    return _type_words(schema)


def _type_words(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type_words(part) for part in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if schema.get("type") == "array":
        return f"list of {_type_words(schema.get('items', {}))}"
    words = {"number": "number", "integer": "whole number", "string": "text", "boolean": "true | false", "null": "null"}
    return words.get(str(schema.get("type")), "any")


def _questions(kind: type[Method]) -> dict[str, dict[str, Any]]:
    hints, notes = get_type_hints(kind), field_notes(kind)
    sections: dict[str, dict[str, Any]] = {}
    for question, fields in fields_of(kind).items():
        properties: dict[str, Any] = {}
        for name, item in fields.items():
            entry = TypeAdapter(hints[name]).json_schema()
            if name in notes:
                entry["description"] = notes[name]
            if item.default is not dataclasses.MISSING:
                entry["default"] = list(item.default) if isinstance(item.default, tuple) else item.default
            properties[name] = entry
        section: dict[str, Any] = {
            "type": ["object", "null"],
            "description": SECTIONS[question],
            "additionalProperties": False,
            "properties": properties,
        }
        if question == "schedule":
            section["patternProperties"] = {r"^(source|target|signal|weight)(\.|$)": {"type": ["string", "object"]}}
            properties |= {name: {"type": "object", "description": "a controller"} for name in CONTROLLERS}
        needed = [name for name, item in fields.items() if item.default is dataclasses.MISSING]
        sections[question] = section | ({"required": needed} if needed else {})
    return sections


def _settings(model: type[BaseModel], definitions: dict[str, Any]) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template="#/$defs/{model}")
    definitions |= schema.pop("$defs", {})
    # Settings explain themselves in comments, behind the value or behind its closing bracket.
    for name, note in re.findall(
        r"^    (\w+):(?:.*|.*\(\n        .*\n    \))  # (.+)$", inspect.getsource(model), re.MULTILINE
    ):
        schema["properties"][name]["description"] = note
    schema.pop("description", None)
    return schema | {"type": ["object", "null"]}
