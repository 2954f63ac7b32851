"""One of two gloo processes with a student in shards: `python -m tests.lm.sharded_two HOW,... METHOD,... FOLDER`.

HOW: "root" leaves the head whole after the forward pass, "freed" shards it again, "accelerate" shards with accelerate's
own function, "fsdp1" is the older wrapper; "-tied" after it ties head and embedding. Writes, for each and each method,
the loss, the whole gradient by name, and how often the head was gathered, or the sentence with which it was refused;
and, where there are shards, the saved model. With "grpo" the student writes and is scored, by rank 1 more often.
"""

import itertools
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
from kullback.lm.players import copy_weights
from kullback.lm.shards import in_shards, whole, whole_state
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
    if in_shards(wrapped) and name == "grpo":
        saved_and_copied(wrapped, random_model(4, tie_word_embeddings=bool(tied)), folder / how)
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
        torch.save(found, folder / f"{how}-{name}.pt")
        (folder / f"{how}-{name}.json").write_text(json.dumps({"loss": float(total), "gathers": counted}))


@torch.no_grad()
def saved_and_copied(student: Any, other: Any, folder: Path) -> None:
    """The main process saves the weights; either copies them; inside `whole` the second calls the model alone."""
    state = whole_state(student)
    copy_weights(student, other, 1.0)
    ids = torch.arange(3, 9)[None]
    with whole(student):
        for _ in range(int(os.environ["RANK"])):
            assert student(input_ids=ids).logits.equal(other(input_ids=ids).logits)
    if os.environ["RANK"] == "0":
        student.save_pretrained(folder, state_dict=state)
        try:
            copy_weights(other, student, 1.0)
        except ValueError as error:
            (folder / "refused.txt").write_text(str(error))


if __name__ == "__main__":
    hows, names, folder = sys.argv[1].split(","), sys.argv[2].split(","), Path(sys.argv[3])
    gathers: list[tuple[int, ...]] = []
    gather = DTensor.full_tensor

    def counting(self: DTensor, **options: Any) -> torch.Tensor:
        gathers.append(tuple(self.shape))
        return gather(self, **options)

    DTensor.full_tensor = counting  # type: ignore[method-assign]
    dist.init_process_group("gloo")
    for how, name in itertools.product(hows, names):
        if (how, name) == ("fsdp1", "grpo"):  # refused before a run begins: it would not even write
            continue
        try:
            step(how, name, folder)
        except ValueError as error:  # both processes see it
            (folder / f"{how}-{name}.txt").write_text(str(error))
    dist.destroy_process_group()
