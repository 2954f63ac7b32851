"""The model that is trained for a measurement: its sampled loss, what it leaves behind, and going on after a stop."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks import trained
from benchmarks.skipping import TINY, entropy


def test_the_sampled_normaliser_is_exact_with_all_and_unbiased_with_few():
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (6, 50))
    labels = torch.tensor([3, 3, 7, 20, 49, 0])
    exact = F.cross_entropy(hidden @ head.T, labels)
    every = trained.cross_entropy(hidden, head, labels, 50, generator)
    torch.testing.assert_close(every, exact, rtol=1e-6, atol=1e-6, check_dtype=False)
    one, label = hidden[:1], labels[:1]
    # exp(loss) is normaliser over the label's weight: its mean over draws is the exact one
    draws = torch.tensor([trained.cross_entropy(one, head, label, 8, generator).exp() for _ in range(4000)])
    right = F.cross_entropy(one @ head.T, label).exp().item()
    assert abs(draws.mean().item() - right) < 4 * draws.std().item() / math.sqrt(len(draws))
    assert draws.std().item() > 0


def test_it_learns_and_goes_on_after_a_stop_as_if_there_had_been_none(tmp_path, monkeypatch):
    monkeypatch.setenv("KULLBACK_PROGRESS", "0")
    assert trained.train(TINY, tmp_path / "whole")
    clock = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(trained.time, "monotonic", lambda: float(next(clock)))
        (tmp_path / "parts").mkdir()
        (tmp_path / "parts" / "tokenizer.json").write_text((tmp_path / "whole" / "tokenizer.json").read_text())
        assert not trained.train(TINY, tmp_path / "parts", seconds=6)
        assert 0 < torch.load(tmp_path / "parts" / "state.pt")["step"] < TINY.teacher
    assert trained.train(TINY, tmp_path / "parts")
    for name in ("student.pt", "teacher.pt"):
        whole, parts = (torch.load(tmp_path / folder / name) for folder in ("whole", "parts"))
        assert all(torch.equal(whole[key], parts[key]) for key in whole), name

    x = trained.problem(64, size=TINY, folder=tmp_path / "whole")
    assert x["model_hidden"].shape == (64, TINY.width)
    assert x["target_head"].shape == (TINY.vocab, TINY.width)
    assert not torch.equal(x["model_head"], x["target_head"])
    assert entropy(x["model_hidden"].detach(), x["model_head"].detach()).mean() < math.log(TINY.vocab)
    held_out = trained.problem(64, held_out=True, size=TINY, folder=tmp_path / "whole")
    assert not torch.equal(held_out["model_hidden"], x["model_hidden"])


def test_what_is_not_trained_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="train it first"):
        trained.problem(64, size=TINY, folder=tmp_path)
