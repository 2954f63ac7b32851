"""The plain driver: who moves, what is written, and resuming to the same bits."""

import json
import os
import signal

import pytest
import torch
from torch import nn

from kullback.diffusion import Denoiser, Discriminator, FDistill, Mlp, Noise, RatioWeights, two_modes
from kullback.divergence import divergence
from kullback.run.directory import RunDirectory
from kullback.run.learner import Player, fit
from kullback.run.seeds import generator
from kullback.run.state import load_state, save_state
from kullback.run.terms import Term


class Regression:
    """y = 3 x by one weight."""

    def __init__(self, at=None, **player):
        self.model, self.at = nn.Linear(1, 1), at or (lambda step: None)
        nn.init.zeros_(self.model.weight)
        nn.init.zeros_(self.model.bias)
        self.player = Player(self.model, **{"learning_rate": 0.1, **player})

    def players(self):
        return {"model": self.player}

    def moves(self, step):
        return ("model",)

    def draw(self, step):
        self.at(step)
        return torch.randn(32, 1, generator=generator(0, "x", step))

    def terms(self, batch, step):
        return [Term("error", (self.model(batch) - 3 * batch).square().mean(1), coefficient=2.0)]

    def after(self, step):
        pass


def gan():
    torch.manual_seed(0)
    noise, data = Noise(0.2, 4.0), two_modes()
    student = nn.Linear(2, 2)
    fake, ratio = Denoiser(Mlp((2,), 16), 2.0), Discriminator(Mlp((2,), 16, out=1), 2.0)
    return FDistill(
        student, data, fake, ratio, data, RatioWeights(divergence("jeffreys"), noise), noise, batch=32, ema=0.9
    )


def test_it_learns_and_logs_means(tmp_path):
    directory = RunDirectory.create(tmp_path / "run")
    learner = Regression()
    fitted = fit(learner, 100, directory, log_every=10)
    assert fitted.finished
    assert learner.model.weight.item() == pytest.approx(3, abs=0.05)
    rows = directory.metrics()
    assert [row["step"] for row in rows] == list(range(10, 101, 10))
    assert rows[-1]["error"] < rows[0]["error"]


def test_the_first_gradient_is_that_of_coefficient_times_mean():
    learner = Regression(learning_rate=0.1)
    x = learner.draw(0)
    fit(learner, 1)
    assert learner.model.weight.grad.item() == pytest.approx((2 * 2 * -3 * x**2).mean().item(), rel=1e-5)


def test_resume_ends_with_the_same_bits(tmp_path):
    whole = gan()
    fit(whole, 30, RunDirectory.create(tmp_path / "whole"), save_every=11)
    first, second = gan(), gan()
    fit(first, 30, RunDirectory.create(tmp_path / "a"), save_every=11)  # checkpoints at 11, 22 and the end
    directory = RunDirectory.create(tmp_path / "a", resume=True)
    directory.truncate_after(22)
    assert fit(second, 30, directory, resume=True, save_every=11).finished
    for name, player in whole.players().items():
        other = second.players()[name].module.state_dict()
        for key, value in player.module.state_dict().items():
            assert torch.equal(value, other[key]), (name, key)
    told = [RunDirectory(tmp_path / name).metrics() for name in ("whole", "a")]
    assert [{**row, "time": 0} for row in told[0]] == [{**row, "time": 0} for row in told[1]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_leaves_a_checkpoint(tmp_path, number):
    directory = RunDirectory.create(tmp_path / "run")
    learner = Regression(at=lambda step: os.kill(os.getpid(), number) if step == 5 else None)
    fitted = fit(learner, 40, directory)
    assert (fitted.steps, fitted.finished) == (6, False)
    assert directory.last_checkpoint().name == "checkpoint-6"
    again, whole = Regression(), Regression()
    assert fit(again, 40, directory, resume=True).finished
    fit(whole, 40)
    assert torch.equal(again.model.weight, whole.model.weight)


def test_a_second_signal_stops_at_once():
    def twice(step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(Regression(at=twice), 3)


def test_the_rate_falls_linearly_over_the_players_own_steps():
    seen = []
    learner = Regression(learning_rate=1e-3, last_learning_rate=0.0)
    weights = []
    learner.after = lambda step: weights.append(learner.model.weight.item())
    fit(learner, 11)
    seen = [b - a for a, b in zip([0.0, *weights], weights, strict=False)]
    assert seen[0] == pytest.approx(1e-3, rel=1e-3)  # Adam's first step is the rate
    assert seen[5] == pytest.approx(5e-4, rel=0.1)
    assert seen[-1] == 0


def test_bad_settings_and_a_loss_that_is_not_finite():
    with pytest.raises(ValueError, match="steps=0"):
        fit(Regression(), 0)
    with pytest.raises(ValueError, match="no learning_rate"):
        fit(Regression(learning_rate=None), 3)
    learner = Regression()
    learner.draw = lambda step: torch.full((4, 1), torch.inf)
    with pytest.raises(ValueError, match=r"step 0: the loss of model is (nan|inf)"):
        fit(learner, 3)


def test_state_round_trip(tmp_path):
    state = {"a": {"0": torch.arange(3), "x": 1.5}, "list": [1, torch.zeros(()), "text", None]}
    save_state(state, tmp_path / "s")
    back = load_state(tmp_path / "s")
    assert torch.equal(back["a"]["0"], state["a"]["0"])
    assert back["a"]["x"] == 1.5
    assert back["list"][0] == 1
    assert back["list"][2:] == ["text", None]
    assert "__tensor__" in json.loads((tmp_path / "s" / "kullback_state.json").read_text())["list"][1]
