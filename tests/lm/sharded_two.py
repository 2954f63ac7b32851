"""One of two gloo processes with a student in shards: `python -m tests.lm.sharded_two HOW,... METHOD FOLDER`.

HOW: "root" leaves the head whole after the forward pass, "freed" shards it again, "accelerate" shards with accelerate's
own function, "fsdp1" is the older wrapper; "-tied" after it ties head and embedding. Writes, for each, the loss, the
whole gradient by name, and how often the head was gathered, or the sentence with which it was refused.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from kullback.lm.engine import Engine
from tests.lm.small import make, make_moment, random_model


def shard(model: Any, how: str) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    if how == "fsdp1":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    if how == "accelerate":  # an Accelerator shards on accelerators only, its function anywhere
        from accelerate.utils import FullyShardedDataParallelPlugin
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Qwen3DecoderLayer"],
            cpu_ram_efficient_loading=False,
        )
        stand_in = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            torch_device_mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",)),
            parallelism_config=SimpleNamespace(fsdp_dim_names=["dp_shard"]),
            mixed_precision="no",
            is_main_process=True,
            device=torch.device("cpu"),
        )
        return fsdp2_prepare_model(stand_in, model)
    freed = True if how == "freed" else None
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=freed)


def step(how: str, name: str, folder: Path) -> None:
    """One engine step of a student in shards, put into the folder by rank 0."""
    kind, _, tied = how.partition("-")
    rank = int(os.environ["RANK"])
    method = make(name)
    at = make_moment(method, rank=rank, world=2)
    if tied:
        at.players["student"] = random_model(1, tie_word_embeddings=True)
    student = at.model("student")
    wrapped = shard(student, kind)
    engine = Engine(method, at, micro_batches=2)
    total, counted = torch.zeros(()), len(gathers)
    for micro in engine.prepare(0):
        loss = engine.loss(micro, wrapped=None if wrapped is student else wrapped)
        (2 * loss).backward()  # FSDP takes the mean over processes
        total += loss.detach()
    counted = len(gathers) - counted
    dist.all_reduce(total)
    found = {n: p.grad.full_tensor() for n, p in student.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save(found, folder / f"{how}.pt")
        (folder / f"{how}.json").write_text(json.dumps({"loss": float(total), "gathers": counted}))


if __name__ == "__main__":
    hows, name, folder = sys.argv[1].split(","), sys.argv[2], Path(sys.argv[3])
    gathers: list[tuple[int, ...]] = []
    gather = DTensor.full_tensor

    def counting(self: DTensor, **options: Any) -> torch.Tensor:
        gathers.append(tuple(self.shape))
        return gather(self, **options)

    DTensor.full_tensor = counting  # type: ignore[method-assign]
    dist.init_process_group("gloo")
    for how in hows:
        try:
            step(how, name, folder)
        except ValueError as error:  # both processes see it
            (folder / f"{how}.txt").write_text(str(error))
    dist.destroy_process_group()
