"""A teacher's top-k on disk: found again, refused when it is somebody else's, whole after a kill."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kullback.lm.cache import TopKCache
from kullback.lm.engine import Engine
from kullback.lm.models import tokenizer_fingerprint
from kullback.lm.players import Lazy
from tests.lm.small import gradient, make, make_moment

IDENTITY: dict[str, Any] = {"teacher": "t", "tokenizer": "abc", "top_k": 4}


def cached(folder: Path, **changes: Any) -> Engine:
    method = make("word_kd", top_k=8, cache=str(folder))
    at = make_moment(method)
    at.caches[str(folder)] = TopKCache(
        folder, **{"teacher": "t", "tokenizer": tokenizer_fingerprint(at.tokenizer), "top_k": 8} | changes
    )
    return Engine(method, at, micro_batches=2)


def test_a_cached_teacher_gives_the_gradient_of_the_live_one(tmp_path: Path) -> None:
    plain = make("word_kd", top_k=8)
    loss, whole = gradient(Engine(plain, make_moment(plain)))
    engine = cached(tmp_path / "cache")
    first_loss, first = gradient(engine)
    engine.at.caches[str(tmp_path / "cache")].flush()

    def absent() -> Any:
        raise AssertionError("a full cache asks no teacher")

    again = cached(tmp_path / "cache")
    assert len(again.at.caches[str(tmp_path / "cache")]) == 8
    again.at.players["teacher"] = Lazy(absent)
    second_loss, second = gradient(again)
    assert first_loss == pytest.approx(loss, rel=1e-6)
    assert second_loss == first_loss
    torch.testing.assert_close(first, whole, rtol=1e-4, atol=1e-6)
    assert torch.equal(second, first)


@pytest.mark.parametrize("change", [{"teacher": "other"}, {"tokenizer": "other"}, {"top_k": 5}])
def test_another_teacher_tokenizer_or_k_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    TopKCache(tmp_path / "cache", **IDENTITY)
    with pytest.raises(ValueError, match=f"was made with {next(iter(change))}="):
        TopKCache(tmp_path / "cache", **(IDENTITY | change))


def filled(folder: Path) -> TopKCache:
    cache = TopKCache(folder, **IDENTITY)
    cache.add("ab" * 16, torch.randn(3, 4), torch.arange(12).view(3, 4), torch.randn(3), torch.randn(3))
    cache.flush()
    return cache


def test_a_shard_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    filled(tmp_path / "cache")
    (shard,) = (tmp_path / "cache").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="does not match its checksum; delete it"):
        TopKCache(tmp_path / "cache", **IDENTITY)


def test_a_shard_that_was_not_finished_does_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path / "cache")
    (side,) = (tmp_path / "cache").glob("shard-*.json")
    side.unlink()
    assert len(TopKCache(tmp_path / "cache", **IDENTITY)) == 0
    assert "was not finished" in caplog.text


def test_a_damaged_manifest_and_a_foreign_directory_are_refused(tmp_path: Path) -> None:
    filled(tmp_path / "cache")
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps({})[:1])
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        TopKCache(tmp_path / "cache", **IDENTITY)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(ValueError, match="holds other files"):
        TopKCache(tmp_path / "mine", **IDENTITY)


def test_a_cache_without_k_is_refused() -> None:
    with pytest.raises(ValueError, match=r"say how many with target\.top_k"):
        dataclasses.replace(make("word_kd"), cache="somewhere").targets()
