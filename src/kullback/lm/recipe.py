"""Recipes: a run written as YAML, checked key by key, and turned into a `Plan`.

    method, student, task                        what is trained, with what, on what
    source, target, signal, weight, schedule     the method's fields, each under the question it answers
    train, evaluate, output                      how long, how it is graded, where it goes
    compare                                      what `kullback compare` varies

Whatever a recipe does not say keeps its default. Every complaint is a `ValueError` of one sentence that names the
field, its value and the fix, and comes before any model is loaded.
"""

import copy
import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from kullback.divergence import divergence
from kullback.lm.method import QUESTIONS, Method, fields_of, find_method, methods
from kullback.lm.plan import Plan
from kullback.lm.settings import EvaluateSettings, LoraSettings, Settings, TrainSettings
from kullback.lm.tasks import load_task
from kullback.run.controllers import Controller, Ramp, parse_schedule

# Controllers that a recipe names under `schedule`, with their fields: entropy_gate: {lengths: [16, 32], ...}
CONTROLLERS = {"entropy_gate": "kullback.lm.schedules:EntropyGate"}


class CompareSettings(Settings):
    """The `compare:` section of a recipe."""

    vary: dict[str, list[Any]]  # keys of the recipe and the values to try; every combination is run
    labels: dict[str, dict[str, str]] = Field({})  # what to call a value: {source.student_fraction: {0: off-policy}}


SETTINGS: dict[str, type[BaseModel]] = {
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
    "compare": CompareSettings,
}
KEYS = ("method", "student", "task", *QUESTIONS, "train", "evaluate", "output", "compare")


@dataclass(frozen=True)
class Recipe:
    """A recipe as written, with what was overridden; nothing in it is checked yet.

    Args:
        name: names the run where no `output` is given.
    """

    name: str
    values: dict[str, Any] = field(default_factory=dict)

    def override(self, changes: Iterable[tuple[str, Any]]) -> "Recipe":
        """A recipe with dotted keys set: [("signal.divergence", "hellinger")]."""
        values = copy.deepcopy(self.values)
        for key, value in changes:
            _set(values, key, value)
        return Recipe(self.name, values)


def shipped() -> dict[str, Path]:
    """The recipes that come with kullback, by name."""
    folder = Path(str(files("kullback") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_recipe(name: str | Path) -> Recipe:
    """The recipe in a file, in a run directory, or of a name that kullback ships ("quickstart").

    Raises:
        ValueError: there is none, it is not YAML, or it has a key twice.
    """
    path = Path(name)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    elif not path.is_file():
        path = _shipped(str(name))
    text = path.read_text(encoding="utf-8")
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe={str(name)!r} is not readable as YAML: {_yaml_problem(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"recipe={str(name)!r} holds no keys; it needs at least {', '.join(KEYS[:3])}")
    return Recipe(path.stem if path.name != "recipe.yaml" else path.resolve().parent.name, values)


def _shipped(name: str) -> Path:
    known = shipped()
    # "recipes/quickstart.yaml", as the documentation writes it, also means the shipped one where no clone is around.
    stem = name.removeprefix("recipes/").removesuffix(".yaml")
    if stem in known:
        return known[stem]
    if "/" not in stem:
        near = get_close_matches(stem, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"kullback ships {', '.join(known)}"
    else:
        hint = f"give a file, a run directory, or one that kullback ships: {', '.join(known)}"
    raise ValueError(f"recipe={name!r}: there is no such file; {hint}")


def parse_override(text: str) -> tuple[str, Any]:
    """ "signal.temperature=2" as ("signal.temperature", 2): the value is read as YAML.

    Raises:
        ValueError: there is no "=" or no key, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.-]+", key.strip()):
        raise ValueError(f"{text!r} is no setting; write key=value, for example train.steps=100")
    return key.strip(), parse_value(value, key)


def parse_value(text: str, key: str) -> Any:
    """A value as YAML reads it; text that only looks like a mapping ("{expression}", a template) stays text."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{key}={text!r} is not readable as YAML: {_yaml_problem(error)}; put it in quotes") from error
    if isinstance(value, dict) and all(item is None for item in value.values()):
        return text
    return value


# From keys to a plan


def make_plan(recipe: Recipe) -> Plan:
    """Check everything that can be checked without loading a model; the plan's `recipe` has every default filled in.

    Raises:
        ValueError: the first thing that is wrong.
    """
    values = recipe.values
    if not isinstance(values.get("method"), str):
        near = ", ".join(sorted(methods()))
        raise ValueError(
            f"method={values.get('method')!r}: name the method, one of {near}, or your own as file.py:Class"
        )
    kind = find_method(values["method"])
    known: dict[str, list[str]] = {question: list(fields) for question, fields in fields_of(kind).items()}
    _check_keys(values, kind, known)
    schedule = _flat_schedule(values.get("schedule") or {})
    answers = {name: value for question in QUESTIONS[:-1] for name, value in (values.get(question) or {}).items()}
    answers |= {name: value for name, value in schedule.items() if name in known["schedule"]}
    _check_needed(values, kind, answers)
    method = _make_method(kind, answers)
    controllers = _controllers(schedule, method, answers)
    train = _settings("train", values)
    evaluate = _settings("evaluate", values)
    if values.get("compare") is not None:
        _settings("compare", values)
    output = values.get("output") or f"runs/{recipe.name}"
    if not isinstance(output, str):
        raise ValueError(f"output={output!r} should be the path of a directory")
    task = load_task(values["task"], seed=train.seed)
    plan = Plan(method, values["student"], task, Path(output), None, train, evaluate, tuple(controllers))
    plan.recipe = _resolved(plan, values, schedule, output)
    return plan


def _resolved(plan: Plan, values: dict[str, Any], schedule: dict[str, Any], output: str) -> dict[str, Any]:
    sections: dict[str, Any] = {}
    for question, names in fields_of(type(plan.method)).items():
        sections[question] = {name: _plain(getattr(plan.method, name)) for name in names}
    sections["schedule"] |= {name: value for name, value in schedule.items() if name not in sections["schedule"]}
    return {
        "method": values["method"],
        "student": values["student"],
        "task": values["task"],
        **{question: answers for question, answers in sections.items() if answers},
        "train": plan.train.model_dump(),
        "evaluate": plan.evaluate.model_dump(),
        "output": output,
    }


def _check_keys(values: Mapping[str, Any], kind: type[Method], known: Mapping[str, list[str]]) -> None:
    """Every key stands where it belongs."""
    sections: dict[str, Collection[str]] = {
        **known,
        **{name: list(model.model_fields) for name, model in SETTINGS.items()},
    }
    for section, value in values.items():
        if section not in KEYS:
            raise ValueError(_unknown("", str(section), value, kind, sections))
        if section not in sections or value is None:
            continue
        if not isinstance(value, Mapping):
            example = f"{section}: {{{next(iter(sections[section]), 'key')}: ...}}"
            raise ValueError(f"{section}={value!r} should be a mapping of its keys, such as {example}")
        for key, item in value.items():
            if key not in sections[section] and section != "schedule":
                raise ValueError(_unknown(section, str(key), item, kind, sections))
    lora = (values.get("train") or {}).get("lora")
    for key, item in lora.items() if isinstance(lora, Mapping) else ():
        if key not in LoraSettings.model_fields:
            raise ValueError(
                _no_such(f"train.lora.{key}", item, "train.lora", str(key), list(LoraSettings.model_fields))
            )
    for key, item in _flat_schedule(values.get("schedule") or {}).items():
        places = [f"{question}.{name}" for question in QUESTIONS for name in known[question]]
        if key in known["schedule"] or key in CONTROLLERS or key in places:
            continue
        inside = [place for place in places if place.endswith(f".{key}")]
        if inside:
            raise ValueError(
                f"schedule.{key}={item!r}: name the field with its section: schedule: {{{inside[0]}: ...}}"
            )
        raise ValueError(
            _no_such(f"schedule.{key}", item, "schedule", key, [*known["schedule"], *CONTROLLERS, *places])
        )


def _unknown(section: str, key: str, value: Any, kind: type[Method], sections: Mapping[str, Collection[str]]) -> str:
    """What to say of a key that is wrong: where it belongs, what it may be a slip for, or which there are."""
    where = f"{section}.{key}" if section else key
    last = key.rpartition(".")[2]
    owners = [f"{name}.{last}" for name, keys in sections.items() if last in keys]
    if owners:
        return f"{where}={value!r} stands under the wrong section: write {' or '.join(owners)}"
    same = list(sections[section]) if section else [*KEYS]
    if not get_close_matches(key, same, n=1, cutoff=0.75):
        others = [
            name
            for name, other in methods().items()
            if other is not kind and any(last in fields for fields in fields_of(other).values())
        ]
        if others:
            return f"{where}={value!r}: {kind.__name__} has no {last}; it is a field of {', '.join(others)}"
    everywhere = [f"{name}.{item}" for name, keys in sections.items() for item in keys]
    return _no_such(where, value, section, key, same, [*everywhere, *KEYS])


def _no_such(where: str, value: Any, section: str, key: str, same: list[str], everywhere: Collection[str] = ()) -> str:
    near = get_close_matches(key, same, n=3, cutoff=0.6)
    if near and section:
        near = [f"{section}.{name}" for name in near]
    near = near or get_close_matches(where, everywhere, n=2, cutoff=0.7)
    shown = f"did you mean {' or '.join(near)}?" if near else f"there {_are(same)} {', '.join(same) or 'none'}"
    return f"{where}={value!r}: there is no such key; {shown}"


def _are(names: Collection[str]) -> str:
    return "is" if len(names) < 2 else "are"


def _check_needed(values: Mapping[str, Any], kind: type[Method], answers: Mapping[str, Any]) -> None:
    student, task = values.get("student"), values.get("task")
    if not student or not isinstance(student, str | Mapping):
        raise ValueError(
            f"student={student!r}: name the model to train: a directory, a hub name, embedded:student, "
            "or the sizes of a new one"
        )
    if not task:
        raise ValueError(
            f"task={task!r}: name the problems to train on, for example reasoning_gym/chain_sum or data/train.jsonl"
        )
    for question, fields in fields_of(kind).items():
        for name, item in fields.items():
            if (
                item.default is dataclasses.MISSING
                and item.default_factory is dataclasses.MISSING
                and not answers.get(name)
            ):
                example = "embedded:teacher" if name == "teacher" else "..."
                where = f"{question}.{name}"
                raise ValueError(f"{where}={answers.get(name)!r}: {values['method']} needs it; write {where}={example}")


def _make_method(kind: type[Method], answers: Mapping[str, Any]) -> Method:
    places = {name: f"{question}.{name}" for question, fields in fields_of(kind).items() for name in fields}
    try:
        method = TypeAdapter(kind).validate_python(dict(answers))
    except ValidationError as error:
        raise ValueError(sentence(error, answers, lambda name: places.get(name, name))) from error
    for name, place in places.items():
        value = getattr(method, name)
        if place.startswith("signal.") and name.endswith("divergence") and isinstance(value, str):
            try:
                divergence(value)
            except ValueError as error:
                reason = str(error)
                raise ValueError(
                    f"signal.{reason}" if reason.startswith("divergence=") else f"{place}={value!r}: {reason}"
                ) from error
    return method


def _settings(section: str, values: Mapping[str, Any]) -> Any:
    given = values.get(section) or {}
    if section == "compare" and isinstance(given.get("labels"), Mapping):
        given = {**given, "labels": _text_keys(given["labels"])}
    try:
        return SETTINGS[section].model_validate(given)
    except ValidationError as error:
        raise ValueError(sentence(error, given, lambda name: f"{section}.{name}")) from error


def compare_settings(recipe: Recipe) -> CompareSettings:
    """The `compare:` section, empty where there is none."""
    if recipe.values.get("compare") is None:
        return CompareSettings(vary={}, labels={})
    return cast(CompareSettings, _settings("compare", recipe.values))


# What changes over time


def _flat_schedule(section: Mapping[str, Any]) -> dict[str, Any]:
    """{"signal": {"temperature": x}} means {"signal.temperature": x}."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if key in QUESTIONS and isinstance(value, Mapping):
            flat |= {f"{key}.{name}": item for name, item in value.items()}
        else:
            flat[str(key)] = value
    return flat


def _controllers(schedule: Mapping[str, Any], method: Method, answers: Mapping[str, Any]) -> list[Controller]:
    found: list[Controller] = []
    for key, value in schedule.items():
        if key in CONTROLLERS:
            found.append(_named_controller(key, value))
        elif "." in key:
            found.append(_ramp(key, value, method, answers))
    owner: dict[str, str] = {}
    for controller in [*method.schedule(), *found]:
        for name in controller.writes:
            if name in owner:
                raise ValueError(
                    f"schedule: {owner[name]} and {controller} would both set {name}; leave one of them out"
                )
            owner[name] = str(controller)
    return found


def _ramp(key: str, value: Any, method: Method, answers: Mapping[str, Any]) -> Ramp:
    name = key.partition(".")[2]
    now = getattr(method, name)
    if isinstance(now, bool) or not isinstance(now, int | float):
        raise ValueError(f"schedule.{key}={value!r}: only numbers change over time, and {key} is {now!r}")
    if not isinstance(value, str):
        raise ValueError(f'schedule.{key}={value!r}: write how it changes, such as "linear(2.0 -> 1.0, steps=200)"')
    ramp = parse_schedule(key, value)
    for end in (ramp.first, ramp.last):  # what __post_init__ refuses must not wait for step 200
        _make_method(type(method), {**answers, name: round(end) if isinstance(now, int) else end})
    return ramp


def _named_controller(key: str, value: Any) -> Controller:
    module, _, name = CONTROLLERS[key].partition(":")
    kind = getattr(import_module(module), name)
    own = [item.name for item in dataclasses.fields(kind) if item.name not in ("reads", "writes", "when")]
    if not isinstance(value, Mapping):
        raise ValueError(f"schedule.{key}={value!r} should be a mapping of {', '.join(own)}")
    for item in value:
        if item not in own:
            raise ValueError(_no_such(f"schedule.{key}.{item}", value[item], f"schedule.{key}", str(item), own))
    try:
        return cast(Controller, TypeAdapter(kind).validate_python(dict(value)))
    except ValidationError as error:
        raise ValueError(sentence(error, value, lambda item: f"schedule.{key}.{item}")) from error


# Sentences


def sentence(error: ValidationError, given: Mapping[str, Any], place: Callable[[str], str]) -> str:
    """The first complaint of pydantic's, as "signal.temperature='hot' should be a valid number".

    Args:
        given: what was validated.
        place: from the name of a field to what a recipe calls it.
    """
    details = error.errors()
    first = details[0]
    if first["type"] == "value_error" and "ctx" in first:
        own = str(first["ctx"]["error"])
        if "=" in own.split(" ")[0]:  # a check of ours, which names its field already
            return own
        return f"{place(str(first['loc'][0]))}: {own}" if first["loc"] else own
    path, value = _walk(first["loc"], given)
    where = place(".".join(path))
    if first["type"] == "missing":
        return f"{where} is needed; write {where}=..."
    reasons = [item["msg"] for item in details if _walk(item["loc"], given)[0] == path]
    reasons = [reason.removeprefix("Input should be ").partition(", unable")[0] for reason in reasons]
    text = f"{where}={value!r} should be {' or '.join(dict.fromkeys(reasons))}"
    choices = re.findall(r"'([^']+)'", " ".join(reasons))
    near = get_close_matches(str(value), choices, n=1, cutoff=0.6)
    if near:
        text += f"; did you mean {near[0]}?"
    elif "a valid list" in reasons:
        text += f"; write [{value}]"
    elif isinstance(value, str) and "->" in value:
        text += f"; to change it over time write schedule.{where}"
    return text


def _walk(location: tuple[int | str, ...], given: Any) -> tuple[list[str], Any]:
    """The part of pydantic's location that is in the data (it names branches of unions too), and the value there."""
    path: list[str] = []
    for index, part in enumerate(location):
        if isinstance(given, Mapping) and (part in given or index == 0):
            given = given.get(part)
        elif isinstance(given, list) and isinstance(part, int):
            given = given[part]
        else:
            break
        path.append(str(part))
    return path, given


# YAML


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number and a key that stands twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", key_node.start_mark
                )
            if isinstance(key, str | int | float):
                seen.add(key)
        return cast(dict[Any, Any], super().construct_mapping(node, deep=deep))


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(problem)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    parts = key.split(".")
    if parts[0] == "schedule" and len(parts) == 3 and parts[1] in QUESTIONS:
        parts = ["schedule", f"{parts[1]}.{parts[2]}"]  # a field that changes over time, not a mapping
    if parts[0] == "compare" and len(parts) > 2:
        parts = ["compare", parts[1], ".".join(parts[2:])]
    if parts[0] == "task" and len(parts) == 2 and isinstance(values.get("task"), str):
        values["task"] = {"name": values["task"]}
    here = values
    for depth, part in enumerate(parts[:-1]):
        if here.get(part) is None:
            here[part] = {}
        if not isinstance(here[part], dict):
            inner = ".".join(parts[: depth + 1])
            raise ValueError(f"{key}={value!r}: {inner} is {here[part]!r}, which has no keys; set {inner} itself")
        here = here[part]
    here[parts[-1]] = value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _text_keys(labels: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        str(key): {str(value): label for value, label in names.items()} if isinstance(names, Mapping) else names
        for key, names in labels.items()
    }
