"""Compile every Triton kernel ahead of time, without a GPU, and print what it uses as JSON.

A script, because Triton must be imported without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dropinf.triton_kernels import (
    chunks,
    gram,
    sampled_conv,
    sampled_embedding,
    sampled_norm,
    sampled_outer,
    score_topk,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def variants():
    """(name, kernel, types of what is not an int32, constants, options) of every launch."""
    outer = sampled_outer
    tiles = {"BLOCK_T": outer.BLOCK_T, "BLOCK_R": outer.BLOCK_R}
    for dtype in ("fp32", "bf16", "fp16"):
        types = {"x_ptr": f"*{dtype}", "dy_ptr": f"*{dtype}", "out_ptr": "*fp32"}
        types |= {"o_ptr": "*i32", "i_ptr": "*i32"}
        types |= {"weights_ptr": "*fp32", "entry_weights_ptr": "*fp32"}
        plain, sums = ({name: None} for name in ("weights_ptr", "entry_weights_ptr"))
        yield dtype, outer.sampled_outer_kernel, types, tiles | plain, outer.OPTIONS
        yield f"{dtype} sums", outer.sampled_outer_kernel, types, tiles | sums, outer.OPTIONS
    long = dict.fromkeys(("x_stride_b", "x_stride_t", "dy_stride_b", "dy_stride_t"), "i64")
    yield "long", outer.sampled_outer_kernel, types | long, tiles | plain, outer.OPTIONS

    for file in (sampled_embedding, sampled_conv):
        kernel = getattr(file, f"{file.__name__.rsplit('.', 1)[1]}_kernel")
        tiles = {"BLOCK_T": file.BLOCK_T, "BLOCK_R": file.BLOCK_R}
        for dtype in ("fp32", "bf16", "fp16"):
            types = {"x_ptr": f"*{dtype}", "dy_ptr": f"*{dtype}", "out_ptr": "*fp32"}
            types |= {"ids_ptr": "*i64", "o_ptr": "*i32", "i_ptr": "*i32"}
            yield dtype, kernel, types, tiles, file.OPTIONS

    norm = sampled_norm
    for dtype in ("fp32", "bf16", "fp16"):
        types = {"x_ptr": f"*{dtype}", "dy_ptr": f"*{dtype}", "eps": "fp32"}
        types |= {"statistics_ptr": "*fp32", "sums_ptr": "*fp32"}
        for rms in (False, True):
            tiles = {"RMS": rms, "BLOCK_P": norm.BLOCK_P, "BLOCK_I": norm.BLOCK_I}
            name = f"{dtype}{' rms' if rms else ''}"
            yield name, norm.norm_statistics_kernel, types, tiles, norm.OPTIONS
        tiles = {"BLOCK_T": norm.BLOCK_T, "BLOCK_C": norm.BLOCK_C}
        yield dtype, norm.norm_sums_kernel, types, tiles, norm.OPTIONS
    types = dict.fromkeys(("sums_ptr", "weights_ptr", "entry_weights_ptr", "out_ptr"), "*fp32")
    types["index_ptr"] = "*i32"
    for name in ("weights_ptr", "entry_weights_ptr"):
        tiles = {"BLOCK_R": norm.BLOCK_R, name: None}
        yield f"without {name}", norm.norm_pick_kernel, types, tiles, norm.OPTIONS

    types = {"parts_ptr": "*fp32", "weights_ptr": "*fp32", "out_ptr": "*fp32"}
    yield "", chunks.add_chunks_kernel, types, {"BLOCK": chunks.BLOCK}, chunks.OPTIONS

    types = {"scores_ptr": "*fp32", "values_ptr": "*fp32", "indices_ptr": "*i64"}
    block = score_topk.MIN_BLOCK
    while block <= score_topk.MAX_K:
        tiles = {"LOG_K": block.bit_length() - 1, "WIDE": score_topk.WIDE}
        yield f"k={block}", score_topk.score_topk_kernel, types, tiles, score_topk.options(block)
        block *= 2

    types = {"rows_ptr": "*fp32", "out_ptr": "*fp32", "scale": "fp32"}
    block = gram.MIN_BLOCK_R
    while block <= gram.MAX_BLOCK_R:
        tiles = {"BLOCK_R": block, "BLOCK_N": gram.BLOCK_N}
        yield f"BLOCK_R={block}", gram.gram_kernel, types, tiles, gram.OPTIONS
        block *= 2


def resources(kernel, types, constants, options, capability):
    """What cuobjdump says of the compiled kernel."""
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = dict(part.split(":", 1) for part in text.split() if part.count(":") == 1)
    return {
        "registers": int(used["REG"]),
        "stack": int(used["STACK"]) + int(used["LOCAL"]),
        "shared": max(int(used["SHARED"]), compiled.metadata.shared),
    }


if __name__ == "__main__":  # for the architectures that are named, so many or all
    found, most = [], int(sys.argv[1]) or None
    for capability in map(int, sys.argv[2:]):
        for name, kernel, types, constants, options in islice(variants(), most):
            used = resources(kernel, types, constants, options, capability)
            label = f"{kernel.__name__} {name}".strip()
            about = {"triton": triton.__version__, "kernel": label, "sm": capability}
            found.append({**about, "warps": options["num_warps"], **used})
    json.dump(found, sys.stdout)
