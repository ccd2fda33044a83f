"""What the main loops of CUDA kernels cost, counted in the SASS of sm_90: no GPU is needed.

A loop issues its instructions at 4 a cycle of an SM, and reads a word of shared memory for each
lane of a warp in one: these counts are the arithmetic behind the predictions in the kernels' heads.
"""

import importlib.util
import re
import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from nvcc import OPTIONS, kept, nvcc, output_of
from places import ROOT

OUTER = ROOT / "csrc" / "cuda" / "sampled_outer.cu"


class Function(NamedTuple):
    registers: int
    loops: list[Counter]  # the opcodes of each innermost loop

    def loop(self, opcode, beside=()):
        """The one with the most of an opcode, and some of others."""
        found = [loop for loop in self.loops if all(loop[o] for o in beside)]
        return max(found, key=lambda loop: loop[opcode])


def cuobjdump():
    """That of CUDA, or of the package triton."""
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton else None
    found = shutil.which("cuobjdump") or (folder and shutil.which("cuobjdump", path=folder))
    return found or pytest.skip("cuobjdump is not here: pip install triton")


def sass_of(source, folder):
    cubin = folder / "out.cubin"
    code = "-gencode=arch=compute_90,code=sm_90"
    output_of(nvcc(), *OPTIONS, code, "-cubin", source, "-o", cubin)
    return output_of(cuobjdump(), "-sass", cubin) + output_of(cuobjdump(), "-res-usage", cubin)


@cache
def functions(source):
    """Of a .cu file, by their mangled names."""
    return parse(kept(source, "sass", sass_of))


def parse(sass):
    registers = dict(re.findall(r"Function (\w+):\s+REG:(\d+)", sass))
    found = {}
    for name, body in re.findall(r"Function : (\w+)\n(.*?)(?=\n\s*Function :|\Z)", sass, re.DOTALL):
        code = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*?);", body)
        at = {int(address, 16): n for n, (address, *_) in enumerate(code)}
        loops = []
        for n, (_, opcode, rest) in enumerate(code):
            target = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
            begin = at.get(int(target[1], 16), n) if target else n
            if begin < n and not any(begin <= first for first, _ in loops):
                loops.append((begin, n + 1))
        inside = [[opcode.partition(".")[0] for _, opcode, _ in code[b:e]] for b, e in loops]
        found[name] = Function(int(registers[name]), [Counter(opcodes) for opcodes in inside])
    return found


def staged(element, coordinates):
    names = [n for n in functions(OUTER) if f"staged_kernelI{element}Li{coordinates}E" in n]
    assert len(names) == 1
    return functions(OUTER)[names[0]]


# A multiply-add is one coordinate at one position.
@pytest.mark.parametrize(
    "element", ["NS_8BFloat16E", "NS_7Float16E", "f"], ids=["bf16", "fp16", "fp32"]
)
@pytest.mark.parametrize("coordinates", [5, 13, 25])
def test_staged_outer(element, coordinates):
    """Two reads, a multiply-add, half of two unpackings, and of 16 bits two widenings."""
    function = staged(element, coordinates)
    loop = function.loop("FFMA")
    each, reads = loop.total() / loop["FFMA"], loop["LDS"] / loop["FFMA"]
    print(f"\n{each:.2f} instructions, {reads:.2f} reads, {function.registers} registers")
    assert loop["FFMA"] == 2 * coordinates
    assert each <= (4.8 if element == "f" else 6.8)
    assert reads == 2
    assert function.registers <= 80  # 2 * 384 threads of 65536 registers


def test_loops_are_found():
    sass = """
        Function : two
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0010*/                   LDS R0, [R1+UR4] ;
        /*0020*/              @!P0 BRA 0x50 ;
        /*0030*/                   FFMA R2, R0, R0, R2 ;
        /*0040*/               @P1 BRA 0x30 ;
        /*0050*/                   STS.128 [R1], R4 ;
        /*0060*/              @!P0 BRA 0x10 ;
        /*0070*/                   BRA 0x70;
 Function two:
  REG:12 STACK:0 SHARED:0
    """
    function = parse(sass)["two"]
    assert function.registers == 12
    assert function.loops == [Counter(FFMA=1, BRA=1)]
    assert function.loop("FFMA").total() == 2
