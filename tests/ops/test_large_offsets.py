"""Elements further than 2^31 from the first one: offsets have 64 bits.

The memory is 4 to 18 GB of zero pages, of which only those that are touched exist.
"""

import mmap
import sys

import numpy as np
import pytest
import torch
from conftest import EPS32, assert_within

from dropinf import ops

# Not in Python's mmap before 3.13. Without it Linux refuses a mapping larger than its memory.
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
FAR = 2**31 + 64  # a multiple of 16 bytes, as a stride, in any dtype


pytestmark = pytest.mark.backends("cpu", "cuda-host")  # a GPU's memory has no such gaps


def sparse(shape, strides, dtype=torch.float32):
    """Zeros of that shape and those strides, in elements, in memory that is not there yet."""
    count = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    try:
        memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | NORESERVE)
    except (OSError, OverflowError) as error:
        pytest.skip(f"{count * dtype.itemsize} bytes of address space are not to be had: {error}")
    return torch.frombuffer(memory, dtype=dtype, count=count).as_strided(shape, strides)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def check(out, exact, sizes, count):
    """Within the rounding bound of a float32 sum of `count` products, and not all zeros."""
    assert exact.any(1).all()
    assert_within(out, exact, (count + 1) * EPS32 * sizes)


# Strides of batch, positions and width: the batch far, or the positions.
STRIDES = pytest.mark.parametrize(
    "strides", [(FAR, 16, 1), (16, FAR, 1)], ids=["batch", "position"]
)


@pytest.mark.ops("sampled_outer")
@STRIDES
def test_sampled_outer(backend, strides):
    x, dy = (sparse((2, 2, 5), strides, torch.bfloat16) for _ in range(2))
    x.copy_(randn(2, 2, 5))
    dy.copy_(randn(2, 2, 5).flip(2))
    at = torch.arange(25).int()
    o_idx, i_idx = at // 5, at % 5
    out = ops.sampled_outer(x, dy, o_idx, i_idx, backend=backend.name)

    def exact(x, dy):
        return torch.einsum("bto,bti->boi", dy.double(), x.double()).flatten(1)

    check(out, exact(x, dy), exact(x.abs(), dy.abs()), 2)


@pytest.mark.ops("sampled_embedding")
@STRIDES
def test_sampled_embedding(backend, strides):
    dy = sparse((2, 2, 5), strides, torch.bfloat16)
    dy.copy_(randn(2, 2, 5))
    ids = torch.tensor([[3, 1], [1, 1]])
    o_idx, i_idx = torch.tensor([0, 4, 2]).int(), torch.tensor([1, 1, 3]).int()
    out = ops.sampled_embedding(ids, dy, o_idx, i_idx, backend=backend.name)

    def exact(dy):
        return torch.einsum("btk,bt...k->b...k", (ids[..., None] == i_idx).double(), dy)

    dy = dy.double()[..., o_idx.long()]
    check(out, exact(dy), exact(dy.abs()), 2)


@pytest.mark.ops("sampled_norm")
@STRIDES
def test_sampled_norm(backend, strides):
    x, dy = (sparse((2, 2, 8), strides, torch.bfloat16) for _ in range(2))
    x.copy_(randn(2, 2, 8))
    dy.copy_(randn(2, 2, 8).flip(2))
    out = ops.sampled_norm(x, dy, torch.arange(16).int(), eps=0.0, backend=backend.name)
    wide = x.double() - x.double().mean(2, keepdim=True)
    n, dy = wide / wide.square().mean(2, keepdim=True).sqrt(), dy.double()

    def exact(n, dy):
        return torch.cat([(n * dy).sum(1), dy.sum(1)], 1)

    # Of n as well: 8 terms of its statistics.
    check(out, exact(n, dy), exact(n.abs() + 1, dy.abs()), 2 + 16)


@pytest.mark.ops("sampled_conv")
@pytest.mark.parametrize(
    "strides",
    [(FAR, 16, 5, 1), (16, FAR, 5, 1), (32, 16, FAR, 1), (32, 16, 1, FAR), (32, 1, FAR, 4)],
    ids=["batch", "channel", "row", "column", "row, channels_last"],
)
def test_sampled_conv(backend, strides):
    shape = (2, 2, 2, 5)  # more outputs than lanes that share them
    x, dy = (sparse(shape, strides, torch.bfloat16) for _ in range(2))
    x.copy_(randn(*shape))
    dy.copy_(randn(*shape).flip(3))
    at = torch.arange(36).int()
    o_idx, i_idx = at // 18, at % 18
    out = ops.sampled_conv(
        x,
        dy,
        o_idx,
        i_idx,
        kernel_size=(3, 3),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        backend=backend.name,
    )

    def exact(x, dy):
        columns = torch.nn.functional.unfold(x.double(), 3, padding=1)
        return torch.einsum("bop,bip->boi", dy.double().flatten(2), columns).flatten(1)

    check(out, exact(x, dy), exact(x.abs(), dy.abs()), 10)


@pytest.mark.ops("gather_grads")
def test_gather_grads(backend):
    flat = sparse((FAR + 9,), (1,), torch.float16)
    matrix = sparse((3, 5), (FAR, 1), torch.float16)
    index = torch.tensor([2, FAR - 64, FAR + 8])
    flat[index] = randn(3, dtype=torch.float16)
    matrix.copy_(randn(3, 5))
    out = ops.gather_grads([flat, matrix], [index, torch.arange(15)], backend=backend.name)
    assert torch.equal(out, torch.cat([flat[index], matrix.flatten()]).float())
    assert out.all()
    pairs = [index[[0, 2, 1, 2]].reshape(2, 2), torch.arange(14).reshape(7, 2)]
    weights = torch.tensor([1.0, -1.0]).repeat(9)
    out = ops.gather_grads([flat, matrix], pairs, weights=weights, backend=backend.name)
    values = (flat[pairs[0]], matrix.flatten()[pairs[1]])
    assert torch.equal(out, torch.cat([v[:, 0].float() - v[:, 1].float() for v in values]))


@pytest.fixture
def far_rows():
    """[2, 7] whose second row is far from the first."""
    rows = sparse((2, 7), (FAR, 1))
    return rows.copy_(randn(2, 7))


@pytest.mark.ops("gram")
def test_gram(backend, far_rows):
    out = ops.gram(far_rows, (0, 3, 7), backend=backend.name)
    rows = far_rows.double()

    def exact(rows):
        return torch.cat([(part.T @ part).tril().flatten() for part in rows.split([3, 4], 1)])[None]

    check(out[None], exact(rows), exact(rows.abs()), 2)


@pytest.mark.ops("row_products")
@pytest.mark.parametrize("m", [2, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_row_products(backend, m, dtype):
    queries, rows = randn(m, 7), sparse((2, 7), (FAR, 1), dtype)
    rows.copy_(4 * randn(2, 7))
    out = ops.row_products(queries, rows, backend=backend.name)
    exact = queries.double() @ rows.double().T
    check(out, exact, queries.double().abs() @ rows.double().abs().T, 7)


@pytest.mark.ops("cholesky_solve")
def test_cholesky_solve(backend, far_rows):
    factor = torch.eye(7) + randn(7, 7).tril() / 8
    solved = sparse((2, 7), (FAR, 1))
    ops.cholesky_solve(factor.flatten(), (0, 7), far_rows, out=solved, backend=backend.name)
    matrix = (factor.double() @ factor.double().T).numpy()
    exact = torch.from_numpy(np.linalg.solve(matrix, far_rows.double().T.numpy()).T)
    torch.testing.assert_close(solved.double(), exact, rtol=1e-5, atol=1e-6)
    assert solved.any(1).all()


@pytest.mark.ops("damped_cholesky")
def test_damped_cholesky(backend, far_rows):
    out = ops.damped_cholesky(
        torch.eye(7).flatten(), (0, 7), 1.0, rows=far_rows, backend=backend.name
    )
    torch.testing.assert_close(out.solved, far_rows / 2, rtol=1e-6, atol=0)
    assert far_rows.any(1).all()
