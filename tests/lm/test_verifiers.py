"""Verifiers: right, wrong and malformed text, and failures that do not end a run."""

import gc
import math
import threading
import time

import pytest

from kullback.lm import verifiers
from kullback.lm.tasks import Problem, load_task


def problem(answer, **metadata):
    return Problem("p", [{"role": "user", "content": "q"}], None, answer, {"question": "q", **metadata})


@pytest.mark.parametrize(
    ("text", "how", "answer"),
    [
        ("a <answer> 4 </answer> b <answer>5</answer> c", "auto", "5"),
        ("first\nlast \n\n", "auto", "last"),
        ("<answer>\n4\n</answer>\nbye", "last_line", "bye"),
        ("1+1=2;2+3=5", "equals", "5"),
        ("no equation", "equals", None),
        ("1+1=", "equals", None),
        ("4", "tag", None),
        (r"so \boxed{\frac{1}{2}} it is", "boxed", r"\frac{1}{2}"),
        (r"so \boxed{\frac{1}{2}", "boxed", None),
        ("nothing", "boxed", None),
        (" a\nb ", "all", "a\nb"),
        ("", "auto", None),
        ("\n \n", "equals", None),
        ("", "all", None),
    ],
)
def test_extraction(text, how, answer):
    assert verifiers.extract_answer(text, how) == answer


@pytest.mark.parametrize(
    ("text", "accuracy"),
    [
        ("12", 1.0),
        ("so\n 12 ", 1.0),
        ("<answer>12</answer>!", 1.0),
        ("13", 0.0),
        ("12.0", 0.0),
        ("", 0.0),
        ("1 2", 0.0),
    ],
)
def test_exact(text, accuracy):
    assert verifiers.exact()(problem(12), text) == {"accuracy": accuracy}


@pytest.mark.parametrize(
    ("text", "accuracy"),
    [
        ("1+2=3", 1.0),
        ("1+2=+3", 1.0),
        ("1+2=3.0", 1.0),
        ("1+2=33", 0.0),
        ("3", 0.0),
        ("=", 0.0),
        ("", 0.0),
        ("é\x00=", 0.0),
    ],
)
def test_reasoning_gyms_own_grading(text, accuracy):
    task = load_task({"name": "reasoning_gym/chain_sum", "extract": "equals"}, seed=0)
    grades = task.verify(problem("3"), text)
    assert grades["accuracy"] == accuracy
    assert 0.0 <= grades["score"] <= 1.0


@pytest.mark.parametrize(
    ("gold", "text", "accuracy"),
    [
        ("1/2", "The answer is 0.5", 1.0),
        (r"\frac{1}{2}", r"so it is $\boxed{1/2}$", 1.0),
        ("12", "It is 12.", 1.0),
        ("12", "It is 13.", 0.0),
        ("12", "I do not know", 0.0),
        ("12", "", 0.0),
        ("12", r"\boxed{\frac{", 0.0),
    ],
)
def test_math(gold, text, accuracy):
    assert verifiers.math_answer()(problem(gold), text) == {"accuracy": accuracy}


def test_math_with_an_extracted_answer():
    verify = verifiers.math_answer("tag")
    assert verify(problem("0.5"), "7 <answer>1/2</answer> 7")["accuracy"] == 1.0
    assert verify(problem("0.5"), "1/2")["accuracy"] == 0.0


def test_math_works_from_many_threads():
    """math-verify itself refuses to run outside the main thread."""
    verify, wrong = verifiers.math_answer(), []

    def work(number):
        for gold in range(5):
            if verify(problem(str(gold)), f"It is {number}.")["accuracy"] != float(gold == number):
                wrong.append((number, gold))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_a_math_problem_that_never_ends_is_an_error_and_the_next_one_works():
    task = load_task({"data": [{"prompt": "q", "answer": "3"}], "verifier": "math"}, seed=0)
    task.verifier = verifiers.math_answer(timeout=1.0)
    task.verify(problem("3"), "3")  # starts the process
    started = time.monotonic()
    grades = task.verify(problem("9^{9^{9^{9}}}"), "$9^{9^{9^{9}}}+1$")
    assert time.monotonic() - started < 5
    assert grades["accuracy"] != 1.0
    assert task.verify(problem("3"), "It is 3") == {"accuracy": 1.0}


def user_file(tmp_path, body):
    file = tmp_path / "mine.py"
    file.write_text(body)
    return file


@pytest.mark.parametrize(
    ("returns", "grades"),
    [
        ("True", {"accuracy": 1.0, "score": 1.0}),
        ("0.25", {"accuracy": 0.0, "score": 0.25}),
        ("{'accuracy': True, 'length': len(completion)}", {"accuracy": 1.0, "length": 4.0}),
    ],
)
def test_a_users_function(tmp_path, returns, grades):
    file = user_file(tmp_path, f"def grade(problem, completion):\n    return {returns}\n")
    task = load_task({"name": "reasoning_gym/chain_sum", "verifier": f"{file}:grade"}, seed=0)
    assert task.verify(task.train[0], "text") == grades


FAILURES = [
    "raise KeyError('x')",
    "raise SystemExit(1)",
    "return None",
    "return 'good'",
    "return '1.0'",
    "return float('nan')",
    "return float('inf')",
    "return {}",
    "return {'score': 1.0}",
    "return {'accuracy': 'x'}",
    "return {'accuracy': float('nan')}",
    "return {'accuracy': 1.0, 'style': float('nan')}",
]


@pytest.mark.parametrize("body", FAILURES)
def test_a_failing_verifier_is_counted_and_does_not_raise(tmp_path, body):
    file = user_file(tmp_path, f"def grade(problem, completion):\n    {body}\n")
    task = load_task({"name": "reasoning_gym/chain_sum", "verifier": f"{file}:grade"}, seed=0)
    for _ in range(2):
        grades = task.verify(task.train[0], "text")
        assert math.isnan(grades["accuracy"])
        assert grades["error"] == 1.0
    assert task.errors == 2
    assert "Error" in task.last_error


def test_a_hang_costs_its_own_sample_only(tmp_path):
    body = "    import time\n    if completion == 'hang':\n        time.sleep(1000)\n    return 1.0\n"
    file = user_file(tmp_path, f"def grade(problem, completion):\n{body}")
    spec = {"name": "reasoning_gym/chain_sum", "verifier": f"{file}:grade", "verifier_timeout": 0.2}
    task, started = load_task(spec, seed=0), time.monotonic()
    grades = [task.verify(task.train[0], text) for text in ("fine", "hang", "fine")]
    assert time.monotonic() - started < 5
    assert [one["accuracy"] for one in (grades[0], grades[2])] == [1.0, 1.0]
    assert math.isnan(grades[1]["accuracy"])
    assert task.errors == 1
    assert "TimeoutError: the verifier gave no answer within 0.2 s" in task.last_error
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "verifier")


def test_calls_share_a_thread_until_one_hangs_and_it_ends_with_the_verifier():
    seen, hang = [], threading.Event()

    def grade(problem, completion):
        seen.append(threading.current_thread())
        if completion == "hang":
            hang.wait(60)
        return {"accuracy": float(completion == "right")}

    verify = verifiers.in_time(grade, 0.2)
    assert [verify(None, text)["accuracy"] for text in ("right", "wrong", "right")] == [1.0, 0.0, 1.0]
    with pytest.raises(TimeoutError):
        verify(None, "hang")
    assert verify(None, "right")["accuracy"] == 1.0
    assert len(set(seen[:4])) == 1
    assert seen[4] is not seen[0]
    other = threading.Thread(target=verify, args=(None, "right"))
    other.start()
    other.join()
    assert len(set(seen)) == 3  # a caller in another thread waits for nobody
    hang.set()
    del verify
    gc.collect()  # a traceback may hold a frame
    for thread in set(seen):
        thread.join(5)
        assert not thread.is_alive()


def test_without_a_limit_a_verifier_runs_in_the_caller_s_thread(tmp_path):
    body = "def grade(p, c):\n    import threading\n    return threading.current_thread().name == 'MainThread'\n"
    file = user_file(tmp_path, body)
    for limit, accuracy in ((0, 1.0), (5, 0.0)):
        spec = {"name": "reasoning_gym/chain_sum", "verifier": f"{file}:grade", "verifier_timeout": limit}
        task = load_task(spec, seed=0)
        assert task.verify(task.train[0], "text")["accuracy"] == accuracy


@pytest.mark.parametrize("limit", [-1, True, "5", float("inf"), float("nan")])
def test_a_time_limit_that_is_none_is_refused(limit):
    with pytest.raises(ValueError, match=r"task\.verifier_timeout=.*seconds for one completion, or 0"):
        load_task({"name": "reasoning_gym/chain_sum", "verifier_timeout": limit}, seed=0)


@pytest.mark.parametrize(
    ("body", "where", "says"),
    [
        ("def grade(p, c): return 1", "{file}:grad", "defines no function 'grad'; it has grade"),
        ("def grade(p, c): return 1", "{file}", "write it as path/to/file.py:function"),
        ("import nothing_of_that_name", "{file}:grade", "fails on import with ModuleNotFoundError"),
        ("", "missing.py:grade", "there is no file"),
    ],
)
def test_a_users_file_that_cannot_be_used(tmp_path, body, where, says):
    file = user_file(tmp_path, body)
    with pytest.raises(ValueError, match=says):
        load_task({"name": "reasoning_gym/chain_sum", "verifier": where.format(file=file)}, seed=0)
