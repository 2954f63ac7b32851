"""The rollout benchmark on small sizes: TRL's own generation runs, and texts of unequal length are not compared."""

import pytest
import torch

from benchmarks import harness, report, rollouts
from benchmarks.names import PIECES


def test_from_run_to_section(monkeypatch, tmp_path):
    monkeypatch.setattr(rollouts.harness, "other_load", lambda seconds=2.0: 0.0)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)  # what is tested here is the benchmark
    result = rollouts.run(quick=True)
    assert tuple(result["pieces"]) == PIECES["rollouts"]
    for piece in result["pieces"].values():
        ours, compiled, text, with_log_probs = piece["rows"]
        assert (ours["who"], compiled["who"]) == ("kullback", "kullback, compiled decode")
        assert (text["who"], with_log_probs["who"]) == rollouts.TRL
        assert 0 < sum(ours["shares"].values()) < 1
        assert all(0 < tokens <= row["rows"] * row["limit"] for row in piece["rows"] for tokens in row["tokens"])
    harness.save("rollouts", result, tmp_path)
    page = report.write(tmp_path, tmp_path / "performance.md", tmp_path / "images").read_text()
    assert page.count("| TRL, with log-probs |") == 2
    assert page.count("are matrix products") == 2


def test_speeds_are_compared_in_total_and_round_by_round():
    ours = {"tokens": [100, 100, 300], "seconds": [1.0, 1.0, 1.0], "tokens_per_second": 500 / 3}
    theirs = {"tokens": [50, 100, 100], "seconds": [1.0, 2.0, 7.0], "tokens_per_second": 250 / 10}
    total, middle = rollouts.speed_over(ours, theirs)
    assert total == pytest.approx(500 / 75)
    assert middle == 2  # of 2, 2 and 21


def test_texts_of_another_length_are_refused():
    ours = [[10, 12, 9, 11] * 20]
    rollouts.check_lengths({"ours": ours, "theirs": [[11, 10, 12, 9] * 20]})
    with pytest.raises(AssertionError, match="theirs writes texts of another length"):
        rollouts.check_lengths({"ours": ours, "theirs": [[13, 15, 12, 14] * 20]})
