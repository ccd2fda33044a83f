"""sampled_outer against what a user of torch would write, and against one read of its inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dropinf import ops
from dropinf.compression.parts import draw
from gpu.ratios import Case, Contestant, Setup, Target, backends_of, reason_of
from gpu.timing import Bench, Loop, relative_error

GROUP = "sampled_outer"
FLOOR = "one read of x and dy"
DENSE = "dense product + gather"
COMPILED = "torch.compile of the products"
SIZES = (64, 1024, 8192, 65536)
SECTOR = 32  # bytes that memory gives at least
# Layers of an MLP of 4096 x 16384, and KB of room for a position, of which outer_ways.py chooses
# by a prediction: with more of it there are fewer passes, and one block on an SM instead of two.
WIDE, ROOMS = ((4096, 16384), (16384, 4096)), (28, 56)
MAX_PRODUCTS = 20e9  # bytes of [B, T, r] that plain torch forms, three times over


def name_of(dtype: str, r: int, shape: str = "") -> str:
    return f"sampled_outer, {dtype}, r={r}{shape}"


LM_HEAD = "sampled_outer, bfloat16, r=65536, LM head"
SCRATCH = "scratch over x"

TARGETS = [
    Target("sampled_outer, r=64: ≤ 0.5x one read", name_of("bfloat16", 64), (FLOOR,), at_most=0.5),
    Target(
        "sampled_outer, r=1024: ≤ 1.25x one read", name_of("bfloat16", 1024), (FLOOR,), at_most=1.25
    ),
    Target(
        "sampled_outer, r=8192: ≤ 1.25x one read", name_of("bfloat16", 8192), (FLOOR,), at_most=1.25
    ),
    Target(
        "sampled_outer, r=65536: ≤ 2.2x one read", name_of("bfloat16", 65536), (FLOOR,), at_most=2.2
    ),
    Target(
        "sampled_outer, r=65536: ≥ 5x dense + gather",
        name_of("bfloat16", 65536),
        (DENSE,),
        at_least=5,
    ),
    Target(
        "sampled_outer, scratch: no [B,O,I], [B,T,r] or copy of x",
        name_of("bfloat16", 8192),
        at_most=0.5,
        fact=SCRATCH,
    ),
]


def cases() -> list[Case]:
    def case(
        name: str, dtype: torch.dtype, r: int, quick: bool, I: int = 4096, O: int = 4096
    ) -> Case:
        return Case(name, partial(make, dtype=dtype, r=r, I=I, O=O), GROUP, quick)

    made = [case(name_of("bfloat16", r), torch.bfloat16, r, True) for r in SIZES]
    for I, O in WIDE:
        name = name_of("bfloat16", 8192, f", I={I}, O={O}")
        made.append(case(name, torch.bfloat16, 8192, True, I, O))
    made.append(case(LM_HEAD, torch.bfloat16, 65536, False, O=128256))
    return made + [case(name_of("float32", r), torch.float32, r, False) for r in SIZES]


def make(bench: Bench, dtype: torch.dtype, r: int, I: int, O: int) -> Setup:
    B, T = 8, 2048
    wide = (I, O) in WIDE
    by_columns = dtype != torch.float32 and r >= 8192 and O <= 4096  # one window of outputs
    compiles = not wide and not (bench.quick and r in (SIZES[0], SIZES[-1]))  # it says least there
    if bench.rehearsal:
        B, T, I, O, r = 2, 16, I // 64, O // 64, max(16, r // 64)
    size = torch.finfo(dtype).bits // 8
    o_long, i_long = coordinates(O, I, r, bench.device)
    o_idx, i_idx = o_long.int(), i_long.int()
    once = B * T * (I + O) * size
    fewest = B * T * (sectors(i_idx, I, size) + sectors(o_idx, O, size)) * SECTOR + 4 * B * r
    sets = [
        tuple(torch.randn(B, T, n, device=bench.device, dtype=dtype) for n in (I, O))
        for _ in range(bench.num_sets(fewest, most=3))
    ]
    x, dy = sets[0]

    def of_sets(call: Callable[[Tensor, Tensor], Any]) -> Loop:
        return lambda i: call(*sets[i % len(sets)])

    truth = exact(x, dy, o_long, i_long)
    side = round(r**0.5)
    rows, columns = (torch.from_numpy(draw(n, side, r, n)).to(bench.device) for n in (O, I))

    def close(wanted: Tensor) -> Callable[[Tensor], float]:
        return lambda out: relative_error(out.reshape(wanted.shape), wanted)

    def ours(backend: str, **options: Any) -> Contestant:
        call = partial(ops.sampled_outer, o_idx=o_idx, i_idx=i_idx, backend=backend, **options)
        return Contestant(
            of_sets(call), close(truth), ours=backend != "reference", num_bytes=min(fewest, once)
        )

    contestants: dict[str, Contestant] = {}
    left_out: dict[str, str] = {}
    for backend in backends_of("sampled_outer", bench.device):
        contestants[backend] = ours(backend)
        if backend not in ("cuda", "cpu"):
            continue
        orders = {"ordered": partial(staged_order, size=size)}
        if by_columns:
            orders["columns"] = column_order
        for room in ROOMS if wide else ():
            orders[f"{room} KB"] = partial(staged_order, size=size, max_bytes=room * 1024)
        for name, order in orders.items():
            try:
                made = order(o_idx, i_idx, I, O)
                contestants[f"{backend}, {name}"] = ours(backend, order=made)
            except Exception as error:
                left_out[f"{backend}, {name}"] = reason_of(error)
    contestants[FLOOR] = Contestant(of_sets(lambda x, dy: (x.sum(), dy.sum())), num_bytes=once)

    def peer(call: Callable[[Tensor, Tensor], Tensor], wanted: Tensor = truth) -> Contestant:
        return Contestant(of_sets(call), close(wanted), tolerance=2e-2)

    if compiles and 3 * B * T * r * size <= MAX_PRODUCTS:
        torch.compiler.reset()  # or it gives up on the ninth shape
        backend = "eager" if bench.rehearsal else "inductor"  # which takes seconds to compile
        compiled = torch.compile(products, dynamic=False, backend=backend)
        contestants[COMPILED] = peer(lambda x, dy: compiled(x, dy, o_long, i_long))
        contestants["eager products"] = peer(lambda x, dy: products(x, dy, o_long, i_long))
    contestants[DENSE] = peer(lambda x, dy: torch.bmm(dy.mT, x)[:, o_long, i_long])

    def grid(x: Tensor, dy: Tensor) -> Tensor:
        return torch.bmm(dy.index_select(2, rows).mT, x.index_select(2, columns))

    at_grid = torch.cartesian_prod(rows, columns).unbind(1)
    contestants["grid"] = peer(grid, exact(x, dy, *at_grid))

    def scratch() -> float | None:
        out = torch.empty(B, r, device=bench.device)
        peaks: list[int] = []
        mine = [name for name, c in contestants.items() if c.ours]
        for backend in {name.split(",")[0] for name in mine}:
            with bench.peak_bytes(peaks):
                ops.sampled_outer(x, dy, o_idx, i_idx, out=out, backend=backend)
        return max(peaks) / x.nbytes if peaks else None

    return Setup(contestants, {SCRATCH: scratch}, left_out)


def coordinates(O: int, I: int, r: int, device: str) -> tuple[Tensor, Tensor]:
    """o and i [r] int64 of r of the O * I coordinates, as Dropout draws them: in O(r)."""
    at = torch.from_numpy(draw(O * I, r, 0, 0)).to(device)
    return at // I, at % I


def products(x: Tensor, dy: Tensor, o: Tensor, i: Tensor) -> Tensor:
    return (x[:, :, i] * dy[:, :, o]).sum(1)


def exact(x: Tensor, dy: Tensor, o: Tensor, i: Tensor) -> Tensor:
    """The definition in float64, some coordinates at a time."""
    step = max(1, (1 << 25) // (x.shape[0] * x.shape[1]))
    parts = [
        (x[:, :, some_i].double() * dy[:, :, some_o].double()).sum(1)
        for some_o, some_i in zip(o.split(step), i.split(step), strict=True)
    ]
    return torch.cat(parts, 1)


def sectors(index: Tensor, width: int, size: int) -> int:
    """Of one position of an operand, how many the sampled elements touch."""
    return min(len((index.long() * size // SECTOR).unique()), -(-width * size // SECTOR))


def staged_order(o_idx: Tensor, i_idx: Tensor, I: int, O: int, size: int, **options: int) -> Any:
    order = importlib.import_module("dropinf.ops.bank_schedule").staged_order(
        o_idx, i_idx, I, O, size, **options
    )
    if order is None:
        raise ValueError("these coordinates have no staged order")
    return order


def column_order(o_idx: Tensor, i_idx: Tensor, I: int, O: int) -> Any:
    return importlib.import_module("dropinf.ops.column_schedule").column_order(o_idx, i_idx, I, O)
