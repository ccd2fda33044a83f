"""sampled_norm: equal to autograd's gradients of a norm's scale and shift, in float64."""

import pytest
import torch
import torch.nn.functional as F
from conftest import EMULATED, EPS32, assert_refused_or_nan, assert_within

from dropinf import ops

OPS = ("sampled_norm",)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {  # B, T, I, r
    "one position": (3, 1, 24, 11),
    "primes": (2, 13, 17, 60),
    "one feature": (2, 5, 1, 2),
    "every sum": (2, 9, 32, 64),
    "several vectors a thread": (1, 3, 2056, 300),
    "chunks": (2, 83, 40, 90),
    "more columns than a block has": (1, 3, 8200, 200),
    "no entry": (2, 5, 4, 0),
    "no example": (0, 4, 3, 5),
    "no position": (2, 0, 3, 5),
}
EPS = 1e-5


def inputs(B, T, I, r, dtype):
    """x, far from 0 by another distance at every position, dy, and r sums, some twice."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(B, T, I, generator=generator).to(dtype) for _ in range(2))
    x = x + 3 * torch.randn(B, T, 1, generator=generator).to(dtype)
    index = torch.randint(2 * I, (r,), generator=generator).sort().values
    return x, dy, index.int()


def exact(x, dy, index, rms):
    """By autograd, an example at a time: the gradients of a scale and a shift."""
    rows = []
    for x_b, dy_b in zip(x.double(), dy.double(), strict=True):
        I = x.shape[2]
        parameters = torch.ones(I, dtype=torch.float64), torch.zeros(I, dtype=torch.float64)
        scale, shift = (p.requires_grad_() for p in parameters)
        centred = x_b if rms else x_b - x_b.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
        out = scale * (centred / deviation) + shift
        rows.append(torch.cat(torch.autograd.grad(out, (scale, shift), dy_b)))
    return torch.stack(rows)[:, index.long()] if rows else torch.empty(0, len(index)).double()


def bound_of(x, dy, index, rms):
    """Of sums of T products, whose factor has statistics of I elements, on any order of lanes."""
    T, I = x.shape[1:]
    centred = x.double() if rms else x.double() - x.double().mean(-1, keepdim=True)
    size = centred.abs() / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    count = I + 20
    terms = dy.double().abs() * ((T + 2 + count) * size + count)
    both = torch.cat([terms.sum(1), (T + 2) * dy.double().abs().sum(1)], 1)
    return EPS32 * both[:, index.long()]


def shapes_and_dtypes(backend):
    """Every shape and dtype where kernels are compiled for it, else in turn."""
    one = backend in (*EMULATED, "reference")
    for s, shape in enumerate(SHAPES):
        yield from ((shape, dtype) for d, dtype in enumerate(DTYPES) if d == s % 3 or not one)


@pytest.mark.cases("shape, dtype", shapes_and_dtypes)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_sampled_norm(backend, shape, dtype, rms):
    B, _, _, r = shape = SHAPES[shape]
    x, dy, index = inputs(*shape, dtype)
    weights = torch.randn(r, generator=torch.Generator().manual_seed(1))
    row = torch.full((B, r + 9), torch.nan)
    options = {"eps": EPS, "rms": rms, "weights": weights, "out": row[:, 4 : 4 + r]}
    out = ops.sampled_norm(x, dy, index, **options, backend=backend.name)
    truth, bound = exact(x, dy, index, rms), bound_of(x, dy, index, rms)
    assert_within(out, weights.double() * truth, 1.001 * weights.double().abs() * bound)
    assert row[:, :4].isnan().all() and row[:, 4 + r :].isnan().all()


@pytest.mark.parametrize("distance", [1e3, 1e5])
def test_far_from_zero(backend, distance):
    """Where x is far from 0 beside its deviation: at least as exact as torch's own norm."""
    x, dy, index = inputs(2, 40, 256, 512, torch.float32)
    x += distance
    out = ops.sampled_norm(x, dy, index, eps=EPS, backend=backend.name)
    plain = (F.layer_norm(x, (256,), eps=EPS) * dy).double().sum(1)
    truth = exact(x, dy, index, False)
    scales = index < 256
    ours = (out.double() - truth)[:, scales].norm()
    theirs = (plain[:, index[scales].long()] - truth[:, scales]).norm()
    assert theirs > 0 and ours <= 2 * theirs
    if backend.name != "reference":  # which is torch's
        assert ours <= 1e-5 * truth[:, scales].norm()


def test_sums(backend):
    x, dy, _ = inputs(2, 50, 24, 0, torch.float32)
    generator = torch.Generator().manual_seed(2)
    index = torch.randint(48, (30, 3), generator=generator).int()
    weights = torch.randn(30, 3, generator=generator)
    options = {"eps": EPS, "weights": weights, "backend": backend.name}
    out = ops.sampled_norm(x, dy, index, **options)
    truth, bound = (f(x, dy, index.flatten(), False).reshape(2, 30, 3) for f in (exact, bound_of))
    weights = weights.double()
    bound = 1.001 * (weights.abs() * (bound + 4 * EPS32 * truth.abs())).sum(2)
    assert_within(out, (weights * truth).sum(2), bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_and_same_bits(backend, dtype):
    """Rows that start anywhere and overlap in memory; and any batch around an example."""
    T, I = 43, 40
    x, dy, index = inputs(4, T, I, 70, dtype)
    again = ops.sampled_norm(x, dy, index, eps=EPS, backend=backend.name)
    wide = torch.zeros(T, 4, I + 8, dtype=dtype)
    wide[..., 3 : I + 3] = x.transpose(0, 1)
    strided = wide.transpose(0, 1)[..., 3 : I + 3]
    out = torch.full((70, 4), torch.nan).T
    ops.sampled_norm(strided, dy, index, eps=EPS, out=out, backend=backend.name)
    assert torch.equal(out, again)
    assert_within(out, exact(x, dy, index, False), bound_of(x, dy, index, False))
    one = x[:, :1].expand(-1, T, -1)  # a position, T times
    out = ops.sampled_norm(one, dy, index, eps=EPS, backend=backend.name)
    assert_within(out, exact(one, dy, index, False), bound_of(one, dy, index, False))
    for part in (slice(2, 3), slice(1, 4)):
        some = ops.sampled_norm(x[part], dy[part], index, eps=EPS, backend=backend.name)
        assert torch.equal(some, again[part])


@pytest.mark.backends("cuda")
def test_bits_do_not_depend_on_the_other_tile_or_entries(backend):
    x, dy, index = inputs(1, 3, 8200, 200, torch.float32)
    out = ops.sampled_norm(x, dy, index, eps=EPS, backend=backend.name)
    every = torch.arange(2 * 8200).int()
    all_sums = ops.sampled_norm(x, dy, every, eps=EPS, backend=backend.name)
    assert torch.equal(out, all_sums[:, index.long()])


@pytest.mark.filterwarnings("ignore:invalid value")  # of Triton's interpreter
def test_what_is_not_finite_stays_in_its_example_and_column(backend):
    """A position's x reaches all its scales, and no shift; dy its column alone."""
    x, dy, _ = inputs(3, 37, 16, 0, torch.float32)
    index = torch.arange(32).int()
    x[0, 5, 3], dy[1, 36, 7] = torch.inf, torch.nan
    out = ops.sampled_norm(x, dy, index, eps=EPS, backend=backend.name)
    assert out[0, :16].isnan().all() and out[0, 16:].isfinite().all()
    assert out[1].isnan().nonzero().flatten().tolist() == [7, 23]
    assert out[2].isfinite().all()


@pytest.mark.parametrize("bad", [32, -1, 2**31 - 1])
def test_index_out_of_range(backend, bad):
    x, dy, _ = inputs(2, 5, 16, 0, torch.float32)
    index = torch.arange(8).int()
    index[5] = bad

    def run(weights=None):
        return ops.sampled_norm(x, dy, index, eps=EPS, weights=weights, backend=backend.name)

    assert_refused_or_nan(backend, run, 5, "index")


good = {
    "x": torch.zeros(2, 3, 5),
    "dy": torch.zeros(2, 3, 5),
    "index": torch.zeros(6).int(),
    "eps": EPS,
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(6, 5)}, r"x and dy must both be \[B, T, I\], got \(6, 5\)"),
        ({"dy": torch.zeros(2, 3, 4)}, r"must both be \[B, T, I\], got .* and \(2, 3, 4\)"),
        ({"dy": torch.zeros(2, 3, 5).half()}, "dy must be torch.float32 on cpu"),
        ({"x": torch.zeros(2, 3, 5).int()}, "x must be floating point"),
        ({"index": torch.zeros(6).long()}, "index must be torch.int32"),
        ({"index": torch.zeros(6, 1, 1).int()}, r"index must be \[r\] or \[r, s\]"),
        ({"out": torch.zeros(2, 7)}, r"out must be floating point \(2, 6\)"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        ops.sampled_norm(**{**good, **change})
