"""A student in shards over two processes: one engine step equals that of the whole model, and it is saved whole."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kullback.lm.engine import Engine
from kullback.lm.models import head_of, load_model
from kullback.lm.players import INITIAL
from kullback.lm.settings import LoraSettings, TrainSettings
from kullback.lm.shards import check_launch
from tests.lm.small import gradient, make, make_moment, random_model

GATHERS = {"root": 0, "freed": 2, "freed-tied": 2, "accelerate": 0, "accelerate-tied": 0}  # of two micro-batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes write about one step of each method, for each way to shard."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root, folder = Path(__file__).parents[2], tmp_path_factory.mktemp("sharded")
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'src'}",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.lm.sharded_two", ",".join([*GATHERS, "fsdp1"]), "word_kd,grpo", str(folder)],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
            cwd=root,
        )
        for rank in ("0", "1")
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    return folder


@pytest.mark.parametrize("how", GATHERS)
@pytest.mark.parametrize("name", ["word_kd", "grpo"])
def test_a_sharded_student_gets_the_gradient_of_the_whole_one(name: str, how: str, folder: Path) -> None:
    """Two terms a micro-batch use the head; where FSDP has let go of it, it is gathered once for both.

    In grpo the student also writes and is scored, for which all of it is gathered: the same text, the same scores.
    """
    method = make(name)
    at = make_moment(method)
    if how.endswith("tied"):
        at.players["student"] = random_model(1, tie_word_embeddings=True)
    loss, _ = gradient(Engine(method, at))
    whole = {name: p.grad for name, p in at.model("student").named_parameters()}
    seen = json.loads((folder / f"{how}-{name}.json").read_text())
    found = torch.load(folder / f"{how}-{name}.pt", weights_only=True)
    assert seen["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert seen["gathers"] == GATHERS[how]
    assert set(found) == set(whole)
    scale = max(float(g.abs().max()) for g in whole.values())
    for weight, expected in whole.items():
        torch.testing.assert_close(found[weight], expected, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=weight: n + m)


@pytest.mark.parametrize("how", GATHERS)
def test_a_sharded_student_is_saved_whole(how: str, folder: Path) -> None:
    saved = load_model(str(folder / how), role="student").state_dict()
    ours = random_model(1, tie_word_embeddings=how.endswith("tied")).state_dict()
    assert saved.keys() == ours.keys()
    assert all(saved[weight].equal(ours[weight]) for weight in ours)
    assert "cannot be copied into a model in shards" in (folder / how / "refused.txt").read_text()


def test_what_cannot_be_gathered_is_refused_in_a_sentence(folder: Path) -> None:
    assert "fsdp_version=1 keeps the head in a flat buffer" in (folder / "fsdp1-word_kd.txt").read_text()
    model = random_model(0)
    model.lm_head.weight.ds_id = 7  # how DeepSpeed marks what ZeRO-3 has sharded
    with pytest.raises(ValueError, match=r"zero_optimization\.stage=2"):
        head_of(model)


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("method", "players", "environment", "reason"),
    [
        ("sft", {}, FSDP2 | {"FSDP_VERSION": "1"}, "fsdp_version=1 .*: set fsdp_version=2"),
        ("sft", {}, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero_stage=3 .*: use zero_stage=2"),
        ("ppo", {}, FSDP2, "shard critic, which PPO trains .*DDP"),
        ("grpo", {"reference": INITIAL}, FSDP2, r"target\.reference='initial' with train\.lora .*: give it as a path"),
    ],
)
def test_a_launch_that_cannot_work_is_refused_at_once(
    method: str, players: dict[str, str], environment: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = make(method), players, TrainSettings(lora=LoraSettings())
    check_launch(*asked)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=reason):
        check_launch(*asked)


def test_a_whole_head_is_the_parameter_itself() -> None:
    model = random_model(0)
    assert head_of(model).weight is model.lm_head.weight
    model.lm_head = nn.Sequential(model.lm_head)
    assert head_of(model).weight is None
