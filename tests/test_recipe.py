"""Recipes: what they mean, what they refuse and in which words, and that a resolved one is the same plan again."""

import json
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kullback.lm.compare import parse_vary, split_values, variants
from kullback.lm.method import fields_of, find_method, methods
from kullback.lm.recipe import Recipe, make_plan, parse_override, read_recipe, shipped
from kullback.lm.recipe_schema import field_notes, recipe_schema
from kullback.run.controllers import Ramp

BASE = {
    "method": "on_policy_distillation",
    "student": "embedded:student",
    "task": "embedded:arithmetic",
    "target": {"teacher": "embedded:teacher"},
}


def plan_of(*overrides: str, **values):
    return make_plan(Recipe("test", {**BASE, **values}).override(map(parse_override, overrides)))


def test_every_method_has_a_recipe_of_its_name():
    assert set(methods()) <= set(shipped())
    assert {"quickstart", "full_scale_on_policy"} <= set(shipped())


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_resolves_and_loads_again_to_the_same_plan(name, tmp_path):
    plan = make_plan(read_recipe(name))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plan.recipe, sort_keys=False))
    again = make_plan(read_recipe(tmp_path))
    assert again.recipe == plan.recipe
    assert (again.method, again.train, again.evaluate, again.schedule) == (
        plan.method,
        plan.train,
        plan.evaluate,
        plan.schedule,
    )
    assert again.output == plan.output
    assert again.task.spec == plan.task.spec


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_begins_with_its_command(name):
    first = shipped()[name].read_text().splitlines()[0]
    command = re.fullmatch(r"# kullback (train|compare) (\S+)((?: \S+)*)", first)
    assert command, first
    assert command.group(2).removeprefix("recipes/").removesuffix(".yaml") == name
    make_plan(read_recipe(name).override(map(parse_override, command.group(3).split())))


def test_a_resolved_recipe_names_every_setting():
    plan = plan_of("schedule.signal.temperature=linear(2 -> 1, steps=10)", "train.lora.rank=4")
    for question, fields in fields_of(type(plan.method)).items():
        assert set(fields) <= set(plan.recipe.get(question, {})) or not fields
    assert plan.recipe["train"]["lora"]["rank"] == 4
    assert plan.recipe["schedule"] == {"signal.temperature": "linear(2 -> 1, steps=10)"}
    assert make_plan(Recipe("test", plan.recipe)).schedule == plan.schedule


def test_overrides_are_typed_and_reach_every_section():
    plan = plan_of(
        "train.learning_rate=1e-4",
        "train.trackers=[wandb, trackio]",
        "signal.divergence=0.7*forward_kl + 0.3*reverse_kl",
        "task.max_terms=4",
        "task.question={expression}",
        "output=elsewhere",
        "source.samples=3",
    )
    assert plan.train.learning_rate == 1e-4
    assert plan.train.trackers == ["wandb", "trackio"]
    assert plan.method.divergence == "0.7*forward_kl + 0.3*reverse_kl"
    assert plan.recipe["task"] == {"name": "embedded:arithmetic", "max_terms": 4, "question": "{expression}"}
    assert (str(plan.output), plan.method.samples) == ("elsewhere", 3)


def test_overriding_leaves_the_recipe_as_it_was():
    recipe = Recipe("test", {"train": {"steps": 3}})
    assert recipe.override([("train.steps", 4), ("train.seed", 1)]).values == {"train": {"steps": 4, "seed": 1}}
    assert recipe.values == {"train": {"steps": 3}}


def test_schedules():
    dotted = plan_of(schedule={"signal.temperature": "linear(2 -> 1, steps=4)"}).schedule
    assert dotted == (Ramp("signal.temperature", 2.0, 1.0, 4),)
    assert plan_of(schedule={"signal": {"temperature": "linear(2 -> 1, steps=4)"}}).schedule == dotted
    (gate,) = plan_of("schedule.entropy_gate={lengths: [8, 16], minimum_entropy: 0.2}").schedule
    assert (gate.lengths, gate.minimum_entropy, gate.writes) == ((8, 16), 0.2, ("source.max_completion",))


# what is written, and what the sentence must say: the field and its value, and what to do
BAD = {
    "method=on_policy_distilation": ["method='on_policy_distilation'", "did you mean on_policy_distillation"],
    "task=reasoning_gym/chain_sumz": ["task='reasoning_gym/chain_sumz'", "did you mean reasoning_gym/chain_sum"],
    "task.max_termz=4": ["task.max_termz=4", "did you mean max_terms"],
    "student=": ["student=None", "name the model to train"],
    "target.teacher=": ["target.teacher=None", "write target.teacher=embedded:teacher"],
    "signal.divergence=forward_lk": ['signal.divergence="forward_lk"', "did you mean forward_kl"],
    "signal.divergence=jsd(1.5)": ['signal.divergence="jsd(1.5)"', "beta must be in (0, 1)"],
    "signal.divergence=jsd(0)": ["jsd(0)", "did you mean unit(jsd(0))"],
    "signal.divergance=tv": ["signal.divergance='tv'", "did you mean signal.divergence"],
    "signal.student_fraction=1": ["wrong section", "write source.student_fraction"],
    "divergence=tv": ["wrong section", "write signal.divergence"],
    "steps=3": ["steps=3", "write train.steps"],
    "trian.steps=3": ["trian=", "did you mean train"],
    "train.stepz=3": ["train.stepz=3", "did you mean train.steps"],
    "train.steps=0": ["train.steps=0", "greater than 0"],
    "train.padding=rigth": ["train.padding='rigth'", "did you mean right"],
    "train.trackers=wandb": ["train.trackers='wandb'", "write [wandb]"],
    "train.lora.rnk=8": ["train.lora.rnk=8", "did you mean train.lora.rank"],
    "train.lora.rank=x": ["train.lora.rank='x'", "integer"],
    "evaluate.temprature=1": ["evaluate.temprature=1", "did you mean evaluate.temperature"],
    "source=3": ["source=3", "mapping"],
    "source.samples.x=3": ["source.samples={'x': 3}", "integer"],
    "student.x=3": ["student.x=3", "no keys"],
    "source.otherwise=teachr": ["source.otherwise='teachr'", "did you mean teacher"],
    "source.student_fraction=3": ["source.student_fraction=3", "between 0 and 1"],
    "source.max_completion_length=3": ["did you mean source.max_completion"],
    "signal.beta=0.3": ["signal.beta=0.3", "a field of gkd"],
    "signal.temperature=hot": ["signal.temperature='hot'", "number"],
    "signal.temperature=linear(2 -> 1, steps=3)": ["write schedule.signal.temperature"],
    "schedule.temperature=linear(2 -> 1, steps=3)": ["signal.temperature: ..."],
    "schedule.signal.temprature=linear(2 -> 1, steps=3)": ["did you mean schedule.signal.temperature"],
    "schedule.signal.temperature=slowly": ["schedule.signal.temperature='slowly'", "linear(2.0 -> 1.0, steps=200)"],
    "schedule.source.student_fraction=linear(2 -> 1, steps=3)": ["source.student_fraction=2", "between 0 and 1"],
    "schedule.source.otherwise=linear(2 -> 1, steps=3)": ["only numbers change over time"],
    "schedule.entropy_gate={length: [8]}": ["did you mean schedule.entropy_gate.lengths"],
    "schedule.entropy_gate=3": ["schedule.entropy_gate=3", "mapping of lengths"],
    "compare.vary=3": ["compare.vary=3", "dictionary"],
    "output=3": ["output=3", "directory"],
}


@pytest.mark.parametrize("override", BAD)
def test_bad_input_is_one_sentence_with_the_fix(override):
    with pytest.raises(ValueError) as caught:
        plan_of(override)
    message = str(caught.value)
    assert "\n" not in message
    for part in BAD[override]:
        assert part in message


def test_two_controllers_may_not_set_one_field():
    with pytest.raises(ValueError, match=r"would both set source\.max_completion"):
        plan_of(
            "schedule.entropy_gate={lengths: [8, 16], minimum_entropy: 0.2}",
            "schedule.source.max_completion=linear(8 -> 16, steps=3)",
        )


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("method: [", "line 1"),
        ("just words", "holds no keys"),
        ("train: {steps: 1}\ntrain: {steps: 2}", "'train' stands there twice"),
        ("train: {steps: 1, steps: 2}", "'steps' stands there twice"),
    ],
)
def test_unreadable_recipes(text, part, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(part)) as caught:
        read_recipe(path)
    assert "mine.yaml" in str(caught.value)


def test_recipes_are_found_by_name_path_and_run_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # as after installing the wheel: no clone around
    assert read_recipe("quickstart").values == read_recipe("recipes/quickstart.yaml").values
    with pytest.raises(ValueError, match="did you mean quickstart"):
        read_recipe("quickstrat")
    with pytest.raises(ValueError, match="there is no such file; give a file"):
        read_recipe("mine/recipe.yaml")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "recipe.yaml").write_text("method: sft")
    assert read_recipe("runs/a") == Recipe("a", {"method": "sft"})


@pytest.mark.parametrize("text", ["steps", "=3", "train steps=3"])
def test_what_is_no_override(text):
    with pytest.raises(ValueError, match="write key=value"):
        parse_override(text)


# Comparisons

PLAIN = st.text("abz019._- ", min_size=1, max_size=6).map(str.strip).filter(bool)
VALUE = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.tuples(PLAIN, st.lists(inner, min_size=1, max_size=3)).map(lambda pair: f"{pair[0]}({', '.join(pair[1])})"),
        st.lists(inner, min_size=1, max_size=3).map(lambda items: f"[{','.join(items)}]"),
        PLAIN.map(lambda text: f'"{text},("'),
    ),
    max_leaves=6,
)


@given(values=st.lists(VALUE, min_size=1, max_size=5), gap=st.sampled_from([",", ", ", " , "]))
def test_values_split_at_their_own_commas_only(values, gap):
    assert split_values(gap.join(values)) == values


@pytest.mark.parametrize("text", ["a,", ",a", "a,,b", "f(a, b", "'a", ""])
def test_what_does_not_split(text):
    with pytest.raises(ValueError, match="vary="):
        split_values(text)


def test_varied_values_are_read_as_yaml():
    assert parse_vary("signal.divergence=tv,skew(forward_kl, 0.1)") == (
        "signal.divergence",
        ["tv", "skew(forward_kl, 0.1)"],
    )
    assert parse_vary("schedule.lengths=[8,16],[16]")[1] == [[8, 16], [16]]
    assert parse_vary("train.seed=0,1")[1] == [0, 1]
    with pytest.raises(ValueError, match="write key=a,b"):
        parse_vary("train.seed")


def test_variants_are_the_product_with_labels_and_directories_of_their_own(tmp_path):
    recipe = read_recipe("quickstart")
    vary = {"signal.divergence": ["tv", "unit(jsd(0.5))"], "train.seed": [0, 1]}
    found = variants(recipe, vary, tmp_path, {"train.seed": {"0": "first"}})
    assert [variant.label for variant in found] == [
        "tv, first",
        "tv, seed=1",
        "unit(jsd(0.5)), first",
        "unit(jsd(0.5)), seed=1",
    ]
    assert len({variant.directory for variant in found}) == 4
    plans = [make_plan(variant.recipe) for variant in found]
    assert [(plan.method.divergence, plan.train.seed) for plan in plans] == [
        (d, s) for d in vary["signal.divergence"] for s in (0, 1)
    ]
    assert [plan.output for plan in plans] == [tmp_path / variant.directory for variant in found]
    assert all("compare" not in plan.recipe for plan in plans)


def test_equal_names_get_different_directories(tmp_path):
    found = variants(read_recipe("quickstart"), {"student": ["a/b", "a b"]}, tmp_path)
    assert [variant.directory for variant in found] == ["a-b", "a-b-2"]


def test_nothing_or_the_same_varied_is_refused(tmp_path):
    for vary, part in (({}, "nothing is compared"), ({"a": []}, "at least one"), ({"a": [1, 1]}, "twice")):
        with pytest.raises(ValueError, match=part):
            variants(read_recipe("quickstart"), vary, tmp_path)


# The schema


def references(node):
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


@pytest.mark.parametrize("method", [None, *methods()])
def test_the_schema_is_json_and_whole(method):
    schema = json.loads(json.dumps(recipe_schema(method), allow_nan=False))
    for reference in references(schema):
        assert reference.removeprefix("#/$defs/") in schema["$defs"]
    assert schema["required"] == ["method", "student", "task"]
    assert schema["properties"]["train"]["properties"]["steps"]["description"] == "optimiser steps"


@pytest.mark.parametrize("name", shipped())
def test_the_schema_knows_every_key_of_every_resolved_recipe(name):
    recipe = make_plan(read_recipe(name)).recipe
    schema = recipe_schema(recipe["method"])
    assert set(recipe) <= set(schema["properties"])
    for section, values in recipe.items():
        if isinstance(values, dict) and section not in ("student", "task"):
            known = schema["properties"][section]
            patterns = known.get("patternProperties", {})
            assert all(key in known["properties"] or any(re.search(p, key) for p in patterns) for key in values)


def test_the_schema_of_all_methods_has_a_rule_for_each():
    rules = recipe_schema()["allOf"]
    assert [rule["if"]["properties"]["method"]["const"] for rule in rules] == list(methods())
    gkd = next(rule for rule in rules if rule["if"]["properties"]["method"]["const"] == "gkd")
    assert "beta" in gkd["then"]["properties"]["signal"]["properties"]
    assert gkd["then"]["properties"]["target"]["required"] == ["teacher"]


@pytest.mark.parametrize("name", methods())
def test_every_field_of_every_method_is_explained(name):
    kind = find_method(name)
    notes = field_notes(kind)
    assert [field for fields in fields_of(kind).values() for field in fields if not notes.get(field)] == []
