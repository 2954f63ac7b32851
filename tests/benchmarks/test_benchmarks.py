"""The harness on small sizes: both sides compute the same number, disagreement is refused, the page is written."""

import json
import time

import pytest
import torch

import kullback as kb
from benchmarks import harness, linear, overhead, report, skipping, trained

SMALL = {"tokens": 24, "width": 16, "vocab": 64, "repeats": 2}


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "other_load", lambda seconds=2.0: 0.0)
    monkeypatch.setattr(linear, "QUICK", SMALL)
    two = {name: kb.divergence(name) for name in ("reverse_kl", "le_cam")}
    monkeypatch.setattr(linear, "family", lambda: two)
    few = {name: kb.divergences()[name] for name in two}  # each is traced anew, which takes seconds
    monkeypatch.setattr(kb, "divergences", lambda: few)
    monkeypatch.setattr(
        linear, "PIECES", {k: v for k, v in linear.PIECES.items() if k not in ("forward_kl", "jsd(0.5)")}
    )
    monkeypatch.setattr(skipping, "QUICK", {"tokens": 64, "pool": 128, "repeats": 1})
    monkeypatch.setattr(skipping, "TEXTS", {"surest": ("reverse_kl",)})
    monkeypatch.setattr(trained, "FOLDER", tmp_path / "trained")
    monkeypatch.setattr(skipping, "TOLERANCES", (0.0, 0.1))
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)  # what is tested here is the harness


def test_from_run_to_page(quiet, tmp_path, capsys):
    for name, module in (("linear", linear), ("overhead", overhead), ("skipping", skipping)):
        path = harness.save(name, module.run(quick=True), tmp_path)
        assert json.loads(path.read_text())["machine"]["threads"] >= 1
    page = report.write(tmp_path, tmp_path / "performance.md", tmp_path / "images").read_text()
    assert "| reverse_kl |" in page
    assert "TRL chunked" in page
    assert "| le_cam |" in page
    assert {p.name for p in (tmp_path / "images").iterdir()} == {"performance-linear.png", "performance-skipping.png"}
    assert "kullback" in capsys.readouterr().out


def test_contestants_that_disagree_are_not_timed():
    assert harness.agree({"a": (1.0, 2.0), "b": (1.0, 2.00001)}, 1e-4)["b"] < 1e-4
    for wrong in (1.01, float("nan")):
        with pytest.raises(AssertionError, match="do not compute"):
            harness.agree({"a": (1.0,), "b": (wrong,)}, 1e-4)


def test_turns_rotate_and_memory_is_seen():
    order = []

    def contestant(name, size):
        def run():
            order.append(name)
            block = torch.ones(size)
            time.sleep(0.001)
            return block.sum()

        return run

    result = harness.take_turns({"small": contestant("small", 10), "large": contestant("large", 2**24)}, 2)
    assert order == ["small", "large", "small", "large", "large", "small"]
    assert all(len(row["seconds"]) == 2 and row["median"] > 0 for row in result.values())
    if result["large"]["peak_bytes"] is not None:
        assert result["large"]["peak_bytes"] >= 0.9 * 2**26
        assert result["small"]["peak_bytes"] < 2**25


def test_the_limit_is_that_of_the_products():
    x = linear.problem(8, 4, 16)
    for options in ({}, {"target": False}, {"head": False}):
        linear.products(x, **options)()
