"""What the papers' language models are measured by, against counting and against a model's own probabilities."""

import math

import pytest
import torch

from kullback.lm.models import load_model, load_tokenizer
from kullback.lm.tasks import Problem, load_task
from kullback.papers import arms
from kullback.papers import p02_f_dpg as paper_02
from kullback.papers import p23_rl_as_bayes as paper_23
from kullback.papers import p39_chi_po as paper_39
from kullback.papers.page import Direction, Findings, new_figure
from kullback.papers.reproduction import Job, reproduces


@pytest.fixture(scope="module")
def student():
    return load_model(arms.START, role="student").eval(), load_tokenizer(arms.START, role="student")


@pytest.fixture(scope="module")
def answers(student):
    task = load_task(arms.TASK, seed=0)
    return arms.ask(*student, task, task.held_out[:6], samples=16, reference=student[0])


def test_repeated_is_the_share_of_equal_pairs():
    texts = [(1,), (1,), (2,), (1,), (3,), (4,), (5,), (6,)]
    zero = torch.zeros(8, dtype=torch.float64)
    assert arms.Answers(4, texts, {}, zero, zero, None).repeated == [3 / 6, 0]


def test_a_model_is_at_no_distance_from_itself(answers):
    assert float(answers.kl.abs().max()) < 1e-5
    assert len(answers.texts) == 96
    assert answers.of(1) == slice(16, 32)


def test_entropy_and_log_prob_are_of_the_same_law(answers):
    """Both estimate the entropy of answers; the mean difference is noise of known size."""
    difference = answers.entropy + answers.log_prob
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / math.sqrt(len(difference))
    assert float(answers.entropy.min()) > 0


def test_log_prob_is_the_model_s(student, answers):
    model, tokenizer = student
    task = load_task(arms.TASK, seed=0)
    prompt = tokenizer.apply_chat_template(task.held_out[0].messages, add_generation_prompt=True, return_dict=False)
    ids = torch.tensor([[*prompt, *answers.texts[0]]])
    with torch.no_grad():
        law = model(input_ids=ids).logits[0].double().log_softmax(-1)
    own = sum(float(law[len(prompt) - 1 + t, token]) for t, token in enumerate(answers.texts[0]))
    assert float(answers.log_prob[0]) == pytest.approx(own, abs=1e-4)


@pytest.mark.parametrize(("steps", "count", "expected"), [(60, 4, [0, 15, 30, 45, 60]), (2, 5, [0, 1, 2])])
def test_marks(steps, count, expected):
    assert arms.marks(steps, count) == expected


def test_the_constraint_of_paper_02_reads_the_first_step():
    problem = Problem("made up", [], None, "8", {"expression": "4 - 7 + 3 + 8"})
    right_but_left = paper_02.grade(problem, "4-7=-3;-3+3=0;0+8=8")
    assert right_but_left == {"accuracy": 1, "other": 0}
    assert paper_02.grade(problem, "3+8=11;4-7=-3;-3+11=9") == {"accuracy": 0, "other": 1}


def test_the_posterior_of_paper_23_by_its_closed_form(student):
    """With p answers of the start right, exp(r / beta) gives p e / (1 - p + p e) right ones."""
    task = load_task(arms.TASK, seed=0)
    seen = arms.ask(*student, task, task.held_out[:5], samples=12, seed=1)
    p = seen.grades["accuracy"].double().view(5, 12).mean(1)
    tilt = math.exp(1 / paper_23.BETA)
    right = p * tilt / (1 - p + p * tilt)
    found = paper_23.posterior_of_start(5, 12)
    assert found["accuracy"] == pytest.approx(float(right.mean()))
    kl = torch.xlogy(right, right / p).nan_to_num() + torch.xlogy(1 - right, (1 - right) / (1 - p)).nan_to_num()
    assert found["KL"] == pytest.approx(float(kl.mean()))


def test_pairs_of_paper_39_are_judged_by_a_verifier_that_errs(monkeypatch):
    task = load_task({"name": arms.TASK, "size": 60}, seed=0)

    def shares(wrong):
        monkeypatch.setattr(paper_39, "WRONG", wrong)
        found = paper_39.write_pairs(seed=0, problems=60)
        by_question = {problem.messages[0]["content"]: problem for problem in task.train}
        for row in found["pairs"]:
            problem = by_question[row["prompt"][0]["content"]]
            grades = [task.verify(problem, row[side])["accuracy"] for side in ("chosen", "rejected")]
            assert wrong or grades == [1, 0]
        return found["mistaken"], found["equal"]

    assert shares(0.0) == (0, 0)
    mistaken, equal = shares(0.5)
    assert mistaken > 0
    assert equal > 0.2


def test_a_reproduction_writes_its_page(tmp_path):
    seen = []

    @reproduces(2, full={"steps": 9}, quick={"steps": 1}, parallel=True)
    def reproduce(job: Job) -> Findings:
        seen.append(job)
        assert job.folder.is_dir()
        return Findings("setup", [Direction("up", True, asserted=True)], [], new_figure(1)[0], "cap", "read", ["x"])

    result = reproduce(quick=True, docs=tmp_path)
    assert (seen[0].size, seen[0].processes, seen[0].folder.exists()) == ({"steps": 1}, 1, False)
    assert result.held is True
    assert result.page == tmp_path / "02-f-dpg.md"
    assert "# 02 f-DPG\n\n*Aligning Language Models" in result.text
    assert "kullback reproduce 02 --quick" in result.text
