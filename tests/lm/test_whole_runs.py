"""Ten steps are five steps, a kill, and the rest, to the bit; and they are ten steps of two processes, to rounding."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
    "KULLBACK_PROGRESS": "0",
}


def start(output: Path, *more: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "tests.lm.train_ten", str(output), *more],
        env=ENVIRONMENT,
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )


def wait_for_step(process: "subprocess.Popen[bytes]", output: Path, step: int) -> None:
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= step:
            return
        time.sleep(0.005)
    raise AssertionError(
        f"the run did not reach step {step}: {process.stderr.read().decode() if process.stderr else ''}"
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    process = start(output)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors.decode()
    return output


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_resumes_to_the_same_weights(how: signal.Signals, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = start(output)
    wait_for_step(process, output, 6)
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode != 0
    done = len((output / "metrics.jsonl").read_text().splitlines())
    assert 6 <= done < 10, "the run was over before it could be stopped"

    resumed = start(output, "resume")
    _, errors = resumed.communicate(timeout=180)
    assert resumed.returncode == 0, errors.decode()
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (output, whole))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (output, whole)
    ]
    assert [row["step"] for row in rows[0]] == list(range(1, 11))
    assert [{**row, "time": 0} for row in rows[0]] == [{**row, "time": 0} for row in rows[1]]


def test_two_launched_processes_train_the_same_student(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    done = subprocess.run(
        [sys.executable, *command, "-m", "tests.lm.train_ten", str(output)],
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr.decode()
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (output, whole))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 2e-3  # Adam enlarges rounding
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (output, whole)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
