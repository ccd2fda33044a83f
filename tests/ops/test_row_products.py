"""row_products: products of queries with rows in the types that a store keeps them in."""

import ctypes
import itertools
import mmap
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import EPS32, assert_within, numbers_of_threads

import dropinf
from dropinf import ops
from dropinf.ops import reference

OPS = ("row_products",)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)

# Few queries are multiplied row by row, in threes; many by torch, in pieces of 256 x 1024.
SHAPES = [  # m, c, widths of the layers
    (1, 1, (1,)),
    (1, 13, (0, 7, 8, 0, 9)),
    (2, 6, (1021,)),
    (3, 5, (1024, 1)),
    (5, 31, (3, 2050, 64)),
    (19, 4, (40, 3)),
    (20, 3, (17, 0, 30)),
    (25, 261, (5, 1030)),
    (67, 9, (1300,)),
]
MANY = (25, 1031, (40, 30))  # more than four pieces: threads do not share the queries


def numbers(m, c, widths, dtype, seed=0):
    """Queries, rows, scales that are no powers of two, and bounds."""
    generator = torch.Generator().manual_seed(seed)
    R, bounds = sum(widths), (0, *torch.tensor(widths).cumsum(0).tolist())
    rows = torch.randn(c, R, generator=generator)
    rows = (40 * rows).clamp(-128, 127).to(dtype) if dtype == torch.int8 else rows.to(dtype)
    scales = torch.rand(c, len(widths), generator=generator)
    return torch.randn(m, R, generator=generator), rows, scales, bounds


def truth(queries, rows, scales, bounds):
    """In float64, with the sizes of what is summed."""
    both = []
    for change in (lambda t: t, torch.abs):
        total = torch.zeros(len(queries), len(rows), dtype=torch.float64)
        for l, (a, b) in enumerate(itertools.pairwise(bounds)):
            part = torch.einsum(
                "qr,ir->qi", change(queries[:, a:b].double()), change(rows[:, a:b].double())
            )
            total += part if scales is None else part * scales[:, l].double()
        both.append(total)
    return both


def assert_products(out, queries, rows, scales, bounds):
    """Within the rounding bound of any float32 sum of scaled products."""
    exact, sizes = truth(queries, rows, scales, bounds)
    assert_within(out, exact, (queries.shape[1] + len(bounds) + 2) * EPS32 * sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row_products(backend, shape, dtype):
    queries, rows, scales, bounds = numbers(*shape, dtype)
    for given in (None, scales):
        out = ops.row_products(queries, rows, scales=given, offsets=bounds, backend=backend.name)
        assert_products(out, queries, rows, given, bounds)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [2, 30])
def test_strides_and_nothing_else_written(backend, m, dtype):
    wide, rows, scales, bounds = numbers(m, 20, (30, 20, 4), dtype)
    queries = torch.zeros(2 * m, 60)[::2, 3:57].copy_(wide)
    rows = torch.zeros(40, 64, dtype=dtype)[1::2, 5:59].copy_(rows)
    scales = torch.zeros(20, 9)[:, 2:5].copy_(scales)
    row = torch.full((m + 2, 31), 7.0)
    out = row[1:-1, 6:26]
    options = {"scales": scales, "offsets": list(bounds), "backend": backend.name}
    assert ops.row_products(queries, rows, **options, out=out) is out
    assert_products(out, queries, rows, scales, bounds)
    out.fill_(7.0)
    assert (row == 7).all()
    columns = torch.empty_strided(rows.shape, (1, 20), dtype=dtype).copy_(rows)
    columns_of_scales = scales.T.contiguous().T
    options |= {"scales": columns_of_scales, "offsets": torch.tensor(bounds)}
    out = ops.row_products(queries.T.contiguous().T, columns, **options)
    assert_products(out, queries, rows, scales, bounds)


def before_a_wall(t):
    """The same in memory behind which a read ends the process."""
    size, page = t.numel() * t.element_size(), mmap.PAGESIZE
    wall = -(-size // page) * page
    memory = mmap.mmap(-1, wall + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + wall), page, 0) == 0
    flat = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=wall - size)
    return flat.view(t.shape).copy_(t)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect is called as on Linux")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 13, (0, 7, 4)), (30, 3, (9,))], ids=str)
@pytest.mark.backends("cpu")
def test_nothing_is_read_behind_the_inputs(backend, shape, dtype):
    *inputs, bounds = numbers(*shape, dtype)
    queries, rows, scales = map(before_a_wall, inputs)
    out = ops.row_products(queries, rows, scales=scales, offsets=bounds, backend=backend.name)
    assert_products(out, queries, rows, scales, bounds)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[1], (7, 300, (1030, 5)), *SHAPES[-3:], MANY], ids=str)
@pytest.mark.backends("cpu")
def test_same_bits_whatever_the_number_of_threads(backend, shape, dtype):
    queries, rows, scales, bounds = numbers(*shape, dtype)
    for given in (None, scales):
        options = {"scales": given, "offsets": bounds, "backend": backend.name}
        first, *others = (ops.row_products(queries, rows, **options) for _ in numbers_of_threads())
        assert_products(first, queries, rows, given, bounds)
        for other in others:
            assert torch.equal(first, other)


@pytest.mark.backends("cpu")
def test_same_bits_in_threads_that_torch_has_not_seen(backend):
    """Each caller gets workers of its own; in new ones torch undid MKL's limit of one thread."""
    queries, rows, scales, bounds = numbers(25, 261, (5, 1030), torch.float32)
    options = {"scales": scales, "offsets": bounds, "backend": backend.name}
    first = ops.row_products(queries, rows, **options)
    for _ in numbers_of_threads():
        for _ in range(15):  # the slower the machine, the fewer of which a worker takes part in
            with ThreadPoolExecutor(1) as caller:
                other = caller.submit(ops.row_products, queries, rows, **options).result()
            assert torch.equal(first, other)


@pytest.mark.backends("cpu")
def test_same_bits_alone_and_among_others(backend):
    """Of few queries: those of a row and a query are one sum, wherever they stand."""
    queries, rows, scales, bounds = numbers(6, 41, (70, 1100), torch.int8)
    options = {"offsets": bounds, "backend": backend.name}
    whole = ops.row_products(queries, rows, scales=scales, **options)
    for q in (slice(0, 1), slice(2, 4), slice(1, 6)):
        for i in (slice(0, 3), slice(7, 41), slice(40, 41)):
            part = ops.row_products(queries[q], rows[i], scales=scales[i], **options)
            assert torch.equal(part, whole[q, i])


@pytest.mark.parametrize("m", [1, 9, 30])
def test_every_number_of_its_type(backend, m):
    """All of int8, float16 and bfloat16, subnormals too, are widened exactly."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    queries = torch.full((m, 1), -0.5)
    for rows in (
        torch.arange(-128, 128).to(torch.int8),
        *(every.view(dtype) for dtype in (torch.float16, torch.bfloat16)),
    ):
        # A part of a vector, and a whole one, which is widened by other instructions.
        for width in (1, 8):
            wide = torch.zeros(len(rows), width, dtype=rows.dtype)
            wide[:, -1] = rows
            given = torch.zeros(m, width)
            given[:, -1:] = queries
            out = ops.row_products(given, wide, backend=backend.name)
            wanted = (rows.double() * -0.5).float().expand(m, -1)
            torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_float64(dtype):
    """Of float64 queries, sums are float64."""
    queries, rows, scales, bounds = numbers(3, 17, (6, 60), dtype)
    queries = queries.double() + 2.0**-40
    for given in (None, scales):
        out = ops.row_products(queries, rows, scales=given, offsets=bounds)
        exact, sizes = truth(queries, rows, given, bounds)
        assert out.dtype == torch.float64
        assert_within(out, exact, 2.0**-29 * EPS32 * 70 * sizes)
    with pytest.raises(dropinf.BackendError, match=r"not torch.float64\. Here: 'reference'"):
        ops.row_products(queries, rows, backend="cpu")


def test_only_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(reference, "_MAX_ELEMENTS", 300)
    queries, rows, scales, bounds = numbers(3, 17, (6, 60), torch.int8)
    out = ops.row_products(queries, rows, scales=scales, offsets=bounds, backend="reference")
    assert_products(out, queries, rows, scales, bounds)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, c, R", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (40, 5, 0), (0, 0, 0)])
def test_empty(backend, m, c, R, dtype):
    rows = torch.zeros(c, R, dtype=dtype)
    for scales, bounds in ((None, None), (torch.ones(c, 1), (0, R)), (torch.ones(c, 0), (0,))):
        if scales is not None and bounds[-1] != R:
            continue
        out = ops.row_products(
            torch.zeros(m, R), rows, scales=scales, offsets=bounds, backend=backend.name
        )
        assert torch.equal(out, torch.zeros(m, c))


good = {
    "queries": torch.zeros(2, 4),
    "rows": torch.zeros(3, 4).to(torch.int8),
    "scales": torch.ones(3, 2),
    "offsets": (0, 1, 4),
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"queries": torch.zeros(4)}, r"queries must be \[m, R\] float32 or float64"),
        ({"queries": torch.zeros(2, 4).half()}, "queries must be .*, got torch.float16"),
        ({"rows": torch.zeros(3, 5)}, r"rows must be \[c, R=4\], got \(3, 5\)"),
        ({"rows": torch.zeros(3, 4).double()}, "rows must be float32, .*, got torch.float64"),
        ({"rows": torch.zeros(3, 4).int()}, "rows must be .* on cpu, got torch.int32"),
        ({"rows": torch.zeros(3, 4, device="meta")}, "rows must be .* on cpu, got .* meta"),
        ({"offsets": None}, "scales need offsets"),
        ({"offsets": (0, 5, 4)}, "offsets must rise from 0"),
        ({"offsets": (0, 1, 3)}, r"scales must be .* and offsets end with R=4, got \(3, 2\) and 3"),
        ({"scales": torch.ones(3, 3)}, r"scales must be \[c=3, L=2\].*, got \(3, 3\)"),
        ({"scales": torch.ones(2, 2)}, r"scales must be \[c=3, L=2\].*, got \(2, 2\)"),
        ({"scales": torch.ones(3, 2).double()}, "scales must be torch.float32"),
        ({"out": torch.zeros(2, 3).double()}, "out must be torch.float32"),
        ({"out": torch.zeros(3, 2)}, r"out must be \(2, 3\) with stride 1 in c, got \(3, 2\)"),
        ({"out": torch.zeros(3, 2).T}, r"out must be \(2, 3\) with stride 1 in c"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=f"^row_products: {message}"):
        ops.row_products(**{**good, **change})
