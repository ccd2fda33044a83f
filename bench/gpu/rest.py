"""gather_grads, score_topk, and the ops of what is no linear layer, against plain torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropinf import ops
from dropinf.compression.parts import draw
from dropinf.ops import dispatch
from dropinf.ops.bank_schedule import AVAILABLE, staged_order
from gpu.outer import coordinates
from gpu.ratios import Case, Contestant, Setup, Target, backends_of
from gpu.timing import Bench, relative_error

GATHER, OTHERS, SCORES = "gather_grads", "embedding and convolution", "scores"
INDEX_CAT, LAUNCHES = "index + cat", "launches"
GATHER_1024 = "gather_grads, 200 layers, r=1024"
TOPK = "score_topk, m=64, n=100,000, R=8192, k=10"
MERGES = {  # m, c, k
    "score_topk, the merge, m=1, 4,194,304 scores, k=10": (1, 1 << 22, 10),
    "score_topk, the merge, m=16, 262,144 scores, k=100": (16, 1 << 18, 100),
}
PRODUCT = "torch.mm"
NORM = "sampled_norm, B=8, T=1024, I=2048, r=1024"

TARGETS = [
    Target("gather_grads, r=1024: one launch", GATHER_1024, at_most=1, fact=LAUNCHES),
    Target("gather_grads, r=1024: ≤ 12 µs", GATHER_1024, at_most=12),
    Target("gather_grads, r=1024: ≥ 50x index + cat", GATHER_1024, (INDEX_CAT,), at_least=50),
    Target("scores: ≥ 0.9x one product", TOPK, (PRODUCT,), at_least=0.9),
]


def cases() -> list[Case]:
    gathers = [
        Case(f"gather_grads, {L} layers, r={r}", partial(gather, L=L, r=r), GATHER, quick=r == 1024)
        for L, r in ((200, 1024), (24, 1024), (200, 256), (200, 4096))  # 24: the small table
    ]
    return [
        *gathers,
        Case(TOPK, topk, SCORES),
        *(Case(name, partial(merge, sizes=sizes), SCORES) for name, sizes in MERGES.items()),
        Case("sampled_embedding, V=50304, O=4096, r=8192", embedding, OTHERS),
        Case(NORM, norm, OTHERS),
        Case("sampled_conv, 128 to 128 channels of 28 x 28, 3 x 3, r=1024", conv, OTHERS),
    ]


def gather(bench: Bench, L: int, r: int) -> Setup:
    """The gradients are views of one buffer, so that one index call over it can compete too."""
    side = 512
    if bench.rehearsal:
        L, side, r = L // 8, 32, r // 16
    touched = L * r * 32  # bytes of sectors
    count = bench.num_sets(touched, most=8)
    buffers = [torch.randn(L * side * side, device=bench.device) for _ in range(count)]
    sets = [list(buffer.view(L, side, side).unbind()) for buffer in buffers]
    indices = [torch.from_numpy(draw(side * side, r, 0, l)).to(bench.device) for l in range(L)]
    everywhere = torch.cat([index + l * side * side for l, index in enumerate(indices)])
    out = torch.empty(L * r, device=bench.device)
    parts = list(out.view(L, r).unbind())
    truth = buffers[0][everywhere].double()

    def index_cat(i: int) -> Tensor:
        grads = sets[i % count]
        return torch.cat([g.view(-1)[at] for g, at in zip(grads, indices, strict=True)])

    def select_into(i: int) -> Tensor:
        for g, at, part in zip(sets[i % count], indices, parts, strict=True):
            torch.index_select(g.view(-1), 0, at, out=part)
        return out

    def ours(backend: str) -> Contestant:
        def call(i: int) -> Tensor:
            return ops.gather_grads(sets[i % count], indices, out=out, backend=backend)

        num_bytes = touched + L * r * 12  # positions in, entries out
        return Contestant(call, error, ours=backend != "reference", num_bytes=num_bytes)

    def error(out: Tensor) -> float:
        return relative_error(out, truth)

    contestants = {b: ours(b) for b in backends_of("gather_grads", bench.device)}
    contestants[INDEX_CAT] = Contestant(index_cat, error)
    contestants["index_select into slices"] = Contestant(select_into, error)
    contestants["one index over one buffer"] = Contestant(
        lambda i: buffers[i % count][everywhere], error
    )

    def launches() -> float | None:
        mine = [c for c in contestants.values() if c.ours]
        counts = [bench.launches(c.call) for c in mine]
        return None if not counts or None in counts else max(counts)

    return Setup(contestants, {LAUNCHES: launches})


def topk(bench: Bench) -> Setup:
    m, n, R, k = 64, 100_000, 8192, 10
    if bench.rehearsal:
        m, n, R, k = 4, 300, 64, 3
    queries, rows = (torch.randn(c, R, device=bench.device) for c in (m, n))
    values = torch.empty(m, k, device=bench.device)
    indices = torch.empty(m, k, device=bench.device, dtype=torch.int64)
    products = [queries.double() @ part.double().T for part in rows.split(4096)]
    truth = torch.cat(products, 1).topk(k).values

    def ours(backend: str) -> Contestant:
        def call(i: int) -> Tensor:
            ops.score_topk(
                queries,
                rows,
                values.fill_(-torch.inf),
                indices.fill_(-1),
                first=0,
                backend=backend,
            )
            return values

        num_bytes = 4 * (n + m) * R
        return Contestant(call, error, ours=backend != "reference", num_bytes=num_bytes)

    def error(out: Tensor) -> float:
        return relative_error(out, truth)

    contestants = {b: ours(b) for b in backends_of("score_topk", bench.device)}
    contestants[PRODUCT] = Contestant(lambda i: torch.mm(queries, rows.T))
    contestants["torch.mm + topk"] = Contestant(
        lambda i: torch.mm(queries, rows.T).topk(k).values, error
    )
    return Setup(contestants)


def merge(bench: Bench, sizes: tuple[int, int, int]) -> Setup:
    """Scores that are there into nothing yet: of a pass over a store, the dearest call."""
    m, c, k = sizes
    if bench.rehearsal:
        c, k = c >> 8, k // 5
    device, dtype = torch.device(bench.device), torch.float32
    count = bench.num_sets(4 * m * c, most=8)
    sets = [torch.randn(m, c, device=device) for _ in range(count)]
    values = torch.empty(m, k, device=device)
    indices = torch.empty(m, k, device=device, dtype=torch.int64)
    truth = sets[0].double().topk(k).values

    def error(out: Tensor) -> float:
        return relative_error(out, truth)

    def ours(backend: str) -> Contestant:
        into = dispatch.kernel("score_topk", backend, device, (dtype,), dtype)

        def call(i: int) -> Tensor:
            into(sets[i % count], 0, values.fill_(-torch.inf), indices.fill_(-1))
            return values

        return Contestant(call, error, ours=backend != "reference", num_bytes=4 * m * c)

    contestants = {b: ours(b) for b in backends_of("score_topk", bench.device)}
    contestants["torch.topk"] = Contestant(lambda i: sets[i % count].topk(k).values, error)
    return Setup(contestants)


def embedding(bench: Bench) -> Setup:
    B, T, V, O, r = 8, 2048, 50304, 4096, 8192
    if bench.rehearsal:
        B, T, V, O, r = 2, 16, 50, 8, 60
    dtype = torch.bfloat16
    ids = torch.randint(V, (B, T), device=bench.device)
    dy = torch.randn(B, T, O, device=bench.device, dtype=dtype)
    i_idx, o_idx = (index.int() for index in coordinates(V, O, r, bench.device))
    truth = torch.zeros(B, r, dtype=torch.float64, device=bench.device)
    for b in range(B):
        hit = ids[b][:, None] == i_idx  # [T, r]
        truth[b] = (hit * dy[b].double()[:, o_idx.long()]).sum(0)
    num_met = int(torch.isin(ids, i_idx.long()).sum())

    def ours(backend: str) -> Contestant:
        def call(i: int) -> Tensor:
            return ops.sampled_embedding(ids, dy, o_idx, i_idx, backend=backend)

        def error(out: Tensor) -> float:
            return relative_error(out, truth)

        num_bytes = ids.nbytes + 32 * num_met + 4 * B * r
        return Contestant(call, error, ours=backend != "reference", num_bytes=num_bytes)

    return Setup({b: ours(b) for b in backends_of("sampled_embedding", bench.device)})


def norm(bench: Bench) -> Setup:
    """Beside it what a capture does where it does not take the op."""
    B, T, I, r = 8, 1024, 2048, 1024
    if bench.rehearsal:
        B, T, I, r = 2, 40, 32, 20
    dtype, device = torch.bfloat16, bench.device
    x, dy = (torch.randn(B, T, I, device=device, dtype=dtype) for _ in range(2))
    count = bench.num_sets(x.nbytes + dy.nbytes, most=8)
    sets = [(x, dy), *((x.clone(), dy.clone()) for _ in range(count - 1))]
    index = torch.from_numpy(draw(2 * I, r, 0, 0)).to(device).int()
    o_idx, i_idx = index % I, torch.where(index < I, index, I)  # of an input of ones
    of_scales = F.layer_norm(x.double(), (I,)) * dy.double()
    truth = torch.cat([of_scales.sum(1), dy.double().sum(1)], 1)[:, index.long()]
    order = staged_order(o_idx, i_idx, I, I, 4, bias=True) if AVAILABLE else None

    def error(out: Tensor) -> float:
        return relative_error(out, truth)

    def ours(backend: str) -> Contestant:
        def call(i: int) -> Tensor:
            return ops.sampled_norm(*sets[i % count], index, eps=1e-5, backend=backend)

        num_bytes = x.nbytes + dy.nbytes + 4 * B * r
        return Contestant(call, error, ours=backend != "reference", num_bytes=num_bytes)

    def by_outer(backend: str) -> Contestant:
        def call(i: int) -> Tensor:
            x, dy = (t.float() for t in sets[i % count])
            options = {"bias": True, "order": order, "backend": backend}
            return ops.sampled_outer(F.layer_norm(x, (I,)), dy, o_idx, i_idx, **options)

        return Contestant(call, error)

    contestants = {b: ours(b) for b in backends_of("sampled_norm", device)}
    contestants |= {
        f"layer_norm + sampled_outer, {b}": by_outer(b)
        for b in backends_of("sampled_outer", device)
        if b not in ("reference", "triton")
    }
    return Setup(contestants)


def conv(bench: Bench) -> Setup:
    B, C, side, kernel, r = 32, 128, 28, 3, 1024
    if bench.rehearsal:
        B, C, side, kernel, r = 2, 4, 7, 3, 30
    dtype, device = torch.bfloat16, bench.device
    x, dy = (torch.randn(B, C, side, side, device=device, dtype=dtype) for _ in range(2))
    I = C * kernel * kernel
    o_long, i_long = coordinates(C, I, r, device)
    o_idx, i_idx = o_long.int(), i_long.int()
    layer: dict[str, Any] = {
        "kernel_size": (kernel, kernel),
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
    }

    def unfold_index(x: Tensor, dy: Tensor) -> Tensor:
        rows = []
        for b in range(B):  # all at once, the patches take nine times x
            patches = F.unfold(x[b : b + 1], kernel, padding=1)[0]  # [I, T]
            rows.append((patches[i_long] * dy[b].flatten(1)[o_long]).sum(1))
        return torch.stack(rows)

    truth = unfold_index(x.double(), dy.double())

    def error(out: Tensor) -> float:
        return relative_error(out, truth)

    def ours(backend: str) -> Contestant:
        def call(i: int) -> Tensor:
            return ops.sampled_conv(x, dy, o_idx, i_idx, **layer, backend=backend)

        num_bytes = x.nbytes + dy.nbytes + 4 * B * r
        return Contestant(call, error, ours=backend != "reference", num_bytes=num_bytes)

    contestants = {b: ours(b) for b in backends_of("sampled_conv", bench.device)}
    contestants["unfold + index"] = Contestant(lambda i: unfold_index(x, dy), error, tolerance=2e-2)
    return Setup(contestants)
