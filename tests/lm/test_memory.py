"""What a run will hold: every live player once, in the bytes its weights have when they are saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from kullback.lm.memory import forecast, say
from kullback.lm.parts import ATTRIBUTE
from kullback.lm.players import Lazy, initial
from tests.lm.small import make, make_moment, random_model


def saved(model: Any, folder: Path) -> int:
    """Bytes of the tensors in the file."""
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


def expect(players: dict[str, Any]) -> dict[str, float]:
    return forecast(players, rows=2, length=10, checkpointing=False)


def test_every_live_player_counts_once(tmp_path: Path) -> None:
    teacher, lazy = random_model(2, hidden=24), Lazy(lambda: random_model(5, hidden=32))
    student = random_model(1)
    players = {"teacher": teacher, "same": teacher, "student": student, "reference": initial(student), "later": lazy}
    found = expect(players)
    assert not {"same weights", "later weights"} & found.keys()
    size = saved(student, tmp_path / "student")
    assert found["student weights"] == found["reference weights"] == found["gradients"] == size
    assert found["optimizer (two moments)"] == 2 * size
    assert found["teacher weights"] == saved(teacher, tmp_path / "teacher") > size
    lazy.get()
    assert expect(players)["later weights"] == saved(lazy.get(), tmp_path / "later")
    assert "reference weights" in say(found)


def test_a_tied_head_counts_once(tmp_path: Path) -> None:
    student = random_model(1, tie_word_embeddings=True)
    assert expect({"student": student})["student weights"] == saved(student, tmp_path)


def test_a_student_without_its_adapters_costs_nothing() -> None:
    student = random_model(1)
    plain = expect({"student": student})["student weights"]
    student = get_peft_model(student, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    found = expect({"student": student, "reference": initial(student)})
    adapters = 4 * sum(2 * (16 + 16) for _ in range(2))  # float32: rank 2, 16 in, 2 heads of 8 out, 2 layers
    assert found["student weights"] == plain + adapters
    assert found["gradients"] == adapters
    assert "reference weights" not in found


def test_a_value_head_is_trained_too() -> None:
    at = make_moment(make("ppo"))
    student = at.players["student"]
    found = expect({"student": student})
    delattr(student, ATTRIBUTE)
    plain = expect({"student": student})
    assert found["student weights"] - plain["student weights"] == 4 * (16 + 1)
    assert found["gradients"] - plain["gradients"] == 4 * (16 + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_by_hand(dtype: torch.dtype) -> None:
    """34 bytes per token, layer and unit of width at two bytes an entry; 2 where they are computed again."""
    player = {"student": random_model(1).to(dtype)}
    units = 2 * 10 * 16 * 2 * (1 if dtype == torch.bfloat16 else 2)
    assert expect(player)["activations"] == 34 * units
    assert forecast(player, rows=2, length=10, checkpointing=True)["activations"] == 2 * units
