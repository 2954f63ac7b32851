"""The state of a run on disk: what was saved comes back; what an earlier layout lacks is named."""

import json
from pathlib import Path

import pytest
import torch

from kullback.lm.engine import Engine
from kullback.run.state import NAME, load_state, save_state
from tests.lm.small import make, make_moment

GRID = torch.arange(6.0).reshape(2, 3)
STATE = {
    "seen": {"a/b": 1.5, 7: None},
    "ladder": [1, {"rung": 2}, ("x", GRID.T, GRID)],  # not contiguous, and two of one storage
    "players": {"hinted": {"w": torch.eye(2)}, "teacher": {"w": torch.zeros(2, dtype=torch.bfloat16)}},
}


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    """Keys become texts and tuples lists; of two tensors with one name each keeps its place."""
    save_state(STATE, tmp_path)
    found = load_state(tmp_path)
    assert found["seen"] == {"a/b": 1.5, "7": None}
    assert found["ladder"][:2] == [1, {"rung": 2}]
    assert found["ladder"][2][0] == "x"
    pairs = [(found["ladder"][2][1], GRID.T), (found["ladder"][2][2], GRID)]
    pairs += [(found["players"][name]["w"], STATE["players"][name]["w"]) for name in ("hinted", "teacher")]  # type: ignore[call-overload]
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert found.keys() == STATE.keys()
    assert found.get("other") is None


def test_a_lost_key_or_file_is_named_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path}.* has no '{NAME}.json': .*start over with another output"):
        load_state(tmp_path)
    save_state(STATE, tmp_path)
    with pytest.raises(ValueError, match=r"has no 'players/hinted/bias'"):
        load_state(tmp_path)["players"]["hinted"]["bias"]
    (tmp_path / f"{NAME}.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"has no '{NAME}.safetensors:/ladder/2/1'"):
        load_state(tmp_path)


@pytest.mark.parametrize("key", ["controllers", "store", "ledger", "scores", "parts", "players"])
def test_an_engine_refuses_the_checkpoint_of_an_earlier_layout(key: str, tmp_path: Path) -> None:
    method = make("sft")
    save_state(Engine(method, make_moment(method)).state(), tmp_path)
    file = tmp_path / f"{NAME}.json"
    file.write_text(json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != key}))
    with pytest.raises(ValueError, match=rf"checkpoint='{tmp_path}' has no '{key}': another version of kullback"):
        Engine(method, make_moment(method)).restore(load_state(tmp_path))
