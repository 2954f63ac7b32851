"""`python -m tests.divergence.for_hopper NVIDIA FOLDER NAME=LOGITS...`: kernels as machine code for a Hopper GPU.

NVIDIA holds cuobjdump; LOGITS is the type of the logits. Prints for each kernel its registers per thread, the bytes of
its stack, and its warps. In a process of its own, because in Triton's interpreter nothing is compiled.
"""

import re
import subprocess
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kullback.divergence import triton_curves, triton_rows
from tests.divergence.table import TABLE


def compile_kernel(name: str, logits: str, nvidia: Path, folder: Path) -> tuple[int, int, int]:
    text = triton_curves.source(TABLE[name], torch.float32)
    tile, warps = triton_rows.shape(151_936, triton_rows.largest_tile(text))
    constants = {
        "POINTWISE": triton_curves.jitted(text),
        "DTYPE": tl.float32,
        "TILE": tile,
        "GRADIENT": True,
    }
    signature = {"target": f"*{logits}", "model": f"*{logits}", "factor": "*fp32", "values": "*fp32"}
    signature |= dict.fromkeys(("target_stride", "model_stride", "vocab"), "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(at,): [["tt.divisibility", 16]] for at in (0, 1, 4, 5, 6)}
    made = triton.compile(
        ASTSource(triton_rows.divergence_rows, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "enable_fp_fusion": True},
    )
    assert ".target sm_90" in made.asm["ptx"]
    (folder / "cubin").write_bytes(made.asm["cubin"])
    command = [nvidia / "cuobjdump", "-res-usage", folder / "cubin"]
    used = re.search(
        r"REG:(\d+) STACK:(\d+)", subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )
    assert used is not None
    return int(used[1]), int(used[2]), warps


if __name__ == "__main__":
    for case in sys.argv[3:]:
        print(*compile_kernel(*case.split("="), Path(sys.argv[1]), Path(sys.argv[2])))
