"""Packed matrices for the tests of gram, damped_cholesky and cholesky_solve."""

from __future__ import annotations

import itertools

import numpy as np
import torch

# Nothing, one, registers and their neighbours, panels of 64 and theirs, and wide ones.
SIZES = (0, 1, 2, 7, 8, 9, 17, 31, 64, 65, 130, 257, 300, 512)
FEW = (*SIZES[:11], 330)  # one that shared memory does not hold, with a part of a tile


def sizes_for(backend, once=False):
    """All; for emulated kernels the wide ones, which take nearly all of their time, just once."""
    return FEW if backend.emulated and not once else SIZES


def bounds(sizes):
    return (0, *itertools.accumulate(sizes))


def packed(matrices):
    """[Σ r_l²] float32, with NaN above the diagonals: only lower triangles may be read."""
    parts = [torch.empty(0)]
    for matrix in matrices:
        lower = torch.as_tensor(matrix, dtype=torch.float32).clone()
        lower[torch.ones_like(lower, dtype=torch.bool).triu(1)] = torch.nan
        parts.append(lower.flatten())
    return torch.cat(parts)


def parts(tensor, sizes):
    """Each layer's matrix, as float64 arrays."""
    flat = tensor.double().numpy()
    starts = bounds([r * r for r in sizes])
    return [flat[a : a + r * r].reshape(r, r) for a, r in zip(starts, sizes, strict=False)]


def columns(tensor, sizes):
    """Each layer's slice of packed rows, as float64 arrays."""
    return np.split(tensor.double().numpy(), bounds(sizes)[1:-1], axis=1)


def symmetric(packed_matrices, shift, sizes):
    """The float64 matrices that float32 lower triangles and a shift stand for."""
    lower = [np.tril(np.nan_to_num(p, nan=0.0)) for p in parts(packed_matrices, sizes)]
    return [a + np.tril(a, -1).T + s * np.eye(len(a)) for a, s in zip(lower, shift, strict=True)]


def random_rows(n, R, seed=0):
    return torch.randn(n, R, generator=torch.Generator().manual_seed(seed))


def spread(r, seed):
    G = random_rows(r + 5, r, seed).double().numpy()
    return G.T @ G / (r + 5)


def rank_deficient(r, seed):
    G = random_rows(max(1, r // 3), r, seed).double().numpy()
    return G.T @ G / r


def dominant(r, seed):
    v = random_rows(1, r, seed).double().numpy()
    return 1e4 * v.T @ v + np.eye(r)


def scaled(r, seed):
    size = 10.0 ** np.linspace(-6, 6, r)
    return spread(r, seed) * np.sqrt(size)[:, None] * np.sqrt(size) + np.diag(0.1 * size)


def tridiagonal(r, seed):
    return 2.0 * np.eye(r) - 0.99 * (np.eye(r, k=1) + np.eye(r, k=-1))


# name -> (r, seed) to a matrix, and a shift that keeps float32 pivots positive.
MATRICES = {
    "spread": (spread, 0.01),
    "rank-deficient": (rank_deficient, 0.01),
    "dominant": (dominant, 1.0),
    "scaled": (scaled, 0.0),
    "tridiagonal": (tridiagonal, 0.0),
}


def guarded(shape, pad=8):
    """An empty tensor, the buffer around it, and a check that the buffer's ends are untouched."""
    numel = int(np.prod(shape))
    buffer = torch.full((numel + 2 * pad,), 7.25)

    def untouched():
        return bool((buffer[:pad] == 7.25).all() and (buffer[pad + numel :] == 7.25).all())

    inside = buffer[pad : pad + numel].fill_(torch.nan)
    return inside.view(shape), untouched
