"""The command line, on the shipped models and two steps: what it prints, writes, refuses and returns."""

import json

import pytest
from typer.testing import CliRunner

import kullback.lm.api
import kullback.lm.compare
from kullback.cli import app
from kullback.lm.method import methods

TRAIN, LOOK = ("train", "compare", "evaluate", "report"), ("explain", "inspect")
COMMANDS = (*TRAIN, *LOOK, "diffusion", "methods", "divergences", "papers", "reproduce", "schema", "doctor")
EVALUATED = ("embedded:student", "--task", "embedded:arithmetic")
SHORT = [
    "train.steps=2",
    "train.prompts_per_step=2",
    "evaluate.problems=3",
    "evaluate.samples=2",
    "evaluate.divergence_problems=2",
    "evaluate.shown=1",
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a command in an empty directory; `code` is the expected exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KULLBACK_PROGRESS", "0")
    monkeypatch.delenv("KULLBACK_DEBUG", raising=False)

    def call(*arguments, code=0):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        return result

    return call


def error_of(result):
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in result.output
    return line


# Help


def test_help_names_every_command(run):
    text = run("--help").stdout
    assert all(command in text for command in COMMANDS)
    assert "kullback compare quickstart" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_explains_it(run, command):
    text = run(command, "--help").stdout
    if command not in ("papers", "doctor", "divergences"):
        assert "Example" in text
        assert f"kullback {command}" in text


def test_a_wrong_command_and_the_version(run):
    assert "train" in run("trian", code=2).stderr
    assert run("--version").stdout.startswith("kullback ")


# Train and grade


def test_train_writes_a_run_and_prints_its_table(run, tmp_path):
    result = run("train", "on_policy_distillation", *SHORT, "output=runs/a")
    assert "report: runs/a/report.html" in result.stderr
    assert "minimise" in result.stderr
    assert "reverse_kl" in result.stderr
    assert "untrained" in result.stdout
    for name in ("recipe.yaml", "metrics.jsonl", "evaluation.json", "report.html", "model/config.json"):
        assert (tmp_path / "runs/a" / name).is_file()

    assert "finished run is already there" in error_of(run("train", "runs/a", code=2))
    assert "finished before" in run("train", "runs/a", "--resume").stderr
    changed = error_of(run("train", "runs/a", "signal.divergence=tv", "--resume", code=2))
    assert "signal.divergence='tv'" in changed
    assert "'reverse_kl'" in changed

    again = json.loads(run("train", "runs/a", "--overwrite", "evaluate.problems=0", "--json").stdout)
    assert again["report"] == "runs/a/report.html"
    assert again["runs"][-1]["steps"] == 2


def test_a_run_goes_on_with_more_steps(run, tmp_path):
    run("train", "sft", *SHORT, "evaluate.problems=0", "output=runs/a", "train.save_every=2")
    run("train", "runs/a", "--resume", "train.steps=3")
    rows = [json.loads(line) for line in (tmp_path / "runs/a/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]


@pytest.mark.parametrize("name", methods())
def test_two_steps_of_every_recipe(run, name):
    shape = "source.samples=2" if name == "minillm" else "train.seed=1"
    result = run("train", name, *SHORT, "evaluate.problems=0", shape, "--json")
    assert json.loads(result.stdout)["runs"][-1]["steps"] == 2


def test_compare_shares_its_anchors_and_resumes(run, tmp_path, monkeypatch):
    graded = []
    original = kullback.lm.compare.grade_anchors
    monkeypatch.setattr(kullback.lm.compare, "grade_anchors", lambda *args: graded.append(1) or original(*args))
    monkeypatch.setattr(kullback.lm.run, "grade_anchors", lambda *args: pytest.fail("graded twice"))
    command = ["compare", "on_policy_distillation", *SHORT, "output=runs/c", "--vary", "signal.divergence=tv,jsd(0.3)"]
    found = json.loads(run(*command, "--json").stdout)
    assert [row["label"] for row in found["runs"]] == ["untrained", "teacher", "tv", "jsd(0.3)"]
    assert found["failed"] == {}
    assert len(graded) == 1
    stored = json.loads((tmp_path / "runs/c/comparison.json").read_text())
    assert stored["vary"] == {"signal.divergence": ["tv", "jsd(0.3)"]}
    assert (tmp_path / "runs/c/report.html").is_file()

    assert "already there" in error_of(run(*command, code=2))
    monkeypatch.setattr(kullback.lm.compare, "run", lambda *args, **kwargs: pytest.fail("ran again"))
    assert run(*command, "--resume").stderr.count("finished before") == 2
    assert "signal.temperature" in error_of(run(*command, "--resume", "signal.temperature=2", code=2))


def test_a_failed_variant_does_not_lose_the_others(run, tmp_path, monkeypatch):
    original = kullback.lm.compare.run

    def fail_once(plan, **kwargs):
        if plan.method.divergence == "tv":
            raise FloatingPointError("the loss is nan at step 1")
        return original(plan, **kwargs)

    monkeypatch.setattr(kullback.lm.compare, "run", fail_once)
    command = [
        "compare",
        "on_policy_distillation",
        *SHORT,
        "output=runs/c",
        "--vary",
        "signal.divergence=tv,reverse_kl",
    ]
    result = run(*command, code=1)
    assert "failed, FloatingPointError: the loss is nan" in result.stderr
    assert (tmp_path / "runs/c/reverse_kl/evaluation.json").is_file()
    runs = json.loads((tmp_path / "runs/c/comparison.json").read_text())["runs"]
    assert [bool(item.get("error")) for item in runs] == [True, False]

    monkeypatch.setattr(kullback.lm.compare, "run", original)
    result = run(*command, "--resume")
    assert "reverse_kl: finished before" in result.stderr
    assert (tmp_path / "runs/c/tv/model/config.json").is_file()


def test_a_refused_variant_stops_the_comparison_before_it_starts(run, tmp_path):
    result = run("compare", "on_policy_distillation", "--vary", "signal.divergence=tv,forward_lk", code=2)
    assert "did you mean forward_kl" in error_of(result)
    assert not (tmp_path / "runs").exists()
    assert "nothing is compared" in error_of(run("compare", "sft", code=2))


def test_interrupted_commands_say_how_to_go_on(run, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(kullback.lm.api, "run", stop)
    result = run("train", "sft", "train.steps=3", "--overwrite", code=130)
    assert "go on with: kullback train sft train.steps=3 --resume" in result.stderr


def test_evaluate_a_model_and_a_run(run):
    task = ["--task", "embedded:arithmetic", "problems=3", "samples=2", "divergence_problems=2"]
    metrics = json.loads(run("evaluate", "embedded:student", "--teacher", "embedded:teacher", *task, "--json").stdout)
    assert metrics["problems"] == 3
    assert {"entropy", "pass@2", "forward_kl_student_text", "reverse_kl_teacher_text"} <= set(metrics)
    assert "pass@2" in run("evaluate", "embedded:student", *task).stdout
    run("train", "sft", *SHORT, "evaluate.problems=0", "output=runs/a")
    assert json.loads(run("evaluate", "runs/a", "problems=2", "--json").stdout)["problems"] == 2


def test_report_of_several_runs(run, tmp_path):
    for name in ("a", "b"):
        run("train", "sft", *SHORT, "evaluate.problems=0", f"output=runs/{name}")
    result = run("report", "runs/a", "runs/b", "--output", "both.html", "--title", "Both of them")
    assert "report: both.html" in result.stderr
    assert "Both of them" in (tmp_path / "both.html").read_text()
    assert "not a directory" in error_of(run("report", "nowhere", code=2))


# Look before you train


def test_explain_says_the_objective(run):
    text = run("explain", "vopd", "signal.baseline=8").stdout
    assert "student's top 8" in text
    found = json.loads(run("explain", "gkd", "--json").stdout)
    assert found["recipe"]["signal"]["beta"] == 0.5


def test_inspect_shows_tokens(run):
    assert run("inspect", "on_policy_distillation", "train.prompts_per_step=2").stdout.strip()


# What there is


def test_methods_lists_all_and_explains_one(run):
    rows = json.loads(run("methods", "--json").stdout)
    assert [row["name"] for row in rows] == list(methods())
    assert all(row["what"] and row["text"] for row in rows)
    assert all(name in run("methods").stdout for name in methods())
    text = run("methods", "vopd").stdout
    assert "signal.baseline" in text
    assert "Source: arXiv 2605.07865" in text
    assert "did you mean gkd" in error_of(run("methods", "gdk", code=2))


def test_divergences_and_papers(run):
    rows = {row["name"]: row for row in json.loads(run("divergences", "--json").stdout)}
    assert rows["jsd"]["parameter"] == "beta in (0, 1)"
    assert rows["forward_kl"]["maximum"] == "inf"
    assert "forward_kl" in run("divergences").stdout
    assert len(json.loads(run("papers", "--json").stdout)) == 43
    assert "chi-PO" in run("papers").stdout


def test_reproduce_refuses_what_is_planned_or_unknown(run):
    assert "is planned" in error_of(run("reproduce", "12", code=2))
    assert "numbered 1 to 43" in error_of(run("reproduce", "99", code=2))


def test_schema_is_printed_or_written(run, tmp_path):
    assert json.loads(run("schema", "gkd").stdout)["properties"]["method"] == {
        "const": "gkd",
        "description": "Generalised JSD to a teacher on mixed text.",
    }
    run("schema", "--output", "docs/recipe.schema.json")
    assert "allOf" in json.loads((tmp_path / "docs/recipe.schema.json").read_text())


def test_doctor_finds_this_machine_fit(run):
    findings = json.loads(run("doctor", "--json").stdout)
    states = {finding["what"]: finding["state"] for finding in findings}
    assert states["torch"] == states["embedded:teacher"] == states["output"] == "ok"
    assert "embedded:student" in run("doctor").stdout


# Errors


def test_errors_are_one_sentence_and_a_traceback_on_demand(run):
    wrong = ["explain", "gkd", "signal.betta=1"]
    assert "did you mean signal.beta" in error_of(run(*wrong, code=2))
    assert "Traceback" in run(*wrong, "--debug", code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train", "quickstrat"], "did you mean quickstart"),
        (["train", "gkd", "student=nowhere/at/all"], "student='nowhere/at/all' cannot be loaded"),
        (["train", "gkd", "target.teacher=embedded:techer"], "did you mean embedded:teacher"),
        (["train", "gkd", "output=blocked/run"], "blocked is a file"),
        (["train", "gkd", "task=missing.jsonl"], "there is no file"),
        (["train", "gkd", "task=prompts.jsonl"], "has no reply to train on"),
        (["train", "gkd", "task=columns.jsonl"], "the columns are question"),
        (["train", "gkd", "task=empty.jsonl"], "the completion is empty"),
        (["train", "gkd", "source.max_completion=999", *SHORT], "exceed the student's context of 128"),
        (["evaluate", "embedded:student"], "--task embedded:arithmetic"),
        (
            ["evaluate", *EVALUATED, "problms=3"],
            "did you mean evaluate.problems",
        ),
        (
            ["evaluate", *EVALUATED, "samples=0"],
            "evaluate.samples=0 should be greater",
        ),
        (["report", "."], "no run is in this directory"),
    ],
)
def test_bad_input_exits_with_2_and_a_sentence(run, tmp_path, arguments, part):
    (tmp_path / "blocked").write_text("a file")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1 + 1"}\n' * 4)
    (tmp_path / "columns.jsonl").write_text('{"question": "1 + 1"}\n')
    (tmp_path / "empty.jsonl").write_text('{"prompt": "1 + 1", "completion": ""}\n')
    if "prompts.jsonl" in str(arguments):
        arguments = [*arguments, *SHORT, "evaluate.problems=0", "source.student_fraction=0"]
    assert part in run(*arguments, code=2).stderr.splitlines()[-1]
