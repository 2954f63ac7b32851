"""Both contestants of the step benchmark train alike, and contestants that do not are refused."""

import pytest

from benchmarks import harness, report, steps

SMALL = {"student": (1, 128), "teacher": (1, 256), "vocab": 64, "rows": 3, "prompt": (2, 6), "steps": 1}


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd(0.5)", "forward_kl"])
def test_both_take_the_same_steps_on_fixed_text(divergence, tmp_path):
    pytest.importorskip("trl")
    case = SMALL | {"own_text": False, "completion": (3, 9), "divergence": divergence}
    losses = {who: tuple(steps.RUN[who](case, str(tmp_path / who))) for who in steps.WHO}
    assert len(losses["TRL"]) == steps.WARM_UP + 1
    assert losses["TRL"][0] > losses["TRL"][-1] > 0  # it does train
    assert harness.agree(losses, steps.TOLERANCE)["kullback"] < 1e-5


def test_own_text_has_the_full_length():
    case = SMALL | {"own_text": True, "completion": (5, 5)}
    student, _, tokenizer, rows = steps.setting(case)
    assert tokenizer.eos_token_id >= student.config.vocab_size
    assert steps.tokens_per_step(case) == 3 * 6
    assert len(rows) == 3


def test_turns_alternate_and_the_page_shows_their_ratio(monkeypatch, tmp_path, capsys):
    asked = []

    def turn(who, name, case):
        asked.append(who)
        loss = case["loss"][who]
        return {"seconds": [2.0, 2.0] if who == "TRL" else [1.0, 1.0], "losses": [loss], "peak_bytes": 2**20}

    monkeypatch.setattr(steps, "in_a_process", turn)
    case = SMALL | {"own_text": False, "completion": (3, 3), "loss": {"TRL": 1.0, "kullback": 1.0}}
    rows = steps.compare("off-policy", case, 2)
    assert asked == ["TRL", "kullback", "kullback", "TRL"]
    assert [row["speed_over_trl"] for row in rows] == [1.0, 2.0]
    assert "| off-policy | 6 | 12 | **2.00** | 1 | 1 |" in report.steps({"rows": rows, "dtype": "float32"}, tmp_path)
    with pytest.raises(AssertionError, match="do not compute"):
        steps.compare("off-policy", case | {"loss": {"TRL": 1.0, "kullback": 1.1}}, 1)
