"""One of two gloo processes: `python -m tests.lm.one_of_two METHOD FOLDER`, with RANK etc. in the environment."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from kullback.lm.engine import Engine
from tests.lm.small import gradient, make, make_moment

if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    method = make(name)
    engine = Engine(method, make_moment(method, rank=rank, world=2), micro_batches=2)
    loss, found = gradient(engine)
    total = torch.tensor(loss)
    dist.all_reduce(total)
    dist.all_reduce(found)
    if rank == 0:
        torch.save(found, folder / "gradient.pt")
        (folder / "loss.json").write_text(json.dumps(float(total)))
    dist.destroy_process_group()
