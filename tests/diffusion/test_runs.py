"""`distil`, `distil_each` and the command: what a run leaves, how it goes on, and what it says of bad input."""

import base64
import json
import os
import re
import signal
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from kullback.cli import app
from kullback.diffusion import DenoiserTraining, FDistill, Images, distil, distil_each, ring
from kullback.diffusion.report import write_report

SHORT = {"steps": 12, "batch": 16, "width": 8, "warmup": 2, "save_every": 5, "log_every": 1}
FILES = (
    "samples.png",
    "samples.safetensors",
    "model/student.safetensors",
    "metrics.jsonl",
    "recipe.yaml",
    "objective.txt",
    "environment.json",
    "evaluation.json",
    "report.html",
)


@pytest.fixture(autouse=True)
def _silent(monkeypatch):
    monkeypatch.setenv("KULLBACK_PROGRESS", "0")


@pytest.fixture(scope="module")
def images():
    return Images(torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, images):
    """The student of a run that was never stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    distil(images, "forward_kl", run, teacher_steps=9, **SHORT)
    return weights(run)


def weights(run):
    return load_file(run / "model" / "student.safetensors")


def interrupt_at(monkeypatch, learner, step, how):
    """`how` happens in the first draw of that step, and never again."""
    draw, left = learner.draw, [True]

    def stopping(self, at):
        if at == step and left:
            left.clear()
            how()
        return draw(self, at)

    monkeypatch.setattr(learner, "draw", stopping)


def die():
    raise MemoryError("killed")


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def test_a_whole_run_leaves_a_directory(tmp_path):
    run = distil("two_modes", "jsd(0.5)", tmp_path / "run", **SHORT)
    assert run.sample(5).shape == (5, 2)
    for name in FILES:
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert [row["step"] for row in run.metrics] == list(range(1, 13))
    with pytest.raises(ValueError, match="a finished run is already there"):
        distil("two_modes", "jsd(0.5)", tmp_path / "run", **SHORT)
    again = distil("two_modes", "forward_kl", tmp_path / "run", overwrite=True, **SHORT)
    assert again.evaluation["student"].keys() >= {"modes", "near a mode", "energy distance", "coverage", "clipped"}


@pytest.mark.parametrize(("who", "step"), [(DenoiserTraining, 7), (FDistill, 8)])
@pytest.mark.parametrize("how", [die, ctrl_c])
def test_a_stopped_run_ends_with_the_same_bits(tmp_path, monkeypatch, images, whole, who, step, how):
    options = {**SHORT, "teacher_steps": 9}
    with monkeypatch.context() as patch:
        interrupt_at(patch, who, step, how)
        with pytest.raises(MemoryError if how is die else KeyboardInterrupt):
            distil(images, "forward_kl", tmp_path / "run", **options)
    with pytest.raises(ValueError, match="an unfinished run is already there; resume it"):
        distil(images, "reverse_kl", tmp_path / "run", **options)
    seen = []
    draw = DenoiserTraining.draw
    monkeypatch.setattr(DenoiserTraining, "draw", lambda self, at: (seen.append(at), draw(self, at))[1])
    distil(images, "forward_kl", tmp_path / "run", resume=True, **options)
    kept = {DenoiserTraining: 5 if how is die else 8, FDistill: 9}[who]  # the last checkpoint of the teacher
    assert seen == list(range(kept, 9))
    run = weights(tmp_path / "run")
    assert all(torch.equal(whole[name], run[name]) for name in whole)


def test_a_run_goes_on_only_with_its_own_settings(tmp_path):
    distil("two_modes", "forward_kl", tmp_path / "run", **SHORT)
    with pytest.raises(ValueError, match=r"gan=0.5: the run in .* was begun with 0.001; set it back, or start over"):
        distil("two_modes", "forward_kl", tmp_path / "run", resume=True, gan=0.5, **SHORT)
    more = distil("two_modes", "forward_kl", tmp_path / "run", resume=True, **{**SHORT, "steps": 14})
    assert more.metrics[-1]["step"] == 14


def test_one_student_for_each_divergence_of_one_teacher(tmp_path, images, monkeypatch):
    trained = []
    draw = DenoiserTraining.draw
    monkeypatch.setattr(DenoiserTraining, "draw", lambda self, at: (trained.append(at), draw(self, at))[1])
    runs = distil_each(images, ["reverse_kl", "jsd(0.5)"], tmp_path / "all", teacher_steps=3, **SHORT)
    assert trained == [0, 1, 2]
    assert [run.directory.name for run in runs] == ["reverse_kl", "jsd-0.5"]
    assert not any(p.requires_grad for p in runs[0].teacher.parameters())
    page = (tmp_path / "all" / "report.html").read_text()
    assert "jsd(0.5)" in page
    assert len(re.findall("data:image/png;base64", page)) == 2
    distil_each(images, ["reverse_kl", "jsd(0.5)"], tmp_path / "all", resume=True, teacher_steps=3, **SHORT)
    assert trained == [0, 1, 2]


@pytest.mark.parametrize(
    ("divergences", "said"), [([], "at least one"), (["forward_kl"] * 2, "none twice"), (["forward_kl", "tv"], '"tv"')]
)
def test_divergences_are_refused_before_anything_is_trained(tmp_path, divergences, said):
    with pytest.raises(ValueError, match=said):
        distil_each("two_modes", divergences, tmp_path / "all", **SHORT)
    assert not (tmp_path / "all").exists()


def test_a_saturated_ratio_network_is_one_warning_and_nothing_is_lost(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = distil("ring", "forward_kl", tmp_path / "run", clip=(0.999, 1.001), **SHORT)
    (told,) = [str(item.message) for item in caught if item.category is UserWarning]
    assert re.search(r"ratio network: \d+ of 32 log-ratios lay beyond clip=\(0.999, 1.001\)", told)
    assert run.evaluation["student"]["clipped"]["value"] > 0.5
    assert len(run.metrics) == 12
    assert "log-ratios lay beyond" in (tmp_path / "run" / "report.html").read_text()


def test_a_teacher_that_does_not_fit_the_data(tmp_path, images):
    with pytest.raises(ValueError, match=r"teacher=Mixture .* shape \(1, 4, 4\)"):
        distil(images, "forward_kl", tmp_path / "run", teacher=ring(), **SHORT)
    assert not (tmp_path / "run").exists()


def test_the_report_is_rebuilt_from_the_directory_alone(tmp_path):
    run = distil("ring", "forward_kl", tmp_path / "run", student="affine", **SHORT)
    first = (run.directory / "report.html").read_text()
    assert write_report([run.directory], run.directory / "report.html").read_text() == first
    (picture, _) = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", first)
    assert base64.b64decode(picture) == (run.directory / "samples.png").read_bytes()
    (run.directory / "evaluation.json").unlink()
    with pytest.raises(ValueError, match="no finished distillation is there"):
        write_report([run.directory], tmp_path / "report.html")


# The command


def call(*arguments, code=0, command="diffusion"):
    result = CliRunner().invoke(app, [command, *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


TWO = ("two_modes", "-d", "reverse_kl", "-d", "forward_kl", "--steps", 6, "--batch", 8, "--width", 8)


def test_the_command_prints_a_table_and_json(tmp_path):
    result = call(*TWO, "-o", tmp_path / "run")
    assert all(word in result.stdout for word in ("teacher", "reverse_kl", "forward_kl", "modes", "energy distance"))
    assert "report.html" in result.stderr
    page = tmp_path / "run" / "report.html"
    first = page.read_text()
    again = call(tmp_path / "run", command="report")
    assert page.read_text() == first
    assert again.stdout == result.stdout
    (tmp_path / "text").mkdir()
    mixed = call(tmp_path / "run", tmp_path / "text", command="report", code=2)
    assert "some train text, some images; give them a report each" in mixed.stderr


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, FDistill, 3, ctrl_c)
        result = call(*TWO, "-o", tmp_path / "run", code=130)
    assert "go on with: kullback diffusion two_modes" in result.stderr
    assert "--resume" in result.stderr
    rows = json.loads(call(*TWO, "-o", tmp_path / "run", "--resume", "--json").stdout)["runs"]
    assert [row["label"] for row in rows] == ["teacher", "one call, untrained", "reverse_kl", "forward_kl"]
    assert rows[0]["modes"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("digitz",), 2, "data='digitz' is neither one of two_modes, ring, digits nor a folder of images"),
        (("ring", "-d", "forwardkl"), 2, "did you mean forward_kl"),
        (("ring", "--student", "small"), 2, "student='small' is unknown"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    (line,) = call(*arguments, code=code).stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not any(tmp_path.iterdir())


def test_without_the_extra_the_command_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    (line,) = call("digits", code=1).stderr.strip().splitlines()
    assert line == 'error: data="digits" needs scikit-learn: pip install "kullback[diffusion]"'
    assert not any(tmp_path.iterdir())
