"""sampled_outer: every backend within the rounding bound of a float64 einsum."""

import numpy as np
import pytest
import torch
from conftest import EMULATED, EPS32, assert_refused_or_nan, assert_within, numbers_of_threads
from outer_cases import good
from properties import given, settings, st

import dropinf
from dropinf import ops
from dropinf.ops import bank_schedule, column_schedule, dispatch

OPS = ("sampled_outer",)

AT = ("o_idx", "i_idx")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {  # B, T, I, O, r
    "one position": (3, 1, 5, 7, 11),
    "primes": (2, 13, 17, 11, 60),
    "a tile of positions less one": (2, 7, 8, 16, 100),
    "a whole tile, r = O * I": (2, 8, 8, 8, 64),
    "a tile more one, all coordinates of odd sizes": (2, 9, 9, 7, 63),
    "a vector less one": (1, 15, 31, 33, 500),
    "vectors": (1, 16, 32, 32, 500),
    "a vector more one": (1, 17, 33, 31, 500),
    "longer than one chunk of positions": (2, 257, 40, 24, 900),
    "no coordinate": (3, 5, 4, 4, 0),
    "a single weight": (2, 6, 1, 1, 1),
    "an output as wide as a vocabulary": (1, 1, 64, 50000, 700),
    "a vocabulary, with positions": (1, 40, 16, 40000, 3000),
    "no example": (0, 4, 3, 3, 5),
    "no position": (2, 0, 3, 3, 5),
}


def inputs(B, T, I, O, r, dtype, seed=0, bias=False):
    """x, dy and r distinct sorted coordinates; with bias, its column is among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, I, generator=generator).to(dtype)
    dy = torch.randn(B, T, O, generator=generator).to(dtype)
    width = I + bias
    at = torch.from_numpy(np.random.default_rng(seed).choice(O * width, r, replace=False))
    at = at.sort().values
    return x, dy, (at // width).int(), (at % width).int()


def exact(x, dy, o_idx, i_idx, bias=False):
    """The definition in float64, sharing no code with the package."""
    x, dy = x.double(), dy.double()
    if bias:
        x = torch.cat([x, torch.ones(*x.shape[:2], 1, dtype=torch.float64)], 2)
    return torch.einsum("bto,bti->boi", dy, x)[:, o_idx.long(), i_idx.long()]


def shapes_and_dtypes(backend):
    """Every shape with every dtype, with and without the bias in turn; the emulated kernels, which
    differ by dtype in a load alone, and torch with one of them."""
    one = backend in (*EMULATED, "reference")
    for s, shape in enumerate(SHAPES):
        for d, dtype in enumerate(DTYPES):
            if d == s % 3 or not one:
                yield shape, dtype, (s + d) % 2 == 1


@pytest.mark.cases("shape, dtype, bias", shapes_and_dtypes)
def test_sampled_outer(backend, shape, dtype, bias):
    B, T, _, _, r = shape = SHAPES[shape]
    x, dy, o_idx, i_idx = inputs(*shape, dtype, bias=bias)
    weights = torch.randn(r, generator=torch.Generator().manual_seed(1))
    row = torch.full((B, r + 9), torch.nan)
    out = ops.sampled_outer(
        x,
        dy,
        o_idx,
        i_idx,
        weights=weights,
        bias=bias,
        out=row[:, 4 : 4 + r],
        backend=backend.name,
    )

    truth = exact(x, dy, o_idx, i_idx, bias) * weights.double()
    sizes = exact(x.abs(), dy.abs(), o_idx, i_idx, bias) * weights.abs().double()
    # The bound of any float32 sum of T terms, and its weight.
    assert_within(out, truth, (T + 2) * EPS32 * sizes)
    assert row[:, :4].isnan().all() and row[:, 4 + r :].isnan().all()


STAGED = {  # B, T, I, O, r, and what limits a pass: one for each turn that the staged kernel takes
    "one position of a buffer of more": (2, 1, 5, 7, 11, {}),
    "rows that no copy of 16 bytes fits": (2, 13, 17, 11, 60, {}),
    "aligned rows, a chunk and one position more": (2, 33, 64, 48, 900, {}),
    "passes, many coordinates": (1, 70, 40, 300, 5000, {"max_slots": 3200}),
    "a thread full of coordinates": (1, 9, 96, 160, 9000, {}),
    "more passes than one launch takes": (1, 2, 40, 50, 250, {"max_slots": 64}),
    "few positions in a buffer, windows of dy": (1, 5, 7000, 8000, 700, {"max_bytes": 40000}),
}


def staged_shapes_and_dtypes(backend):
    """Every shape in elements of 4 and of 2 bytes, with and without the bias in turn."""
    for s, shape in enumerate(STAGED):
        yield shape, torch.float32, s % 2 == 0
        yield shape, DTYPES[1 + s % 2], s % 2 == 1


@pytest.mark.backends("cuda")  # no other takes an order
@pytest.mark.cases("shape, dtype, bias", staged_shapes_and_dtypes)
def test_staged(backend, shape, dtype, bias):
    """The order changes neither which entry is where nor, but for rounding, its value."""
    *sizes, limits = STAGED[shape]
    B, T, I, O, r = sizes
    x, dy, o_idx, i_idx = inputs(*sizes, dtype, bias=bias)
    order = bank_schedule.staged_order(o_idx, i_idx, I, O, dtype.itemsize, bias=bias, **limits)
    weights = torch.randn(r, generator=torch.Generator().manual_seed(1))
    row = torch.full((B, r + 9), torch.nan)
    out = ops.sampled_outer(
        x,
        dy,
        o_idx,
        i_idx,
        weights=weights,
        bias=bias,
        order=order,
        out=row[:, 4 : 4 + r],
        backend=backend.name,
    )
    if bias:
        x = torch.cat([x, torch.ones(B, T, 1, dtype=dtype)], 2)
    terms = x.double()[:, :, i_idx.long()] * dy.double()[:, :, o_idx.long()] * weights.double()
    assert_within(out, terms.sum(1), (T + 2) * EPS32 * terms.abs().sum(1))
    assert row[:, :4].isnan().all() and row[:, 4 + r :].isnan().all()


@pytest.mark.backends("cuda")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_staged_views(backend, dtype):
    """Rows that start anywhere and lie apart, weighted sums, and the same bits for any batch."""
    B, T, I, O, r, s = 3, 40, 24, 32, 200, 3
    x, dy, o_idx, i_idx = inputs(B, T, I, O, r * s, dtype)
    wide = torch.zeros(T, B, I + 5, dtype=dtype)
    wide[..., 3 : 3 + I] = x.transpose(0, 1)
    x_view = wide.transpose(0, 1)[..., 3 : 3 + I]
    o_idx, i_idx = (t.reshape(s, r).T.contiguous() for t in (o_idx, i_idx))
    weights = torch.randn(r, s, generator=torch.Generator().manual_seed(1))
    order = bank_schedule.staged_order(o_idx, i_idx, I, O, dtype.itemsize, max_slots=320)
    assert len(order.passes) > 1

    def run(part):
        return ops.sampled_outer(
            x_view[part], dy[part], o_idx, i_idx, weights=weights, order=order, backend=backend.name
        )

    out = run(slice(None))
    truth = (exact(x, dy, o_idx, i_idx) * weights.double()).sum(-1)
    magnitudes = (exact(x.abs(), dy.abs(), o_idx, i_idx) * weights.abs().double()).sum(-1)
    assert_within(out, truth, (T + s + 1) * EPS32 * magnitudes)
    assert torch.equal(out, run(slice(None))) and torch.equal(out[1:2], run(slice(1, 2)))


@pytest.mark.backends("cuda-host")  # the shared memory of a GPU is what it is
@pytest.mark.parametrize("O, staged_on", [(4000, (99, 163)), (8000, (163,))])
def test_chips_with_less_shared_memory(backend, request, O, staged_on):
    """sm_86 and sm_89 have 99 KB for a block: where four positions do not fit, the call is direct,
    as its bits show."""
    x, dy, o_idx, i_idx = inputs(1, 40, 8000, O, 50, torch.bfloat16)
    order = bank_schedule.staged_order(o_idx, i_idx, 8000, O, 2)
    terms = x.double()[:, :, i_idx.long()] * dy.double()[:, :, o_idx.long()]
    direct = ops.sampled_outer(x, dy, o_idx, i_idx, backend=backend.name)
    set_max = torch.ops.dropinf_host.set_max_shared_bytes
    request.addfinalizer(lambda: set_max(163 * 1024))  # which all other tests have
    for limit in (99, 163):
        set_max(limit * 1024)
        out = ops.sampled_outer(x, dy, o_idx, i_idx, order=order, backend=backend.name)
        assert_within(out, terms.sum(1), 41 * EPS32 * terms.abs().sum(1))
        assert torch.equal(out, direct) == (limit not in staged_on)


COLUMNS = {  # B, T, I, O, r: one for each turn that the columns kernel takes
    "one position": (2, 1, 8, 12, 20),
    "no position": (2, 0, 3, 3, 5),
    "no coordinate": (2, 5, 8, 12, 0),
    "two chunks, the last buffers of both not full": (1, 203, 64, 48, 900),
    "two whole buffers": (2, 16, 32, 64, 1500),
    "rows that no read of 8 bytes fits": (2, 13, 17, 11, 60),
    "columns and outputs of two passes each": (1, 9, 2060, 4100, 3000),
}


@pytest.fixture
def room_for_columns(backend, request):
    """The shared memory of sm_90; the columns kernel takes more than other tests have."""
    if backend.emulated:
        set_max = torch.ops.dropinf_host.set_max_shared_bytes
        request.addfinalizer(lambda: set_max(163 * 1024))
        set_max(227 * 1024)


def columns_and_dtypes(backend):
    """Every shape in both dtypes, with and without the bias in turn."""
    for s, shape in enumerate(COLUMNS):
        for d, dtype in enumerate(DTYPES[1:]):
            yield shape, dtype, (s + d) % 2 == 0


def of_columns(backend, x, dy, o_idx, i_idx, bias=False, **options):
    order = column_schedule.column_order(o_idx, i_idx, x.shape[2], dy.shape[2], bias=bias)
    return ops.sampled_outer(
        x, dy, o_idx, i_idx, bias=bias, order=order, backend=backend.name, **options
    )


def assert_entries(out, x, dy, o_idx, i_idx, weights=None, bias=False):
    """Within the bound of any float32 sum of T terms, and its weight."""
    if bias:
        x = torch.cat([x, torch.ones(*x.shape[:2], 1, dtype=x.dtype)], 2)
    terms = x.double()[:, :, i_idx.long()] * dy.double()[:, :, o_idx.long()]
    if weights is not None:
        terms = terms * weights.double()
    assert_within(out, terms.sum(1), (x.shape[1] + 2) * EPS32 * terms.abs().sum(1))


@pytest.mark.backends("cuda")  # no other takes an order
@pytest.mark.cases("shape, dtype, bias", columns_and_dtypes)
@pytest.mark.usefixtures("room_for_columns")
def test_columns(backend, shape, dtype, bias):
    """The order changes neither which entry is where nor, but for rounding, its value."""
    shape = COLUMNS[shape]
    B, r = shape[0], shape[-1]
    x, dy, o_idx, i_idx = inputs(*shape, dtype, bias=bias)
    weights = torch.randn(r, generator=torch.Generator().manual_seed(1))
    row = torch.full((B, r + 9), torch.nan)
    out = of_columns(backend, x, dy, o_idx, i_idx, bias, weights=weights, out=row[:, 4 : 4 + r])
    assert_entries(out, x, dy, o_idx, i_idx, weights, bias)
    assert row[:, :4].isnan().all() and row[:, 4 + r :].isnan().all()


@pytest.mark.backends("cuda")
@pytest.mark.usefixtures("room_for_columns")
def test_uneven_columns(backend):
    """One column and one output have most coordinates, one of them often; others have none."""
    x, dy, o_idx, i_idx = inputs(1, 11, 40, 300, 200, torch.bfloat16)
    o_idx[:150], i_idx[:150] = torch.arange(150) * 2, 7
    o_idx[140:150], o_idx[150:], i_idx[150:] = 9, 5, torch.arange(50) % 20
    assert_entries(of_columns(backend, x, dy, o_idx, i_idx), x, dy, o_idx, i_idx)


@pytest.mark.backends("cuda")
@pytest.mark.usefixtures("room_for_columns")
def test_columns_of_views(backend):
    """Rows that start anywhere and lie apart; the same bits for any batch, order and alignment."""
    B, T, I, O, r = 3, 30, 24, 32, 200
    x, dy, o_idx, i_idx = inputs(B, T, I, O, r, torch.bfloat16)
    wide = torch.full((T, B, I + 5), torch.nan, dtype=x.dtype)
    wide[..., 3 : 3 + I] = x.transpose(0, 1)
    x_view = wide.transpose(0, 1)[..., 3 : 3 + I]
    out = of_columns(backend, x_view, dy, o_idx, i_idx)
    assert_entries(out, x, dy, o_idx, i_idx)
    assert torch.equal(out, of_columns(backend, x_view, dy, o_idx, i_idx))
    assert torch.equal(out, of_columns(backend, x, dy, o_idx, i_idx))
    assert torch.equal(out[1:2], of_columns(backend, x[1:2], dy[1:2], o_idx, i_idx))
    mixed = torch.randperm(r, generator=torch.Generator().manual_seed(1))
    assert torch.equal(out[:, mixed], of_columns(backend, x, dy, o_idx[mixed], i_idx[mixed]))


SUMS = {  # B, T, I, O, r, s: one for each turn that the kernel which adds coordinates takes
    "one entry": (1, 5, 8, 12, 1, 4),
    "a block of entries, and a part of one": (3, 9, 32, 48, 100, 2),
    "two chunks, rows that no read of 8 bytes fits": (2, 203, 17, 11, 40, 3),
    "more coordinates than a pass has": (1, 3, 64, 96, 5000, 5),
    "no position": (2, 0, 3, 3, 5, 2),
    "no coordinate": (2, 5, 3, 3, 5, 0),
}


def sums(B, T, I, O, r, s, dtype, bias):
    """x, dy, coordinates [r, s] that may repeat, in any order, and weights, a third of them 0."""
    x, dy, _, _ = inputs(B, T, I, O, 0, dtype)
    generator = torch.Generator().manual_seed(1)
    o_idx = torch.randint(O, (r, s), generator=generator).int()
    i_idx = torch.randint(I + bias, (r, s), generator=generator).int()
    weights = torch.randn(r, s, generator=generator)
    return x, dy, o_idx, i_idx, weights * (torch.rand(r, s, generator=generator) > 1 / 3)


def assert_sums(out, x, dy, o_idx, i_idx, weights, bias):
    """Within the bound of a float32 sum of T terms, its weight, and a sum of s."""
    weights = torch.ones(o_idx.shape) if weights is None else weights
    truth = (exact(x, dy, o_idx, i_idx, bias) * weights.double()).sum(-1)
    sizes = (exact(x.abs(), dy.abs(), o_idx, i_idx, bias) * weights.abs().double()).sum(-1)
    assert_within(out, truth, (x.shape[1] + o_idx.shape[1] + 1) * EPS32 * sizes)


@pytest.mark.backends("cuda")
@pytest.mark.parametrize("shape", SUMS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.usefixtures("room_for_columns")
def test_columns_of_sums(backend, shape, dtype, weighted):
    """[r, s] coordinates, with and without the bias in turn, into a row with any strides."""
    B, r, bias = SUMS[shape][0], SUMS[shape][4], list(SUMS).index(shape) % 2 == 1
    x, dy, o_idx, i_idx, weights = sums(*SUMS[shape], dtype, bias)
    given = weights if weighted else None
    row = torch.full((r + 9, 2 * B), torch.nan).T[::2]
    out = of_columns(backend, x, dy, o_idx, i_idx, bias, weights=given, out=row[:, 4 : 4 + r])
    assert_sums(out, x, dy, o_idx, i_idx, given, bias)
    assert row[:, :4].isnan().all() and row[:, 4 + r :].isnan().all()


@pytest.mark.backends("cuda")
@pytest.mark.usefixtures("room_for_columns")
def test_columns_add_sums_in_order(backend):
    """The bits are those of r * s entries, added from j = 0 on; of s = 1 those of [r]."""
    x, dy, o_idx, i_idx, weights = sums(2, 20, 24, 32, 70, 3, torch.bfloat16, True)
    flat = [t.flatten() for t in (o_idx, i_idx, weights)]
    each = of_columns(backend, x, dy, *flat[:2], True, weights=flat[2])
    of_one = [t[:, None] for t in flat]
    one = of_columns(backend, x, dy, *of_one[:2], True, weights=of_one[2])
    assert torch.equal(one, each)
    first, second, third = each.reshape(2, 70, 3).unbind(2)
    assert not torch.equal(first + second + third, first + (second + third))
    out = of_columns(backend, x, dy, o_idx, i_idx, True, weights=weights)
    assert torch.equal(out, first + second + third)
    assert torch.equal(
        out[1:], of_columns(backend, x[1:], dy[1:], o_idx, i_idx, True, weights=weights)
    )


@pytest.mark.backends("cuda")
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.usefixtures("room_for_columns")
def test_columns_leave_out_of_sums(backend, bias):
    """What has a weight of 0, also where it is not finite; an entry of such alone is 0."""
    x, dy, o_idx, i_idx, weights = sums(2, 35, 24, 32, 200, 3, torch.bfloat16, bias)
    o_idx[o_idx == 0], weights[0] = 1, 0
    o_idx[weights == 0] = 0  # a column that only these have
    finite = dy.clone()
    finite[..., 0] = 0
    dy[..., 0] = torch.tensor([torch.inf, torch.nan])[torch.arange(35) % 2]
    out = of_columns(backend, x, dy, o_idx, i_idx, bias, weights=weights)
    assert_sums(out, x, finite, o_idx, i_idx, weights, bias)
    assert (out[:, 0] == 0).all() and out[:, 1:].any(1).all()
    assert of_columns(backend, x, dy, o_idx, i_idx, bias)[:, 0].isnan().all()


@pytest.mark.backends("cuda-host")
@pytest.mark.usefixtures("room_for_columns")
def test_columns_without_room(backend):
    """sm_80 has 163 KB for a block, which are too few: the call is direct, as its bits show."""
    x, dy, o_idx, i_idx = inputs(1, 40, 30, 50, 60, torch.bfloat16)
    direct = ops.sampled_outer(x, dy, o_idx, i_idx, backend=backend.name)
    assert not torch.equal(of_columns(backend, x, dy, o_idx, i_idx), direct)
    pairs = [index.reshape(-1, 2) for index in (o_idx, i_idx)]
    torch.ops.dropinf_host.set_max_shared_bytes(163 * 1024)
    assert torch.equal(of_columns(backend, x, dy, o_idx, i_idx), direct)
    assert torch.equal(of_columns(backend, x, dy, *pairs), direct[:, ::2] + direct[:, 1::2])


@pytest.mark.backends("cuda")
def test_orders_that_do_not_fit(backend):
    x, dy, o_idx, i_idx = inputs(1, 5, 24, 32, 100, torch.bfloat16)
    order = column_schedule.column_order(o_idx, i_idx, 24, 32)
    for call, order, message in (
        ((x.float(), dy.float(), o_idx, i_idx), order, "2-byte"),
        ((x, dy, o_idx[:50].reshape(-1, 1), i_idx[:50].reshape(-1, 1)), order, r"\[50, 1\]"),
        ((x, dy, o_idx.reshape(-1, 2), i_idx.reshape(-1, 2)), order, r"\[50, 2\].*\[100, 1\]"),
        (
            (x, dy, o_idx.reshape(-1, 1).repeat(1, 2), i_idx.reshape(-1, 1).repeat(1, 2)),
            order,
            r"\[100, 2\] coordinates .* got one for \[100, 1\]",
        ),
        ((x[..., :20], dy, o_idx, i_idx), order, "pass 0 of the order is not of this call"),
        (
            (x, dy, o_idx, i_idx),
            order._replace(target=order.target[:, 1:]),
            "must be int32",
        ),
        (
            (x, dy, o_idx, i_idx),
            order._replace(passes=order.passes[:0]),
            r"has 0 slots, too few for coordinates \[100, 1\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ops.sampled_outer(*call, order=order, backend=backend.name)


def shapes_of_sums(backend):
    """Few coordinates and many, which the CPU sums in another way; elsewhere a block and two."""
    few, r = [((2, 9, 7, 5, 30), s) for s in (1, 4, 7)], 70 if backend in EMULATED else 600
    return few + [((2, 70, 40, 30, r), s) for s in (1, 7)]


@pytest.mark.cases("shape, s", shapes_of_sums)
def test_weighted_sums(backend, shape, s):
    B, T, I, O, r = shape
    x, dy, _, _ = inputs(B, T, I, O, r, torch.float32)
    generator = torch.Generator().manual_seed(1)
    o_idx = torch.randint(O, (r, s), generator=generator).int()
    i_idx = torch.randint(I, (r, s), generator=generator).int()
    weights = torch.randn(r, s, generator=generator)
    out = ops.sampled_outer(x, dy, o_idx, i_idx, weights=weights, backend=backend.name)

    truth = (exact(x, dy, o_idx, i_idx) * weights.double()).sum(-1)
    sizes = (exact(x.abs(), dy.abs(), o_idx, i_idx) * weights.abs().double()).sum(-1)
    assert_within(out, truth, (T + s + 1) * EPS32 * sizes)


def ways_to_sum(backend):
    return [("few",), ("many",), ("bias",), *[("staged",)] * backend.startswith("cuda")]


@pytest.mark.cases("way", ways_to_sum)
def test_zero_weights(backend, way):
    """A weight of 0 leaves a coordinate out of a sum, also where that is not finite."""
    B, T, I, O, r, s = (2, 9, 7, 5, 3, 4) if way == "few" else (2, 35, 24, 32, 200, 3)
    bias = way == "bias"
    x, dy, _, _ = inputs(B, T, I, O, 0, torch.float32)
    generator = torch.Generator().manual_seed(1)
    # Column 0 of dy, which only the coordinates that are left out have, is not finite.
    o_idx = torch.randint(1, O, (r, s), generator=generator).int()
    i_idx = torch.randint(I + bias, (r, s), generator=generator).int()
    weights = torch.randint(-1, 2, (r, s), generator=generator) * 1.5
    weights[0] = 0
    o_idx[weights == 0] = 0
    finite = dy.clone()
    finite[..., 0] = 0
    dy[..., 0] = torch.tensor([torch.inf, torch.nan])[torch.arange(T) % 2]
    order = None
    if way == "staged":
        order = bank_schedule.staged_order(o_idx, i_idx, I, O, x.element_size())
    out = ops.sampled_outer(
        x, dy, o_idx, i_idx, weights=weights, bias=bias, order=order, backend=backend.name
    )

    truth = (exact(x, finite, o_idx, i_idx, bias) * weights).sum(-1)
    sizes = (exact(x.abs(), finite.abs(), o_idx, i_idx, bias) * weights.abs()).sum(-1)
    assert_within(out, truth, (T + s + 1) * EPS32 * sizes)
    assert (out[:, 0] == 0).all() and out[:, 1:].any(1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(backend, dtype):
    """x and dy as slices, transposed views and expanded gradients; out with any strides."""
    B, T, I, O, r = 3, 21, 13, 10, 77
    x, dy, o_idx, i_idx = inputs(B, T, I, O, r, dtype)
    wide = torch.zeros(T, B, I + 5, dtype=dtype)
    wide[..., 2 : 2 + I] = x.transpose(0, 1)
    x_view = wide.transpose(0, 1)[..., 2 : 2 + I]
    dy_view = dy.transpose(1, 2).contiguous().transpose(1, 2)
    shared = dy[:1, :1].expand(B, T, O)
    column = dy[..., :1].expand(B, T, O)
    out = torch.full((r, 2 * B), torch.nan).T[::2]
    for strided in (dy_view, shared, column):
        got = ops.sampled_outer(x_view, strided, o_idx, i_idx, out=out, backend=backend.name)
        assert got.data_ptr() == out.data_ptr()
        sizes = exact(x.abs(), strided.abs(), o_idx, i_idx)
        assert_within(out, exact(x, strided, o_idx, i_idx), (T + 1) * EPS32 * sizes)


@pytest.mark.parametrize("size", [1, 3])
def test_single_columns(backend, size):
    """A dimension of size 1 may have any stride."""
    x = torch.randn(2, 5, 4)[..., ::4][..., :1]
    dy = torch.randn(2, 5, 2 * size)[..., ::2]
    o_idx, i_idx = torch.arange(size).int(), torch.zeros(size).int()
    out = ops.sampled_outer(x, dy, o_idx, i_idx, backend=backend.name)
    assert_within(
        out, exact(x, dy, o_idx, i_idx), 6 * EPS32 * exact(x.abs(), dy.abs(), o_idx, i_idx)
    )


def one_position_and_many(backend):
    r = 70 if backend in EMULATED else 400
    return [((5, 1, 64, 128, r),), ((3, 300, 40, 30, r),)]


@pytest.mark.cases("shape", one_position_and_many)
def test_same_bits(backend, shape):
    """Run to run, for any number of threads, and for any batch around an example."""
    x, dy, o_idx, i_idx = inputs(*shape, torch.float32)

    def run(part):
        return ops.sampled_outer(x[part], dy[part], o_idx, i_idx, backend=backend.name)

    whole = run(slice(None))
    assert torch.equal(whole, run(slice(None)))
    if backend.name != "reference":  # whose sums are torch's
        assert torch.equal(whole[2:3], run(slice(2, 3)))
    if backend.name == "cpu":
        for _ in numbers_of_threads():
            assert torch.equal(whole, run(slice(None)))
            assert torch.equal(whole[2:3], run(slice(2, 3)))


sizes = st.integers(1, 40)


@settings(max_examples=40, deadline=None)
@given(B=st.integers(1, 4), T=st.integers(1, 70), I=sizes, O=sizes, seed=st.integers(0, 999))
def test_laws(B, T, I, O, seed):
    """Linear in dy; examples and positions are apart; all coordinates are the full gradient."""
    x, dy, o_idx, i_idx = inputs(B, T, I, O, min(50, O * I), torch.float32, seed)
    sizes = exact(x.abs(), dy.abs(), o_idx, i_idx)
    bound = 4 * (T + 2) * EPS32 * sizes

    def run(x, dy):
        return ops.sampled_outer(x, dy, o_idx, i_idx).double()

    rows = run(x, dy)
    assert_within(run(x, -2 * dy), -2 * rows, 0 * bound)  # powers of two are exact
    assert_within(run(x, 3 * dy), 3 * rows, 3 * bound)
    other = torch.randn(B, T, O, generator=torch.Generator().manual_seed(seed))
    both = exact(x.abs(), dy.abs() + other.abs(), o_idx, i_idx)
    assert_within(run(x, dy + other), rows + run(x, other), 4 * (T + 2) * EPS32 * both)

    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(run(x[order], dy[order]), rows[order])
    cut = seed % T
    assert_within(run(x[:, :cut], dy[:, :cut]) + run(x[:, cut:], dy[:, cut:]), rows, bound)

    at = torch.arange(O * I)
    full = ops.sampled_outer(x, dy, (at // I).int(), (at % I).int())
    gradient = torch.einsum("bto,bti->boi", dy.double(), x.double()).reshape(B, -1)
    largest = torch.einsum("bto,bti->boi", dy.double().abs(), x.double().abs()).reshape(B, -1)
    assert_within(full, gradient, (T + 1) * EPS32 * largest)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
def test_opcheck(weighted):
    if dropinf.backends()["cpu"] != "available":
        pytest.skip(dropinf.backends()["cpu"])
    x, dy, o_idx, i_idx = inputs(2, 9, 5, 6, 12, torch.float32)
    weights = None
    if weighted:
        o_idx, i_idx = o_idx.reshape(6, 2), i_idx.reshape(6, 2)
        weights = torch.ones(6, 2)
    out = torch.zeros(2, len(o_idx))
    args = (x, dy, o_idx, i_idx, weights, False, (), out)
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(torch.ops.dropinf.sampled_outer.default, args)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 4)}, r"x must be \[B, T, I\], got \(2, 4\)"),
        ({"dy": torch.zeros(2, 2, 5)}, r"dy must be \[B=2, T=3, O\], got \(2, 2, 5\)"),
        ({"dy": torch.zeros(2, 3, 5).half()}, r"dy must be torch.float32"),
        ({"x": torch.zeros(2, 3, 4).long()}, r"x must be floating point, got torch.int64"),
        ({"o_idx": torch.zeros(6).long()}, r"o_idx must be torch.int32 on cpu, got torch.int64"),
        (
            {"i_idx": torch.zeros(5).int()},
            r"must both be \[r\] or both \[r, s\], got \(6,\) and \(5,\)",
        ),
        ({"o_idx": torch.zeros(6, 1).int()}, r"must both be .*, got \(6, 1\) and \(6,\)"),
        ({"dy": torch.zeros(2, 3, 5, device="meta")}, "dy must be torch.float32 on cpu"),
        ({"out": torch.zeros(2, 7)}, r"out must be floating point \(2, 6\) on cpu"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        ops.sampled_outer(**{**good, **change})


@pytest.mark.parametrize(
    "name, index, summed",
    [
        ("o_idx", 5, False),
        ("o_idx", -1, False),
        ("i_idx", 4, False),
        ("i_idx", -1, False),
        ("i_idx", 2**31 - 1, False),
        ("o_idx", -1, True),
        ("i_idx", 4, True),
    ],
)
def test_index_out_of_range(backend, name, index, summed):
    call = {**good, name: good[name].clone()}
    call[name][2] = index
    if summed:
        call |= {key: call[key].reshape(3, 2) for key in ("o_idx", "i_idx")}
        call["weights"] = torch.tensor([[1.0, 1], [0.5, 1], [1, 0]])
    k = 1 if summed else 2
    assert_refused_or_nan(backend, lambda: ops.sampled_outer(**call, backend=backend.name), k, name)


@pytest.mark.parametrize("name, index", [("o_idx", 5), ("i_idx", -1)])
@pytest.mark.parametrize("weights", [[1.0, 0, 1], [[1.0, 1], [0, 1], [1, 1]]], ids=["", "summed"])
def test_index_of_what_is_left_out(backend, name, index, weights):
    """It is to be in range too; a kernel that cannot raise an error does not look at it."""
    weights = torch.tensor(weights)
    call = {key: good[key][: weights.numel()].reshape(weights.shape).clone() for key in AT}
    call[name][1].view(-1)[0] = index
    call = good | call | {"weights": weights, "backend": backend.name}
    if backend.name in dispatch.GPU_BACKENDS:
        assert ops.sampled_outer(**call).isfinite().all()
    else:
        with pytest.raises((ValueError, IndexError, RuntimeError), match=f"{name}|out of range"):
            ops.sampled_outer(**call)


def test_index_out_of_range_without_positions(backend):
    call = {**good, "x": good["x"][:, :0], "dy": good["dy"][:, :0], "o_idx": good["o_idx"].clone()}
    assert not ops.sampled_outer(**call, backend=backend.name).any()
    call["o_idx"][2] = -1
    run = lambda: ops.sampled_outer(**call, backend=backend.name)  # noqa: E731
    assert_refused_or_nan(backend, run, 2, "o_idx")


def test_named_backend_is_used_or_refused():
    with pytest.raises(dropinf.BackendError, match=r"sampled_outer: backend 'cuda' is .*Here"):
        ops.sampled_outer(**good, backend="cuda")
    wide = {**good, "x": good["x"].double(), "dy": good["dy"].double()}
    assert ops.sampled_outer(**wide).dtype == torch.float64
    if dropinf.backends()["cpu"] == "available":
        with pytest.raises(dropinf.BackendError, match=r"not torch.float64\. Here: 'reference'"):
            ops.sampled_outer(**wide, backend="cpu")
