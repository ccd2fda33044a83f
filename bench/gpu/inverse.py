"""gram, damped_cholesky and its solve over many layers, against torch's batches and loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dropinf import ops
from gpu.ratios import Case, Contestant, Setup, Target, backends_of
from gpu.timing import Bench, relative_error

GROUP = "inverse"
L, M = 50, 16  # layers; right-hand sides
BATCH, LOOP = "torch, batched", "torch, layer by layer"
RESIDUAL = "residual over LAPACK's"
TO_REACH = {64: 5.0, 128: 4.0, 256: 3.0, 512: 2.0, 1024: 1.3}
RAGGED = 10.0


def name_of(sizes: int | str, solve: bool) -> str:
    return f"damped_cholesky, r={sizes}{', and solve' if solve else ''}"


def targets() -> list[Target]:
    made = []
    for solve in (False, True):
        what = " and solve" if solve else ""
        for r, least in TO_REACH.items():
            name = f"cholesky{what}, r={r}: ≥ {least:g}x torch"
            made.append(Target(name, name_of(r, solve), (BATCH, LOOP), at_least=least))
        name = f"cholesky{what}, ragged: ≥ {RAGGED:g}x a loop"
        made.append(Target(name, name_of("8 to 512", solve), (LOOP,), at_least=RAGGED))
    for r in TO_REACH:
        name = f"cholesky, r={r}: residual ≤ 2x LAPACK's"
        made.append(Target(name, name_of(r, False), at_most=2.0, fact=RESIDUAL))
    return made


TARGETS = targets()


def cases() -> list[Case]:
    made = []
    for r in TO_REACH:
        for solve in (False, True):
            quick = r <= 256
            made.append(Case(name_of(r, solve), partial(even, r=r, solve=solve), GROUP, quick))
    for solve in (False, True):
        made.append(Case(name_of("8 to 512", solve), partial(ragged, solve=solve), GROUP))
    for r in (64, 256, 1024):
        made.append(Case(f"gram, r={r}", partial(gram, r=r), GROUP))
    return made


def even(bench: Bench, r: int, solve: bool) -> Setup:
    """L layers of one size."""
    r = max(4, r // 16) if bench.rehearsal else r
    sizes = [r] * (4 if bench.rehearsal else L)

    def batched(matrices: Tensor, columns: list[Tensor]) -> Any:
        factors, _ = torch.linalg.cholesky_ex(matrices.view(-1, r, r))
        return torch.cholesky_solve(columns[0], factors) if solve else factors

    return factorise(bench, sizes, solve, {BATCH: batched})


def ragged(bench: Bench, solve: bool) -> Setup:
    """200 layers of all sizes."""
    num_layers, widest = (6, 40) if bench.rehearsal else (200, 512)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(8, widest + 1, (num_layers,), generator=generator).tolist()
    return factorise(bench, sizes, solve, {})


def factorise(
    bench: Bench,
    sizes: list[int],
    solve: bool,
    peers: dict[str, Callable[[Tensor, list[Tensor]], Any]],
) -> Setup:
    """The matrices are damped already for the peers; ours adds the damping, of zero."""
    offsets = (0, *itertools.accumulate(sizes))
    generator = torch.Generator().manual_seed(0)

    def matrices() -> Tensor:
        parts = []
        for r in sizes:
            G = torch.randn(r + 3, r, generator=generator).to(bench.device)
            parts.append((G.T @ G / r + 0.1 * torch.eye(r, device=bench.device)).flatten())
        return torch.cat(parts)

    touched = sum(2 * r * (r + 1) + 4 * r * r for r in sizes)  # lower triangles in, matrices out
    sets = [matrices() for _ in range(bench.num_sets(touched, most=32))]
    rows = torch.randn(M, offsets[-1], generator=generator).to(bench.device)
    shift = torch.zeros(len(sizes), device=bench.device)
    columns = [q.T.contiguous() for q in rows.split(sizes, 1)]
    views = [ops.unpack(packed, offsets) for packed in sets]
    exact = [torch.linalg.cholesky(A.double()) for A in views[0]]
    right = [torch.cholesky_solve(q.double(), f) for q, f in zip(columns, exact, strict=True)]
    truth = flat(right) if solve else flat(exact)
    even = len(set(sizes)) == 1
    batch_columns = [torch.stack(columns)] if even else []

    def layer_by_layer(i: int) -> list[Tensor]:
        factors = [torch.linalg.cholesky_ex(A)[0] for A in views[i % len(sets)]]
        if not solve:
            return factors
        return [torch.cholesky_solve(q, f) for q, f in zip(columns, factors, strict=True)]

    def ours(backend: str) -> Contestant:
        given = rows if solve else None

        def call(i: int) -> ops.DampedCholesky:
            packed = sets[i % len(sets)]
            return ops.damped_cholesky(packed, offsets, shift, rows=given, backend=backend)

        def error(out: ops.DampedCholesky) -> float:
            if not solve:
                return relative_error(flat(ops.unpack(out.factors, offsets)), truth)
            return relative_error(flat([q.T for q in out.solved.split(sizes, 1)]), truth)

        num_bytes = touched + (8 * rows.numel() if solve else 0)
        return Contestant(call, error, ours=backend != "reference", num_bytes=num_bytes)

    contestants = {b: ours(b) for b in backends_of("damped_cholesky", bench.device)}
    for name, peer in peers.items():
        contestants[name] = Contestant(
            lambda i, peer=peer: peer(sets[i % len(sets)], batch_columns),
            lambda out: relative_error(flat(list(out)), truth),
            graph=not solve,  # torch's batched solve is MAGMA's, whose capture aborts the process
        )
    contestants[LOOP] = Contestant(layer_by_layer, lambda out: relative_error(flat(out), truth))

    def residual() -> float | None:
        """Of the worst of some layers, and the worst of our backends."""
        worst = [0.0]
        for backend in [b for b, c in contestants.items() if c.ours]:
            made = ops.unpack(contestants[backend].call(0).factors, offsets)
            for A, factor in list(zip(views[0], made, strict=True))[:4]:
                A, factor = A.cpu(), factor.cpu().double()
                theirs = torch.linalg.cholesky(A).double()
                wide, floor = A.double(), 1e-7 * A.double().norm()
                off = (wide - factor @ factor.T).norm()
                worst.append((off / ((wide - theirs @ theirs.T).norm() + floor)).item())
        return max(worst) if len(worst) > 1 else None

    return Setup(contestants, {RESIDUAL: residual})


def gram(bench: Bench, r: int) -> Setup:
    n, num_layers = 512, L
    if bench.rehearsal:
        n, r, num_layers = 32, r // 16, 4
    R = num_layers * r
    offsets = tuple(range(0, R + 1, r))
    touched = 4 * (n * R + R * r)
    sets = [torch.randn(n, R, device=bench.device) for _ in range(bench.num_sets(touched))]
    views = [rows.split(r, 1) for rows in sets]
    out = torch.empty(R * r, device=bench.device)
    wide = [G.double() for G in views[0]]
    truth = flat([(G.T @ G).tril() for G in wide])

    def ours(backend: str) -> Contestant:
        def call(i: int) -> Tensor:
            return ops.gram(sets[i % len(sets)], offsets, out=out, backend=backend)

        def error(out: Tensor) -> float:
            return relative_error(out, truth)

        return Contestant(call, error, ours=backend != "reference", num_bytes=touched)

    def batched(i: int) -> Tensor:
        G = sets[i % len(sets)].view(n, num_layers, r).transpose(0, 1)
        return torch.bmm(G.mT, G)

    def layer_by_layer(i: int) -> list[Tensor]:
        return [torch.mm(G.T, G) for G in views[i % len(sets)]]

    def lower(out: Any) -> float:
        return relative_error(flat([F.tril() for F in out]), truth)

    contestants = {b: ours(b) for b in backends_of("gram", bench.device)}
    contestants["torch.bmm"] = Contestant(batched, lower)
    contestants["torch.mm, layer by layer"] = Contestant(layer_by_layer, lower)
    return Setup(contestants)


def flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])
