"""A student in shards over two processes: one engine step equals that of the whole model."""

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
from kullback.lm.models import head_of
from tests.lm.small import gradient, make, make_moment, random_model

GATHERS = {"root": 0, "freed": 2, "freed-tied": 2, "accelerate": 0, "accelerate-tied": 0}  # of two micro-batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes write about one step of word_kd, for each way to shard."""
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
            [sys.executable, "-m", "tests.lm.sharded_two", ",".join([*GATHERS, "fsdp1"]), "word_kd", str(folder)],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
            cwd=root,
        )
        for rank in ("0", "1")
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    return folder


@pytest.mark.parametrize("how", GATHERS)
def test_a_sharded_student_gets_the_gradient_of_the_whole_one(how: str, folder: Path) -> None:
    """Two terms a micro-batch use the head; where FSDP has let go of it, it is gathered once for both."""
    method = make("word_kd")
    at = make_moment(method)
    if how.endswith("tied"):
        at.players["student"] = random_model(1, tie_word_embeddings=True)
    loss, _ = gradient(Engine(method, at))
    whole = {name: p.grad for name, p in at.model("student").named_parameters()}
    seen = json.loads((folder / f"{how}.json").read_text())
    found = torch.load(folder / f"{how}.pt", weights_only=True)
    assert seen["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert seen["gathers"] == GATHERS[how]
    assert set(found) == set(whole)
    scale = max(float(g.abs().max()) for g in whole.values())
    for name, expected in whole.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: n + m)


def test_what_cannot_be_gathered_is_refused_in_a_sentence(folder: Path) -> None:
    assert "fsdp_version=1 keeps the head in a flat buffer" in (folder / "fsdp1.txt").read_text()
    model = random_model(0)
    model.lm_head.weight.ds_id = 7  # how DeepSpeed marks what ZeRO-3 has sharded
    with pytest.raises(ValueError, match=r"zero_optimization\.stage=2"):
        head_of(model)


def test_a_whole_head_is_the_parameter_itself() -> None:
    model = random_model(0)
    assert head_of(model).weight is model.lm_head.weight
    model.lm_head = nn.Sequential(model.lm_head)
    assert head_of(model).weight is None
