"""Both contestants of the step benchmark train alike, and contestants that do not are refused."""

import json

import pytest

from benchmarks import harness, report, steps
from benchmarks.__main__ import main

SMALL = {"student": (1, 128), "teacher": (1, 256), "vocab": 64, "rows": 3, "prompt": (2, 6), "steps": 1}
FIXED = {"own_text": False, "completion": (3, 9)}
STEPS = [
    *(steps.MATCH | {"divergence": name} for name in ("reverse_kl", "jsd(0.5)", "forward_kl")),
    steps.GROUP | {"samples": 4},
    steps.PAIRS,
]


@pytest.mark.parametrize("trained", STEPS, ids=lambda case: case.get("divergence", case["trains"]))
def test_both_take_the_same_steps_on_fixed_text(trained, tmp_path):
    pytest.importorskip("trl")
    case = SMALL | trained | FIXED
    took = {who: steps.RUN[who](case, str(tmp_path / who)) for who in steps.WHO}
    for which, tolerance in ((0, 1e-5), (1, 1e-4)):
        values = {who: tuple(one[which]) for who, one in took.items()}
        assert harness.agree(values, tolerance)["kullback"] < tolerance
    assert len(set(took["TRL"][1])) == steps.WARM_UP + 1  # gradients of steps differ, so equal ones say something
    if case["trains"] == "distillation":
        assert took["TRL"][0][0] > took["TRL"][0][-1] > 0  # it does train


def test_the_bare_passes_are_timed_step_by_step(tmp_path):
    case = SMALL | steps.MATCH | FIXED | {"divergence": "reverse_kl"}
    steps.Clock.ends.clear()
    steps.bare(case, str(tmp_path))
    assert len(steps.Clock.ends) == steps.WARM_UP + 1


def test_own_text_has_the_full_length():
    case = SMALL | steps.GROUP | {"completion": (5, 5)}
    student, _, tokenizer, rows = steps.setting(case)
    assert tokenizer.eos_token_id >= student.config.vocab_size
    assert steps.tokens_per_step(case) == 3 * 8 * 6
    assert [len(row["replies"]) for row in rows] == [8, 8, 8]


def test_a_step_of_pairs_sees_new_ones():
    case = SMALL | steps.PAIRS | {"completion": (4, 4)}
    _, _, _, rows = steps.setting(case)
    assert len({reply for row in rows for reply in row["replies"]}) == 2 * 3 * (steps.WARM_UP + 1)
    assert steps.tokens_per_step(case) == 2 * 3 * 5


def test_turns_alternate_and_the_page_shows_their_ratio(monkeypatch, tmp_path, capsys):
    asked = []

    def turn(who, name, case):
        asked.append((who, case["own_text"]))
        if who == "bare":
            return {"seconds": [0.5, 0.5]}
        seconds = [2.0, 2.0] if who == "TRL" else [1.0, 1.0]
        return {"seconds": seconds, "losses": case["loss"][who], "gradient_norms": [1.0], "peak_bytes": 2**20}

    monkeypatch.setattr(steps, "in_a_process", turn)
    monkeypatch.setattr(harness, "other_load", lambda seconds=2.0: 0.0)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    case = SMALL | steps.MATCH | {"own_text": False, "completion": (3, 3), "loss": {"TRL": [1.0], "kullback": [1.0]}}
    rows = steps.compare("off-policy", case, 2)
    assert asked == [(who, False) for who in ("TRL", "kullback", "kullback", "TRL")]
    assert [row["speed_over_trl"] for row in rows] == [1.0, 2.0]
    result = {"dtype": "float32", "pieces": {"off-policy": {"when": "today", "rows": rows}}}
    assert "| off-policy | 6 | 12 | **2.00** | 1 | 1 | today |" in report.steps(result, tmp_path)
    result["pieces"]["off-policy"]["rows"] = steps.compare("off-policy", case | {"limit": True}, 1)
    assert "take 500.0 ms of a step, TRL 2000.0, kullback 1000.0" in report.steps(result, tmp_path)
    wrong = case | {"loss": {"TRL": [1.0], "kullback": [1.1]}}
    with pytest.raises(AssertionError, match="do not compute"):
        steps.compare("off-policy", wrong, 1)
    asked.clear()
    with pytest.raises(AssertionError, match="do not compute"):  # before anything that is timed
        steps.compare("on-policy", wrong | {"own_text": True}, 1)
    assert asked == [("TRL", False), ("kullback", False)]


def test_one_piece_is_measured_anew_and_the_others_stay(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(harness, "other_load", lambda seconds=2.0: 0.0)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    (tmp_path / "steps.json").write_text(json.dumps({"pieces": {"DPO": {"rows": ["old"]}, "GRPO": {"rows": ["old"]}}}))
    monkeypatch.setitem(steps.PIECES, "DPO", lambda quick: ["new"])
    pieces = steps.run(only=["DPO"])["pieces"]
    assert (pieces["DPO"]["rows"], pieces["GRPO"]["rows"]) == (["new"], ["old"])
    monkeypatch.setattr("sys.argv", ["benchmarks", "rollouts", "--only", "DPO"])
    with pytest.raises(SystemExit):
        main()
    assert "no piece 'DPO'" in capsys.readouterr().err
