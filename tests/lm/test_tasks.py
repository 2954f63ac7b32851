"""Tasks: deterministic, disjoint, and clear about what is wrong with a file or an option."""

import json
import math

import datasets
import pytest

from kullback.lm import worked
from kullback.lm.tasks import PRESETS, load_task

SMALL = {"name": "embedded:arithmetic", "size": 200, "held_out": 50}
ROWS = [{"prompt": f"What is {i} + {i}?", "completion": f"It is {2 * i}.", "answer": str(2 * i)} for i in range(40)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(problems):
    return [problem.metadata["question"] for problem in problems]


# Procedural tasks


def test_the_same_seed_gives_the_same_problems_in_any_order():
    one, other = load_task(SMALL, seed=3), load_task(SMALL, seed=3)
    backwards = [other.train[i] for i in reversed(range(200))][::-1]
    assert list(one.train) == backwards
    assert list(one.held_out) == list(other.held_out)
    assert questions(one.train) != questions(load_task(SMALL, seed=4).train)


def test_no_held_out_question_is_ever_trained_on():
    """For every pair of seeds and sizes: a teacher's training problems must not be a student's held-out ones."""
    small_space = {**SMALL, "min_terms": 3, "max_terms": 3, "max_digits": 1, "size": 3000}
    trained = set(questions(load_task(small_space, seed=0).train)) | set(
        questions(load_task(small_space, seed=1).train)
    )
    held = questions(load_task({**small_space, "held_out": 400}, seed=2).held_out)
    assert len(set(held)) == 400
    assert len(trained) > 2000  # of 4,000 questions: a fifth is held out
    assert not trained & set(held)


def test_held_out_problems_do_not_depend_on_the_seed():
    assert list(load_task(SMALL, seed=0).held_out) == list(load_task(SMALL, seed=1).held_out)


def test_more_held_out_problems_extend_the_fewer():
    fewer, more = (load_task({**SMALL, "held_out": n}, seed=0).held_out for n in (10, 50))
    assert list(fewer) == list(more)[:10]


def test_sequences_behave_like_lists():
    train = load_task(SMALL, seed=0).train
    assert train[-1] == train[199]
    assert train[2:4] == [train[2], train[3]]
    with pytest.raises(IndexError):
        train[200]


def test_every_worked_solution_is_right_and_the_styles_are_as_frequent_as_promised():
    task = load_task({**SMALL, "size": 2000}, seed=0)
    counts = dict.fromkeys(worked.STYLES, 0.0)
    for problem in task.train:
        text = problem.reply[0]["content"]
        assert task.verify(problem, text) == {"accuracy": 1.0, "score": 1.0}
        styles = [s for s in worked.STYLES if worked.write_steps(problem.metadata["expression"], s) == text]
        for style in styles:
            counts[style] += 1 / len(styles) / 2000
    assert counts == pytest.approx(worked.STYLES, abs=0.06)


def test_reply_system_and_question_options():
    spec = {"name": "reasoning_gym/chain_sum", "reply": "answer", "system": "Be brief.", "question": "{expression} = ?"}
    problem = load_task(spec, seed=0).train[0]
    assert [turn["role"] for turn in problem.messages] == ["system", "user"]
    assert problem.messages[1]["content"] == problem.metadata["expression"] + " = ?"
    assert problem.reply == [{"role": "assistant", "content": problem.answer}]
    assert load_task("reasoning_gym/chain_sum", seed=0).train[0].reply is None


@pytest.mark.parametrize("name", ["basic_arithmetic", "gcd", "word_sorting", "countdown", "spell_backward"])
def test_other_reasoning_gym_data_sets_grade_their_own_answers(name):
    task = load_task({"name": f"reasoning_gym/{name}", "held_out": 3, "size": 3}, seed=0)
    for problem in [*task.train, *task.held_out]:
        assert problem.messages[-1]["content"] == problem.metadata["question"]
        if name != "countdown":
            assert task.verify(problem, f"I think so. <answer>{problem.answer}</answer>")["accuracy"] == 1.0
        assert task.verify(problem, "<answer>no idea</answer>")["accuracy"] == 0.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "reasoning_gym/chain_sums"}, r"did you mean reasoning_gym/chain_sum\b"),
        ({"name": "chain_sum"}, r"did you mean reasoning_gym/chain_sum\b"),
        ({"name": "embedded:arithmetics"}, "did you mean embedded:arithmetic"),
        ({"name": "embedded:"}, "did you mean embedded:arithmetic"),
        ({"max_term": 3}, r"task.max_term=3: .* did you mean max_terms"),
        ({"max_terms": 1}, "max_terms must be >= min_terms"),
        ({"size": 0}, "task.size=0: choose a whole number, 1 or more"),
        ({"held_out": "all"}, "task.held_out='all'"),
        ({"verifier": "exakt"}, "task.verifier='exakt'.*did you mean exact"),
        ({"extract": "equal"}, "extract='equal'.*did you mean 'equals'"),
        ({"reply": "sum_step"}, "task.reply='sum_step'.*did you mean sum_steps"),
        ({"columns": {}}, "no such option"),
        ({"name": ""}, "name the task"),
    ],
)
def test_wrong_options_are_named_with_the_nearest_right_one(change, says):
    with pytest.raises(ValueError, match=says) as caught:
        load_task({**SMALL, **change}, seed=0)
    assert "\n" not in str(caught.value)


def test_too_few_questions_to_hold_out_says_how_many_there_are():
    task = load_task({"name": "reasoning_gym/chain_sum", "max_terms": 2, "max_digits": 1, "held_out": 500}, seed=0)
    with pytest.raises(ValueError, match=r"only \d+ different held-out questions"):
        task.held_out[0]


def test_a_question_template_with_a_wrong_name_lists_the_right_ones():
    task = load_task({"name": "reasoning_gym/chain_sum", "question": "{expr}"}, seed=0)
    with pytest.raises(ValueError, match=r"'expr' is not in this data set's metadata, which has .*expression"):
        task.train[0]


# Tables


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_files_are_read_and_split(tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    if suffix == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif suffix == "json":
        path.write_text(json.dumps(ROWS))
    else:
        write_jsonl(path, ROWS)
    task = load_task({"name": str(path), "held_out": 10}, seed=0)
    assert (len(task.train), len(task.held_out)) == (30, 10)
    assert not set(questions(task.train)) & set(questions(task.held_out))
    problem = task.train[0]
    assert problem.messages == [{"role": "user", "content": "What is 0 + 0?"}]
    assert problem.reply == [{"role": "assistant", "content": "It is 0."}]
    assert task.verify(problem, "Well.\n0") == {"accuracy": 1.0}


@pytest.mark.parametrize("form", ["files", "save_to_disk"])
def test_a_directory_loads_as_a_hub_data_set_would(tmp_path, form):
    if form == "files":
        write_jsonl(tmp_path / "train.jsonl", ROWS[:30])
        write_jsonl(tmp_path / "test.jsonl", ROWS[25:])
    else:
        splits = {"train": datasets.Dataset.from_list(ROWS[:30]), "test": datasets.Dataset.from_list(ROWS[25:])}
        datasets.DatasetDict(splits).save_to_disk(tmp_path)
    task = load_task({"name": str(tmp_path), "held_out_split": "test"}, seed=0)
    assert len(task.held_out) == 15
    assert len(task.train) == 25  # five prompts stand in both splits: they are held out
    with pytest.raises(ValueError, match=r"task.split='trian': .* has the splits train, test"):
        load_task({"name": str(tmp_path), "split": "trian"}, seed=0)


@pytest.mark.parametrize("wrap", [list, datasets.Dataset.from_list, lambda rows: {"data": rows, "held_out": 5}])
def test_loaded_objects(wrap):
    task = load_task(wrap(ROWS), seed=0)
    assert len(task.train) + len(task.held_out) == 40
    assert task.train[0].answer is not None


def test_conversations_are_cut_at_the_first_assistant_turn():
    roles = ["system", "user", "assistant", "user", "assistant"]
    turns = [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]
    task = load_task([{"messages": turns}, {"messages": turns[:2]}], seed=0)
    assert task.train[0].messages == turns[:2]
    assert task.train[0].reply == turns[2:]
    assert task.train[1].reply is None
    assert math.isnan(task.verify(task.train[0], "anything")["accuracy"])


def test_repeated_prompts_stay_on_one_side():
    task = load_task({"data": ROWS * 3, "held_out": 10}, seed=0)
    assert (len(task.train), len(task.held_out)) == (90, 10)
    assert not set(questions(task.train)) & set(questions(task.held_out))


def test_columns_map_other_names():
    rows = [{"question": "1 + 1", "response": "2", "gold": "2", "level": 3}] * 2
    columns = {"prompt": "question", "completion": "response", "answer": "gold"}
    problem = load_task({"data": rows, "columns": columns, "system": "Add."}, seed=0).train[0]
    assert problem.messages == [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1"}]
    assert problem.answer == "2"
    assert problem.metadata["level"] == 3


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ([{"question": "q", "text": "t"}], r"the columns are question, text: name yours with columns: \{prompt: "),
        (
            {"data": ROWS, "columns": {"prompt": "quest"}},
            "there is no column 'quest'; the columns are prompt, completion",
        ),
        ({"data": ROWS, "columns": {"promt": "prompt"}}, "task.columns="),
        ([*ROWS, {"prompt": "q", "completion": " "}], "row 40: the completion is empty"),
        ([*ROWS, {"prompt": "", "completion": "c"}], "row 40: the prompt is empty"),
        ([*ROWS, {"prompt": "q", "completion": None}], "row 40: the completion is None"),
        ([{"messages": [{"role": "human", "content": "q"}]}], "row 0: .*is no turn"),
        ([{"messages": [{"role": "assistant", "content": "q"}]}], "row 0: the prompt must end with a user turn"),
        (
            [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]}],
            "completion is empty",
        ),
        ([{"prompt": "q", "completion": [{"role": "user", "content": "c"}]}], "must start with an assistant turn"),
        ([], "rows are empty"),
        ({"data": ROWS, "held_out": 40}, "task.held_out=40: data has 40 different prompts"),
        ({"data": ROWS, "held_out_split": "test"}, "has no splits"),
        ({"data": [{"prompt": "q"}], "verifier": "math"}, "has no answers"),
        ({"data": ROWS, "sise": 3}, "no such option"),
        ("no/such/file.jsonl", "there is no file"),
        ({"data": 3}, "int is no table"),
        ({"data": ["q"]}, "row 0: 'q' is no row"),
    ],
)
def test_unusable_tables_say_which_row_or_column(spec, says):
    with pytest.raises(ValueError, match=says) as caught:
        load_task(spec, seed=0)
    assert "\n" not in str(caught.value)


def test_broken_and_unreachable_data(tmp_path, monkeypatch):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "q", \n')
    with pytest.raises(ValueError, match=r"broken.jsonl' could not be read"):
        load_task(str(path), seed=0)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(ValueError, match=r"could not be read: ConnectionError: offline; near it are .*chain_sum"):
        load_task("reasoning-gyms/chain_sum", seed=0)


def test_a_reply_can_be_written_by_a_users_function(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def write(question, answer, metadata, rng):\n    return f'{question} -> {answer}'\n")
    for spec in (SMALL, {"data": ROWS}):
        problem = load_task({**spec, "reply": f"{file}:write"}, seed=0).train[0]
        assert problem.reply[0]["content"] == f"{problem.messages[-1]['content']} -> {problem.answer}"


def test_presets_are_valid():
    for name in PRESETS:
        assert load_task(name, seed=0).train[0].reply
