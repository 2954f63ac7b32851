"""`kullback frontier` on a run of a few steps: its numbers from row-by-row forward passes, its files, its refusals."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import kullback as kb
from kullback.cli import app
from kullback.lm.frontier import Ground

PROBLEMS, SAMPLES = 6, 4
SHORT = {"steps": 3, "prompts_per_step": 8, "learning_rate": 1e-2, "evaluate": {"problems": 0}, "max_completion": 16}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two runs from one start, one from another, and one that never moved."""
    patch = pytest.MonkeyPatch()
    patch.setenv("KULLBACK_PROGRESS", "0")
    folder = tmp_path_factory.mktemp("runs")
    changes = {"a": {}, "b": {"seed": 1}, "other": {"student": "embedded:teacher"}, "still": {"learning_rate": 1e-30}}
    for name, change in changes.items():
        options = {"student": "embedded:student", "data": "embedded:arithmetic"} | SHORT | change
        kb.train("sft", output=folder / name, **options)
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def ground(run):
    return Ground(run / "a", problems=PROBLEMS, samples=SAMPLES)


def test_kl_and_reward_of_every_completion(run, ground):
    drawn = ground.trained(run / "a")
    _, at = ground._open(str(run / "a" / "model"))
    problems = ground.evaluation.problems
    texts = ground.evaluation.write(at, "student", problems, SAMPLES)  # the same uniforms give the same texts
    trained = AutoModelForCausalLM.from_pretrained(run / "a" / "model").eval()
    start = at_start(ground)
    for row, completion in enumerate(texts.completions):
        problem = problems[row // SAMPLES]
        prompt = ground.evaluation.prompt(at, "student", problem)
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            ours, theirs = (m(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for m in (trained, start))
        kl = (ours.exp() * (ours - theirs)).sum().item()
        assert drawn.kl[row // SAMPLES, row % SAMPLES].item() == pytest.approx(kl, rel=1e-3, abs=1e-4)
        right = at.task.verify(problem, at.tokenizer.decode(completion, skip_special_tokens=True))["accuracy"]
        assert drawn.rewards[row // SAMPLES, row % SAMPLES] == right
    assert drawn.kl.mean() > 0.05


def at_start(ground):
    return ground._reference[1].model("student")


def test_a_policy_that_never_moved_is_the_reference(run, ground):
    still, reference = ground.trained(run / "still"), ground.reference()
    assert still.kl.abs().max() < 1e-5
    assert still.rewards.equal(reference.rewards)
    assert reference.kl is None


def call(*words, code=0):
    result = CliRunner().invoke(app, ["frontier", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


def test_the_command_writes_a_figure_and_numbers(run, tmp_path):
    options = ("--problems", PROBLEMS, "--samples", SAMPLES, "-o", tmp_path / "new")
    found = json.loads(call(run / "a", run / "b", *options, "--json").stdout)
    assert list(found) == ["reference", "best of 2", "best of 4", "a", "b"]
    assert set(found["a"]) == {"kl", "reward", "attainable", "distance", "needed", "excess"}
    assert found["reference"]["kl"]["value"] == 0
    assert found["a"]["kl"]["value"] > 0
    assert found["a"]["attainable"]["value"] >= found["reference"]["reward"]["value"] - 1e-9
    written = json.loads((tmp_path / "new" / "frontier.json").read_text())
    assert written["policies"]["a"]["kl"]["value"] == pytest.approx(found["a"]["kl"]["value"])
    assert (written["problems"], written["samples"]) == (PROBLEMS, SAMPLES)
    assert len(written["optimum"]["kl"]) == len(written["optimum"]["reward"]) == 60
    assert (tmp_path / "new" / "frontier.png").stat().st_size > 10_000


def test_the_table_names_every_policy(run, tmp_path):
    result = call(run / "a", "--problems", PROBLEMS, "--samples", SAMPLES, "-o", tmp_path)
    for word in ("best of 4", "accuracy", "KL to it", "in excess"):
        assert word in result.output


def test_what_cannot_share_a_frontier_is_refused(run, tmp_path):
    small = ("--problems", PROBLEMS, "--samples", SAMPLES, "-o", tmp_path)
    assert "is not the first run's" in call(run / "a", run / "other", *small, code=2).output
    assert "reward='mood': the verifier gives accuracy" in call(run / "a", "--reward", "mood", *small, code=2).output
    shutil.copytree(run / "a", tmp_path / "unfinished")
    shutil.rmtree(tmp_path / "unfinished" / "model")
    assert "let the run finish first" in call(tmp_path / "unfinished", *small, code=2).output
