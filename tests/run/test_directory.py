"""The run directory keeps what was written, whatever byte the writer was killed at."""

import enum
import json
import math
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from kullback.run.directory import RunDirectory, RunDirectoryError, read_json, to_float, write_json
from kullback.run.progress import ProgressBar, track


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path / "run")


def test_what_is_written_is_read_back(run):
    recipe = {"method": "gkd", "signal": {"divergence": "jsd(0.1)"}, "train": {"steps": 3, "learning_rate": 1e-5}}
    run.write_recipe(recipe)
    run.write_objective("reverse KL, student || teacher\nmean over 18,204 scored tokens")
    run.write_environment({"seed": 7})
    run.append_metrics({"step": 1, "time": 0.5, "loss": torch.tensor(0.25), "schedule/k": 2})
    run.append_samples([{"step": 1, "prompt": "1 + 1 =", "completion": " 2", "rewards": {"accuracy": 1.0}}])
    run.write_evaluation({"student": {"avg@k": {"value": 0.5, "standard_error": None}}})

    assert run.recipe() == recipe
    assert list(run.recipe()) == list(recipe)
    assert run.objective() == "reverse KL, student || teacher\nmean over 18,204 scored tokens"
    assert run.environment()["seed"] == 7
    assert run.environment()["versions"]["torch"] == torch.__version__
    assert run.metrics() == [{"step": 1, "time": 0.5, "loss": 0.25, "schedule/k": 2}]
    assert run.samples()[0]["completion"] == " 2"
    assert run.evaluation() == {"student": {"avg@k": {"value": 0.5, "standard_error": None}}}


def test_tensors_arrays_and_enums_are_written_as_what_they_hold(run):
    class Mode(enum.StrEnum):
        EXACT = "exact"

    values = {"a": np.float64(0.5), "b": torch.tensor([1, 2]), "c": Mode.EXACT, "d": Path("x"), "e": (np.int64(3),)}
    plain = {"a": 0.5, "b": [1, 2], "c": "exact", "d": "x", "e": [3]}
    run.write_recipe(values)
    run.append_metrics(values)
    assert run.recipe() == run.metrics()[0] == plain


def test_an_empty_directory_reads_as_nothing(run):
    assert run.recipe() is run.objective() is run.environment() is run.evaluation() is run.last_checkpoint() is None
    assert run.metrics() == run.samples() == []
    assert not run.has_run
    assert not run.is_finished


def test_json_stays_strict_and_numbers_come_back(run):
    run.append_metrics({"step": 1, "loss": math.nan, "a": math.inf, "b": -math.inf, "mode": "text"})
    run.write_evaluation({"student": {"avg@k": {"value": math.nan, "standard_error": math.inf}}})
    token = {
        "text": "inf",
        "divergence": math.inf,
        "entropy": math.nan,
        "teacher_top": [["inf", 1.0], ["-inf", math.nan]],
    }
    run.append_samples([{"step": 1, "rewards": {"accuracy": math.inf}, "tokens": [token]}])

    def no_constants(name):
        raise AssertionError(f"{name} is not JSON")

    for file in (run.metrics_file, run.samples_file, run.evaluation_file):
        json.loads(file.read_text(), parse_constant=no_constants)
    row = run.metrics()[0]
    assert math.isnan(row["loss"])
    assert row["a"] == math.inf
    assert row["b"] == -math.inf
    assert row["mode"] == "text"
    metric = run.evaluation()["student"]["avg@k"]
    assert math.isnan(metric["value"])
    assert metric["standard_error"] == math.inf
    back = run.samples()[0]["tokens"][0]
    assert back["text"] == "inf"
    assert back["divergence"] == math.inf
    assert math.isnan(back["entropy"])
    assert back["teacher_top"][0] == ["inf", 1.0]
    assert back["teacher_top"][1][0] == "-inf"


@pytest.mark.parametrize(
    "text", ["a\u2028b\u2029c", "\r\n\x0b\x0c\x1c\x85", "\ud83d half a pair", '"</script>\\', "\x00"]
)
def test_any_text_survives_the_log(run, text):
    run.append_samples([{"step": 1, "completion": text}, {"step": 2, "completion": "next"}])
    assert [sample["completion"] for sample in run.samples()] == [text, "next"]


def test_a_log_cut_at_any_byte_keeps_its_whole_lines(run):
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "loss": 0.5})
    whole = run.metrics_file.read_bytes()
    second = len(whole) * 2 // 3  # the three rows are equally long
    for cut in range(second + 1, len(whole) - 1):
        run.metrics_file.write_bytes(whole[:cut])
        with pytest.warns(UserWarning, match="cut short"):
            assert [row["step"] for row in run.metrics()] == [1, 2]
        with pytest.warns(UserWarning, match="cut short"):
            RunDirectory(run.path).append_metrics({"step": 3, "loss": 0.5})  # a new process goes on
        assert run.metrics_file.read_bytes() == whole


def test_a_damaged_line_within_a_log_is_left_out_and_named(run):
    run.metrics_file.write_text('{"step": 1}\n{"ste\n[2]\n{"step": 3}\n')
    with pytest.warns(UserWarning, match="is not a JSON object") as caught:
        assert [row["step"] for row in run.metrics()] == [1, 3]
    assert [re.search(r"line (\d)", str(warning.message))[1] for warning in caught] == ["2", "3"]


def test_resuming_forgets_what_came_after_the_checkpoint(run):
    for step in range(1, 9):
        run.append_metrics({"step": step})
        run.append_samples([{"step": step, "prompt": "é\u2028"}])
    for step in (2, 5, 7):
        run.checkpoint(step).mkdir()
        if step != 7:
            run.mark_complete(run.checkpoint(step))

    with pytest.warns(UserWarning, match="checkpoint-7 was not written to its end"):
        last = run.last_checkpoint()
    assert last == run.checkpoint(5)
    assert run.checkpoint_step(last) == 5
    assert run.truncate_after(5) == 6
    assert [row["step"] for row in run.metrics()] == [row["step"] for row in run.samples()] == [1, 2, 3, 4, 5]
    assert not run.checkpoint(7).exists()
    assert run.checkpoint(2).exists()
    run.append_metrics({"step": 6})
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5, 6]


def test_the_newest_checkpoint_is_the_highest_number_not_the_last_name(run):
    for step in (9, 10, 100):
        run.checkpoint(step).mkdir()
        run.mark_complete(run.checkpoint(step))
    (run.checkpoints / "checkpoint-old").mkdir()
    assert run.last_checkpoint() == run.checkpoint(100)


def test_no_complete_checkpoint_is_none(run):
    run.checkpoint(3).mkdir()
    with pytest.warns(UserWarning, match="skipped"):
        assert run.last_checkpoint() is None


def test_a_run_that_is_there_is_not_written_over(run):
    run.append_metrics({"step": 1})
    with pytest.raises(RunDirectoryError, match=r"output=.*an unfinished run is already there; resume it, .*run-2"):
        RunDirectory.create(run.path)
    run.write_evaluation({"student": {}})
    with pytest.raises(RunDirectoryError, match=r"a finished run is already there; choose another output"):
        RunDirectory.create(run.path)
    assert RunDirectory.create(run.path, resume=True).metrics() == [{"step": 1}]

    (run.path / "notes.txt").write_text("mine")
    again = RunDirectory.create(run.path, overwrite=True)
    assert not again.has_run
    assert (run.path / "notes.txt").read_text() == "mine"


def test_resume_of_nothing_starts_anew(tmp_path):
    run = RunDirectory.create(tmp_path / "new", resume=True)
    assert not run.has_run
    assert run.last_checkpoint() is None


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    for path in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(RunDirectoryError, match=r"output=.*taken is a file; choose a directory"):
            RunDirectory.create(path)


def test_a_read_only_place_is_named_before_anything_is_trained(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # root may write anywhere, so chmod would prove nothing
    with pytest.raises(RunDirectoryError, match=r"train.output=.*permission denied.*choose a writable directory"):
        RunDirectory.create(tmp_path / "run", field="train.output")


def test_whole_files_are_replaced_whole(tmp_path):
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    loop: list = []
    loop.append(loop)
    with pytest.raises(RecursionError):
        write_json(file, loop)
    assert read_json(file) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_half_written_json_file_is_left_out_and_named(run):
    run.evaluation_file.write_text('{"student": {"avg')
    with pytest.warns(UserWarning, match=r"evaluation.json is not readable as JSON"):
        assert run.evaluation() is None


@pytest.mark.parametrize(("stored", "value"), [("inf", math.inf), ("-inf", -math.inf), (2, 2.0), ("0.5", 0.5)])
def test_stored_numbers(stored, value):
    assert to_float(stored) == value
    assert math.isnan(to_float(None))
    assert math.isnan(to_float("many"))


def test_progress_without_a_terminal_is_lines_on_standard_error(capsys):
    with ProgressBar(4, "train [a]", start=1, every=0.0) as progress:
        progress.advance(loss=torch.tensor(0.4123), note="[b]")
        progress.advance(2)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0].startswith("train [a] 2/4")
    assert "loss 0.412" in lines[0]
    assert "left" in lines[0]
    assert lines[-1].startswith("train [a] 4/4")
    assert "took 0:00" in lines[-1]
    assert "note [b]" in lines[-1]


def test_progress_can_be_switched_off(capsys, monkeypatch):
    monkeypatch.setenv("KULLBACK_PROGRESS", "0")
    assert list(track(range(3), "count")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_is_a_bar():
    import io

    from rich.console import Console

    screen = io.StringIO()
    with ProgressBar(2, "[x]", console=Console(file=screen, force_terminal=True, width=80)) as progress:
        progress.advance(2, loss=1.0)
    assert "[x]" in screen.getvalue()
    assert "2/2" in screen.getvalue()
    assert "loss 1" in screen.getvalue()
