"""How many instructions the columns kernel takes, counted in what nvcc makes for sm_90."""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from nvcc import nvcc
from places import ROOT

# One buffer of a warp: 48 steps of 8 positions.
COORDINATE_POSITIONS = 48 * 8

SOURCE = """
#include "cuda/sampled_outer_columns.cuh"
template __global__ void dropinf::cuda::columns_kernel<dropinf::{element}, true>(
    dropinf::cuda::ColumnsCall);
"""


def disassembler():
    """Of CUDA, or the one that Triton has."""
    triton = importlib.util.find_spec("triton")
    theirs = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return shutil.which("nvdisasm") or (theirs and theirs.exists() and str(theirs))


def lines_of(element, folder):
    """The instructions of the kernel, and its labels."""
    if nvcc() is None or not disassembler():
        pytest.skip("nvcc or nvdisasm is not here")
    source = folder / "columns.cu"
    source.write_text(SOURCE.replace("{element}", element))
    cubin = folder / "columns.cubin"
    command = [nvcc(), "-std=c++17", "-O3", "-arch=sm_90", "-cubin", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(source), "-o", str(cubin)], check=True)
    printed = subprocess.run(
        [disassembler(), "-c", str(cubin)], check=True, capture_output=True, text=True
    ).stdout
    name = rf"columns_kernelINS_{len(element)}{element}ELb1E"  # aligned
    (kernel,) = (
        part for part in printed.split("\n\t.section\t") if re.match(rf"\.text\.\w*{name}", part)
    )
    pattern = r"^(\.L_x_\d+):|^\s+/\*\w{4,}\*/\s+(?:@!?U?P\w+ )?\s*(\S[^;]*);"
    found = re.findall(pattern, kernel, re.M)
    return [label or instruction for label, instruction in found]


def loops(lines):
    """(first, last) of every jump back."""
    at = {line: n for n, line in enumerate(lines) if line.startswith(".L")}
    for n, line in enumerate(lines):
        target = re.search(r"^BRA.*(\.L_x_\d+)", line)
        if target and at.get(target[1], n) < n:
            yield at[target[1]], n


@pytest.mark.parametrize("element", ["BFloat16", "Float16"])
def test_instructions(element, tmp_path):
    """The loop over buffers but for the one within it, which stages what overlaps with no steps."""
    lines = lines_of(element, tmp_path)

    def count(first, last, name):
        return sum(line.startswith(name) for line in lines[first : last + 1])

    found = [loop for loop in loops(lines) if count(*loop, "LDS.128") > 40]
    assert len(found) == 1
    ((first, last),) = found
    inside = {n for a, b in loops(lines) if first < a and b < last for n in range(a, b + 1)}
    taken = [lines[n] for n in range(first, last + 1) if n not in inside and lines[n][:2] != ".L"]
    kinds = Counter(line.split()[0] for line in taken)
    each = len(taken) / COORDINATE_POSITIONS
    print(f"\n{element}: {len(taken)} instructions, {each:.2f} each; {kinds.most_common(12)}")
    assert kinds["FFMA"] == COORDINATE_POSITIONS
    assert kinds["LDS.128"] == 48 + 8  # a cell of dy for each step, and of x for each piece
    assert kinds["STS.64"] == 6 * 4 and kinds["LDG.E.64"] == 6 * 4
    assert each <= 3.2
