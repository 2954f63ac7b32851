"""The rollout benchmark on small sizes: TRL's own generation runs, and texts of unequal length are not compared."""

import pytest

from benchmarks import harness, report, rollouts


def test_from_run_to_section(monkeypatch, tmp_path):
    monkeypatch.setattr(rollouts.harness, "other_load", lambda seconds=2.0: 0.0)
    result = rollouts.run(quick=True)
    assert [row["who"] for row in result["rows"]] == 2 * [
        "kullback, with log-probs",
        "TRL, text alone",
        "TRL, with log-probs",
    ]
    assert all(0 < tokens <= row["rows"] * row["limit"] for row in result["rows"] for tokens in row["tokens"])
    harness.save("rollouts", result, tmp_path)
    page = report.write(tmp_path, tmp_path / "performance.md", tmp_path / "images").read_text()
    assert page.count("| TRL, with log-probs |") == 2


def test_texts_of_another_length_are_refused():
    ours = [[10, 12, 9, 11] * 20]
    rollouts.check_lengths({"ours": ours, "theirs": [[11, 10, 12, 9] * 20]})
    with pytest.raises(AssertionError, match="theirs writes texts of another length"):
        rollouts.check_lengths({"ours": ours, "theirs": [[13, 15, 12, 14] * 20]})
