"""gram, damped_cholesky and its solve, over packed layers, against torch's batches and loops."""

import itertools

import pytest
import torch

from dropinf import ops

SHAPES = [(8, 200), (16, 200), (32, 200), (64, 200), (128, 200), (256, 50), (512, 20), (1024, 4)]
SHAPES += [(n, 1) for n in (8, 16, 32, 64, 128, 256, 512, 1024, 2048)]
RAGGED = "8 to 512"
M = 16


def layers(sizes):
    """Packed matrices that are positive definite as they are, their bounds, rows, and views."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for r in sizes:
        G = torch.randn(r + 3, r, generator=generator)
        parts.append((G.T @ G / r + 0.1 * torch.eye(r)).flatten())
    offsets = (0, *itertools.accumulate(sizes))
    matrices = torch.cat(parts)
    rows = torch.randn(M, offsets[-1], generator=generator)
    return matrices, offsets, rows, ops.unpack(matrices, offsets)


def fastest(solve, n, L):
    """To reach: 3 times torch, 4 with the solve, and never slower than it."""
    return (4 if solve else 3, None) if n <= 128 and L >= 200 else (1, None)


@pytest.mark.parametrize("solve", [False, True], ids=["factors", "and solve"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}, {s[1]}")
def bench_damped_cholesky(timed, shape, solve):
    n, L = shape
    matrices, offsets, rows, _ = layers([n] * L)
    shift = torch.zeros(L)
    batch = matrices.view(L, n, n)
    columns = rows.view(M, L, n).permute(1, 2, 0).contiguous()

    def torch_batch():
        factors, _ = torch.linalg.cholesky_ex(batch)
        return torch.cholesky_solve(columns, factors) if solve else factors

    def dropinf():
        return ops.damped_cholesky(
            matrices, offsets, shift, rows=rows if solve else None, backend="cpu"
        )

    assert not dropinf().info.any()
    timed(
        {"dropinf": dropinf, "torch": torch_batch},
        "dropinf",
        {"torch": fastest(solve, n, L)},
        rounds=5,
    )


@pytest.mark.parametrize("solve", [False, True], ids=["factors", "and solve"])
@pytest.mark.parametrize("sizes", [RAGGED])
def bench_ragged_cholesky(timed, sizes, solve):
    widths = torch.randint(8, 513, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    matrices, offsets, rows, views = layers(widths)
    shift = torch.zeros(len(widths))
    columns = [part.T.contiguous() for part in rows.split(widths, 1)]

    def torch_loop():
        factors = [torch.linalg.cholesky_ex(A)[0] for A in views]
        if not solve:
            return factors
        return [torch.cholesky_solve(q, L) for q, L in zip(columns, factors, strict=True)]

    # A fresh result of 70 MB costs page faults that the small ones of the loop do not.
    out = torch.empty_like(matrices)

    def dropinf(out=None):
        return ops.damped_cholesky(
            matrices, offsets, shift, rows=rows if solve else None, out=out, backend="cpu"
        )

    contestants = {
        "dropinf": lambda: dropinf(out),
        "dropinf, fresh result": dropinf,
        "torch": torch_loop,
    }
    timed(contestants, "dropinf", {"torch": (3, None)}, rounds=5)


@pytest.mark.parametrize("r", [8, 32, 64, 256, 1024])
def bench_gram(timed, r):
    L, n = 50, 512
    rows = torch.randn(n, L * r, generator=torch.Generator().manual_seed(0))
    offsets, out = tuple(range(0, L * r + 1, r)), torch.empty(L * r * r)
    parts, views = rows.split(r, 1), ops.unpack(torch.empty_like(out), offsets)

    def torch_loop():
        for G, F in zip(parts, views, strict=True):
            torch.mm(G.T, G, out=F)

    contestants = {
        "dropinf": lambda: ops.gram(rows, offsets, out=out, backend="cpu"),
        "torch.mm": torch_loop,
    }
    timed(contestants, "dropinf", {"torch.mm": (1, None)}, rounds=5)
