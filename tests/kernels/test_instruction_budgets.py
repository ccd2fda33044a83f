"""What the main loops of CUDA kernels cost, counted in the SASS of sm_90: no GPU is needed.

A loop issues its instructions at 4 a cycle of an SM, and reads a word of shared memory for each
lane of a warp in one: these counts are the arithmetic behind the predictions in the kernels' heads.
"""

from collections import Counter

import pytest
import sass
from places import ROOT

OUTER = ROOT / "csrc" / "cuda" / "sampled_outer.cu"
# A coordinate at one position is one multiply-add; a warp's buffer of columns has 48 steps of 8.
BUFFER = 48 * 8


@pytest.mark.more
@pytest.mark.parametrize(
    "element", ["NS_8BFloat16E", "NS_7Float16E", "f"], ids=["bf16", "fp16", "fp32"]
)
@pytest.mark.parametrize("coordinates", [5, 13, 25])
def test_staged_outer(element, coordinates):
    """Two reads, a multiply-add, half of two unpackings, and of 16 bits two widenings."""
    function = sass.function(OUTER, f"staged_kernelI{element}Li{coordinates}E")
    loop = max(function.innermost(), key=lambda loop: loop["FFMA"])
    each, reads = loop.total() / loop["FFMA"], loop["LDS"] / loop["FFMA"]
    print(f"\n{each:.2f} instructions, {reads:.2f} reads, {function.registers} registers")
    assert loop["FFMA"] == 2 * coordinates
    assert each <= (4.8 if element == "f" else 6.8)
    assert reads == 2
    assert function.registers <= 80  # 2 * 384 threads of 65536 registers


@pytest.mark.more
@pytest.mark.parametrize("element", ["NS_8BFloat16E", "NS_7Float16E"], ids=["bf16", "fp16"])
def test_columns_of_outer(element):
    """The loop over buffers but for the one within it, which stages what overlaps with no steps."""
    function = sass.function(OUTER, f"columns_kernelI{element}Lb1E")  # aligned
    found = [Counter(function.inside(loop)) for loop in function.loops]
    (loop,) = (kinds for kinds in found if kinds["LDS.128"] > 40)
    each = loop.total() / BUFFER
    print(f"\n{each:.2f} instructions, {function.registers} registers; {loop.most_common(9)}")
    assert loop["FFMA"] == BUFFER
    assert loop["LDS.128"] == 48 + 8  # a cell of dy for each step, and of x for each piece
    assert loop["STS.64"] == 6 * 4 and loop["LDG.E.64"] == 6 * 4
    assert each <= 3.2


@pytest.mark.more
@pytest.mark.parametrize("kernel", ["part_kernel", "finish_kernel"])
def test_tiles_of_topk(kernel):
    """What a tile costs of which nothing enters, and a step of a sort."""
    function = sass.function(ROOT / "csrc" / "cuda" / "score_topk.cu", kernel)
    (tiles,) = (a for a in function.loops if any("BAR.RED" in code for code in function.inside(a)))
    vote = next(n for n in tiles if "BAR.RED" in function.code[n])
    left = next(n for n in tiles if n > vote and function.code[n] == "BRA")
    rest = max(n for n in tiles[:-1] if function.code[n] == "BRA")
    tile = function.code[tiles[0] : left + 1] + function.code[rest + 1 : tiles[-1] + 1]
    steps = [a for a in function.loops if function.code[a[0] : a[-1]].count("STS.64") == 2]
    step = max(len(a) for a in steps if "BAR.SYNC" in "".join(function.code[a[0] : a[-1]]))
    print(f"\n{len(tile)} instructions a tile, {function.registers} registers, {step} a step")
    kinds = Counter(code.partition(".")[0] for code in tile)
    assert kinds["LDG"] == kinds["FSETP"] == 8 and kinds["BAR"] == 1
    assert kinds["LDS"] == kinds["STS"] == 0
    assert len(tile) <= 72 and step <= 60
    assert function.registers <= 80  # three blocks of an SM


LISTING = """
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


def test_loops_are_found():
    function = sass.parse(LISTING)["two"]
    assert function.registers == 12
    assert function.loops == [range(3, 5), range(1, 7)]
    assert function.innermost() == [Counter(FFMA=1, BRA=1)]
    assert function.inside(range(1, 7)) == ["LDS", "BRA", "STS.128", "BRA"]
