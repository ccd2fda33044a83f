"""The SASS of sm_90 that nvcc makes of a .cu file: the registers, code and loops of its kernels."""

import importlib.util
import re
import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from nvcc import OPTIONS, kept, nvcc, output_of


class Function(NamedTuple):
    """
    Attributes:
        code: opcodes with what follows their first dot.
        loops: of every jump back, from its target on.
    """

    registers: int
    code: list[str]
    loops: list[range]

    def inside(self, loop):
        """Opcodes in a loop, without those of loops within it."""
        within = {n for other in self.loops if other != loop and other[0] >= loop[0]
                  and other[-1] <= loop[-1] for n in other}  # fmt: skip
        return [self.code[n] for n in loop if n not in within]

    def innermost(self):
        """The kinds of opcodes of each loop that has no other, without what follows a dot."""
        loops = [a for a in self.loops if not any(a != b and set(b) <= set(a) for b in self.loops)]
        return [Counter(self.code[n].partition(".")[0] for n in loop) for loop in loops]


def cuobjdump():
    """That of CUDA, or of the package triton."""
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton else None
    found = shutil.which("cuobjdump") or (folder and shutil.which("cuobjdump", path=folder))
    return found or pytest.skip("cuobjdump is not here: pip install triton")


def sass_of(source, folder):
    cubin = folder / "out.cubin"
    code = "-gencode=arch=compute_90,code=sm_90"
    beside = f"-I{source.parent.parent}"  # where the source's own headers are, of whatever commit
    output_of(nvcc(), beside, *OPTIONS, code, "-cubin", source, "-o", cubin)
    return output_of(cuobjdump(), "-sass", cubin) + output_of(cuobjdump(), "-res-usage", cubin)


@cache
def functions(source):
    """Of a .cu file, by their mangled names."""
    return parse(kept(source, "sass", sass_of))


def function(source, part):
    """The one whose mangled name has this part."""
    (name,) = (name for name in functions(source) if part in name)
    return functions(source)[name]


def short(name):
    """A mangled name without its namespaces and arguments."""
    name = re.sub(r"^_ZN7dropinf4cuda(\d+_GLOBAL__N__.*?_cu_[0-9a-f]{8}|4wide)?\d\d", "", name)
    return re.split(r"E+(?:v|N)", name)[0]


def bodies(sass):
    """[(mangled name, lines of code), ...]"""
    return re.findall(r"Function : (\w+)\n(.*?)(?=\n\s*Function :|\Z)", sass, re.DOTALL)


def parse(sass):
    registers = dict(re.findall(r"Function (\w+):\s+REG:(\d+)", sass))
    found = {}
    for name, body in bodies(sass):
        lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*?);", body)
        at = {int(address, 16): n for n, (address, *_) in enumerate(lines)}
        loops = []
        for n, (_, opcode, rest) in enumerate(lines):
            target = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
            begin = at.get(int(target[1], 16), n) if target else n
            if begin < n:
                loops.append(range(begin, n + 1))
        found[name] = Function(int(registers[name]), [opcode for _, opcode, _ in lines], loops)
    return found
