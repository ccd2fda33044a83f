"""sampled_embedding: equal to sampled_outer of one-hot inputs, in float64."""

import pytest
import torch
from conftest import (
    EMULATED,
    EPS32,
    assert_refused_or_nan,
    assert_within,
    numbers_of_threads,
)

import dropinf
from dropinf import ops

OPS = ("sampled_embedding",)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {  # B, T, vocabulary, O, r
    "one position": (3, 1, 5, 7, 11),
    "primes": (2, 13, 17, 11, 60),
    "every coordinate, tokens that repeat": (4, 9, 3, 5, 15),
    "a vocabulary": (2, 40, 5000, 8, 900),
    "no coordinate": (2, 5, 4, 4, 0),
    "no example": (0, 4, 3, 3, 5),
    "no position": (2, 0, 3, 3, 5),
}


def inputs(B, T, vocabulary, O, r, dtype):
    """ids (some -1, which count for nothing), dy, and r distinct sorted coordinates."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, vocabulary, (B, T), generator=generator)
    dy = torch.randn(B, T, O, generator=generator).to(dtype)
    at = torch.randperm(vocabulary * O, generator=generator)[:r].sort().values
    return ids, dy, (at % O).int(), (at // O).int()


def exact(ids, dy, o_idx, i_idx):
    hit = (ids[..., None] == i_idx).double()  # [B, T, r]
    return (hit * dy.double()[..., o_idx.long()]).sum(1)


def shapes_and_dtypes(backend):
    """Every shape; every dtype where kernels are compiled for it, else in turn."""
    one = backend in (*EMULATED, "reference")
    for s, shape in enumerate(SHAPES):
        yield from ((shape, dtype) for d, dtype in enumerate(DTYPES) if d == s % 3 or not one)


@pytest.mark.cases("shape, dtype", shapes_and_dtypes)
def test_sampled_embedding(backend, shape, dtype):
    B, T, _, _, r = shape = SHAPES[shape]
    ids, dy, o_idx, i_idx = inputs(*shape, dtype)
    weights = torch.randn(r, generator=torch.Generator().manual_seed(1))
    row = torch.full((B, r + 9), torch.nan)
    out = ops.sampled_embedding(
        ids, dy, o_idx, i_idx, weights=weights, out=row[:, 4 : 4 + r], backend=backend.name
    )
    weights = weights.double()
    bound = (T + 2) * EPS32 * weights.abs() * exact(ids, dy.abs(), o_idx, i_idx)
    assert_within(out, weights * exact(ids, dy, o_idx, i_idx), bound)
    assert row[:, :4].isnan().all() and row[:, 4 + r :].isnan().all()


def test_strides_and_same_bits(backend):
    """Also for any number of threads, and any batch around an example."""
    T, r = (70, 80) if backend.emulated else (300, 200)  # more than one chunk, and one block
    ids, dy, o_idx, i_idx = inputs(4, T, 50, 12, r, torch.float32)
    wide = torch.zeros(T, 4, 20)
    wide[..., 3:15] = dy.transpose(0, 1)
    strided = wide.transpose(0, 1)[..., 3:15]
    out = torch.full((r, 4), torch.nan).T
    ops.sampled_embedding(ids.int(), strided, o_idx, i_idx, out=out, backend=backend.name)
    assert_within(
        out, exact(ids, dy, o_idx, i_idx), (T + 1) * EPS32 * exact(ids, dy.abs(), o_idx, i_idx)
    )
    torch.use_deterministic_algorithms(False)  # the kernel is deterministic by itself
    for _ in numbers_of_threads():
        again = ops.sampled_embedding(ids, dy, o_idx, i_idx, backend=backend.name)
        assert torch.equal(again, out)
    alone = ops.sampled_embedding(ids[2:3], dy[2:3], o_idx, i_idx, backend=backend.name)
    assert torch.equal(alone, out[2:3])


@pytest.mark.backends("cuda")  # which looks coordinates up by token
def test_only_bad_indices_give_nan(backend):
    ids, dy, o_idx, i_idx = inputs(2, 40, 30, 12, 300, torch.float32)
    truth = exact(ids, dy, o_idx, i_idx)
    bound = 41 * EPS32 * exact(ids, dy.abs(), o_idx, i_idx)
    bad = torch.tensor([0, 130, 299])
    good = torch.ones(300, dtype=torch.bool).index_fill(0, bad, False)
    o_idx[bad] = torch.tensor([-1, 12, 2**31 - 1]).int()
    out = ops.sampled_embedding(ids, dy, o_idx, i_idx, backend=backend.name)
    assert out[:, bad].isnan().all()
    assert_within(out[:, good], truth[:, good], bound[:, good])
    i_idx[200:202] = torch.tensor([5, 4]).int()  # not sorted, so not all are found
    out = ops.sampled_embedding(ids, dy, o_idx, i_idx, backend=backend.name)
    assert out[:, 200:202].isnan().all()


def test_long_examples(backend):
    """Several steps of every warp; more meetings of a coordinate than are added at a time; for
    Triton chunks longer than others."""
    r = 20 if backend.emulated else 200
    ids, dy, o_idx, i_idx = inputs(1, 5000, 40, 6, r, torch.bfloat16)
    out = ops.sampled_embedding(ids, dy, o_idx, i_idx, backend=backend.name)
    bound = 5001 * EPS32 * exact(ids, dy.abs(), o_idx, i_idx)
    assert_within(out, exact(ids, dy, o_idx, i_idx), bound)


def test_opcheck():
    if dropinf.backends()["cpu"] != "available":
        pytest.skip(dropinf.backends()["cpu"])
    ids, dy, o_idx, i_idx = inputs(2, 9, 5, 6, 12, torch.float32)
    torch.use_deterministic_algorithms(False)
    args = (ids, dy, o_idx, i_idx, torch.ones(12), torch.zeros(2, 12))
    torch.library.opcheck(torch.ops.dropinf.sampled_embedding.default, args)


good = {
    "ids": torch.zeros(2, 3).long(),
    "dy": torch.zeros(2, 3, 5),
    "o_idx": torch.zeros(6).int(),
    "i_idx": torch.zeros(6).int(),
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ids": torch.zeros(2, 3)}, r"ids must be \[B, T\] int64 or int32, got torch.float32"),
        ({"ids": torch.zeros(6).long()}, r"ids must be \[B, T\]"),
        ({"dy": torch.zeros(2, 4, 5)}, r"dy must be \[B=2, T=3, O\], got \(2, 4, 5\)"),
        ({"dy": torch.zeros(2, 3, 5).long()}, "dy must be floating point"),
        ({"o_idx": torch.zeros(6).long()}, "o_idx must be torch.int32"),
        ({"i_idx": torch.zeros(5).int()}, r"must both be \[r\], got \(6,\) and \(5,\)"),
        ({"out": torch.zeros(2, 7)}, r"out must be floating point \(2, 6\)"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        ops.sampled_embedding(**{**good, **change})


@pytest.mark.parametrize("index", [5, -1, 2**31 - 1])
@pytest.mark.parametrize("token", [0, 9], ids=["looked up", "no id has it"])
def test_index_out_of_range(backend, index, token):
    o_idx, i_idx = torch.zeros(6).int(), torch.zeros(6).int()
    o_idx[5], i_idx[5] = index, token
    call = {**good, "o_idx": o_idx, "i_idx": i_idx, "backend": backend.name}
    assert_refused_or_nan(
        backend, lambda: ops.sampled_embedding(**call), 5, "o_idx is out of range"
    )


def test_token_out_of_range(backend):
    """Below 0; there is no largest, and what no id names is 0. Ids below 0 meet nothing."""
    i_idx = torch.tensor([-1, 0, 0, 7, 10**9, 2**31 - 1]).int()
    ids = torch.tensor([[-1, 7, 2**32 + 7], [2**32, -1, -(2**32)]])
    call = {**good, "ids": ids, "dy": torch.ones(2, 3, 5), "backend": backend.name}
    run = lambda: ops.sampled_embedding(**call, i_idx=i_idx)  # noqa: E731
    del call["i_idx"]
    assert_refused_or_nan(backend, run, 0, "i_idx is out of range")
    i_idx[0] = 0
    assert run().tolist() == [[0, 0, 0, 1, 0, 0], [0] * 6]


def test_unsorted_tokens_are_refused(backend):
    if backend.name in ("cuda", "triton"):
        pytest.skip("cuda gives NaN for them, and triton takes any order")
    with pytest.raises(ValueError, match="i_idx must be sorted"):
        i_idx = torch.tensor([3, 1, 2, 0, 0, 0]).int()
        ops.sampled_embedding(**{**good, "i_idx": i_idx}, backend=backend.name)
