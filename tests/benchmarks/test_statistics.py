"""The benchmark of the one pass on a small size: contestants compute the same numbers, and the page shows them."""

import pytest
import torch

from benchmarks import harness, report, statistics


def test_from_run_to_page(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "other_load", lambda seconds=2.0: 0.0)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    result = statistics.run(quick=True)
    assert {row["who"] for row in result["rows"]} == {"L2", "naive", "kullback", "kullback, not compiled"}
    harness.save("statistics", result, tmp_path)
    page = report.write(tmp_path, tmp_path / "performance.md", tmp_path / "images").read_text()
    assert "| all | naive |" in page
    assert "N = 64, H = 32, V = 512" in page


def test_a_wrong_number_is_not_timed(monkeypatch):
    monkeypatch.setattr(harness, "other_load", lambda seconds=2.0: 0.0)
    naive = statistics.naive
    monkeypatch.setattr(statistics, "naive", lambda *given: {k: 1.01 * v for k, v in naive(*given).items()})
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    with pytest.raises(AssertionError, match="do not compute"):
        statistics.run(quick=True)
