"""Every .cu file compiles for every architecture, without torch, a GPU, or a register spilled."""

import re
from functools import cache
from typing import NamedTuple

import pytest
from nvcc import OPTIONS, kept, nvcc, output_of
from places import ROOT
from sass import short

SOURCES = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "bench" / "gpu" / "kernels.cu"]
ARCHITECTURES = ("80", "90", "100")
REGISTERS = 65536  # of an SM of each of these architectures; a block has no more


class Kernel(NamedTuple):
    name: str
    architecture: str
    registers: int
    stack: int
    spilled: int
    static_shared: int
    max_threads: int  # its launch bounds: threads of a block, and blocks of an SM
    min_blocks: int


@cache
def compiled(source):
    """What ptxas says of each kernel."""
    return parse(kept(source, "txt", report_of))


def report_of(source, folder):
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    keep = ["-Xptxas=-v", "--keep", f"--keep-dir={folder}"]
    said = output_of(nvcc(), *OPTIONS, *codes, *keep, "-c", source, f"-o={folder}/out.o")
    bounds = [
        f"bounds {architecture} {name} {threads} {blocks or 1}\n"
        for architecture in ARCHITECTURES
        for ptx in folder.glob(f"*compute_{architecture}.ptx")
        for name, threads, blocks in BOUNDS.findall(ptx.read_text())
    ]
    return said + "".join(bounds)


BOUNDS = re.compile(
    r"\.entry (\w+)\([^)]*\)\s*(?:\.maxntid (\d+)[^\n]*\s*)(?:\.minnctapersm (\d+))?", re.DOTALL
)
ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, "
    r"(\d+) bytes spill stores.*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


def parse(report):
    bounds = {
        (a, n): (int(t), int(b))
        for a, n, t, b in re.findall(r"^bounds (.*) (.*) (.*) (.*)$", report, re.M)
    }
    kernels = []
    for name, architecture, stack, spilled, registers, rest in ENTRY.findall(report):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels.append(
            Kernel(
                short(name),
                architecture,
                int(registers),
                int(stack),
                int(spilled),
                int(shared[1]) if shared else 0,
                *bounds[architecture, name],
            )
        )
    return kernels


@pytest.mark.parametrize(
    "source",
    [
        # The smallest shows that they compile at all; the host runs all of them.
        pytest.param(
            source, id=source.stem, marks=[pytest.mark.more] * (source.stem != "gather_grads")
        )
        for source in SOURCES
    ],
)
def test_resources(source):
    """The report of `pytest -s`: registers within the launch bounds, nothing in local memory."""
    kernels = compiled(source)
    assert {k.architecture for k in kernels} == set(ARCHITECTURES)
    print(f"\n{source.name:24}sm   registers  threads x blocks")
    for k in kernels:
        print(
            f"{k.name[:22]:24}{k.architecture:5}{k.registers:9}  {k.max_threads} x {k.min_blocks}"
        )
        assert k.spilled == 0 and k.stack == 0, f"{k} keeps registers in local memory"
        assert k.static_shared == 0, f"{k} has static shared memory, which the host tests have not"
        assert k.registers * k.max_threads * k.min_blocks <= REGISTERS, f"{k} exceeds its bounds"


SPILLING = """
#include <cuda_runtime.h>
__global__ void __launch_bounds__(1024, 2) many(float* data, int n) {
  float kept[64];
#pragma unroll
  for (int k = 0; k < 64; ++k) kept[k] = data[k * 1024 + threadIdx.x];
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int k = 0; k < 64; ++k) kept[k] += kept[(k + 7) % 64] * data[i];
  }
#pragma unroll
  for (int k = 0; k < 64; ++k) data[k * 1024 + threadIdx.x] = kept[k];
}
"""


@pytest.mark.more
def test_a_spill_is_seen(tmp_path):
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    assert all(k.spilled > 0 and k.max_threads == 1024 for k in compiled(source))
