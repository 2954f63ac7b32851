"""`doctor --bench` on small sizes: every part is measured, a loss that is wrong is found, and what slows is named."""

import json

import pytest
import torch
from typer.testing import CliRunner

import kullback.bench as bench_module
from kullback import FDivergence, divergence
from kullback.bench import APART, Row, Sizes, bench
from kullback.cli import app
from kullback.run import measure

SMALL = Sizes(width=8, vocab=32, tokens=16, rounds=1, prompts=3, completion=4, steps=2)
LOSSES = ("reverse_kl", "jsd", "own f")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setenv("KULLBACK_PROGRESS", "0")
    monkeypatch.setattr(measure, "other_load", lambda seconds: 0.0)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)  # the curves are traced, not compiled


def test_every_part_is_measured():
    found = bench(SMALL)
    at = {row.what: row for row in found.rows}
    assert set(at) == {
        "four matrix products (L)",
        *(f"{name}, {who}" for name in LOSSES for who in ("naive", "kullback")),
        "statistics of each token",
        "rollouts, embedded student",
        "distillation step, embedded pair",
    }
    assert at["four matrix products (L)"].ratio == 1
    for what, row in at.items():
        if "distillation" not in what:
            tokens = 12 if "rollouts" in what else 16
            assert row.tokens_per_second * row.seconds == pytest.approx(tokens), what
    step = at["distillation step, embedded pair"]
    assert 0 < step.tokens_per_second * step.seconds <= 4 * 3 * 1.01  # a reply may end early; seconds are rounded
    assert set(found.apart) == {f"{name}, kullback" for name in LOSSES}
    assert found.agrees
    assert json.loads(json.dumps(found.as_dict()))["agrees"] is True


def test_a_loss_that_is_wrong_is_found_and_fails_the_command(monkeypatch):
    def forward(t, m):
        return (t.exp() * (t - m)).sum(-1)

    def nan(t, m):
        return forward(t, m) * torch.nan

    D = divergence("reverse_kl")
    monkeypatch.setattr(bench_module, "losses", lambda: {"swapped": (D, forward), "broken": (D, nan)})
    monkeypatch.setattr(bench_module, "Sizes", lambda: SMALL)
    result = CliRunner().invoke(app, ["doctor", "--bench", "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)["bench"]
    assert found["agrees"] is False
    assert sum("please report" in line for line in found["advice"]) == 2


def test_the_command_prints_all_rows(monkeypatch):
    monkeypatch.setattr(bench_module, "Sizes", lambda: SMALL)
    result = CliRunner().invoke(app, ["doctor", "--bench"])
    assert result.exit_code == 0, result.output
    for part in ("four matrix products", "own f, kullback", "rollouts", "distillation step", "agree with the naive"):
        assert part in result.stdout


def test_what_slows_is_named(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    rows = [Row("jsd, naive", 1.0), Row("jsd, kullback", 2.0)]
    said = "\n".join(bench_module._advice(rows, {"jsd, kullback": 10 * APART}, load=1.5))
    for part in ("2.00 times the naive", "please report", "keep 1.5 cores busy", "OMP_NUM_THREADS", "no AVX512"):
        assert part in said
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(bench_module.os, "sched_getaffinity", lambda _: {0}, raising=False)
    rows = [Row("jsd, naive", 1.0), Row("jsd, kullback", 0.9)]
    assert list(bench_module._advice(rows, {"jsd, kullback": 0.0}, load=0.1)) == []


def test_without_a_compiler_the_reason_is_named(monkeypatch):
    def fail(f, **_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(bench_module.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    own = FDivergence.from_generator(lambda u: (u - 1) ** 2, name="another own")  # no kernel of an earlier test
    formula = lambda t, m: (m.exp() * ((t - m).exp() - 1) ** 2).sum(-1)  # noqa: E731
    monkeypatch.setattr(bench_module, "losses", lambda: {"squares": (own, formula)})
    found = bench(SMALL)
    assert found.agrees
    assert any("install g++" in line for line in found.advice)


def test_the_number_of_tokens_follows_the_speed(monkeypatch):
    class Clock:
        time = 0.0

        def __call__(self):
            self.time += 0.1  # 64 tokens take 0.1 s
            return self.time

    monkeypatch.setattr(measure, "now", Clock())
    cpu = torch.device("cpu")
    for seconds, tokens in ((0.5, 256), (1e-9, 16), (1e9, 4096)):
        assert bench_module._tokens_for(Sizes(width=4, vocab=8, seconds=seconds), cpu) == tokens


def test_compiling_has_its_limit(monkeypatch):
    monkeypatch.setattr(bench_module, "COMPILING", 0.0)
    x = bench_module.problem(8, 4, 16, torch.device("cpu"))
    rows, apart = bench_module._losses(x, 1)
    assert set(apart) == {f"{name}, kullback, uncompiled" for name in LOSSES}
    assert all(difference < APART for difference in apart.values())
    assert "run this again" in "\n".join(bench_module._advice(rows, apart, load=0.0))
