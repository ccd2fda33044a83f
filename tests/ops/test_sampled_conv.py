"""sampled_conv: every backend within the rounding bound of torch.autograd in float64."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    EMULATED,
    EPS32,
    INTERPRETED,
    assert_refused_or_nan,
    assert_within,
    numbers_of_threads,
)
from properties import given, settings, st

import dropinf
from dropinf import ops
from dropinf.ops import dispatch

OPS = ("sampled_conv",)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Layer(NamedTuple):
    """A convolution, with one value for each of its spatial dimensions."""

    C: int
    O: int
    size: tuple
    kernel: tuple
    stride: tuple
    low: tuple  # padding
    high: tuple
    dilation: tuple
    groups: int

    @property
    def I(self):  # noqa: E743
        return self.C // self.groups * torch.Size(self.kernel).numel()

    @property
    def size_out(self):
        return tuple(
            (s + lo + hi - d * (k - 1) - 1) // st + 1
            for s, k, st, lo, hi, d in zip(
                self.size, self.kernel, self.stride, self.low, self.high, self.dilation
            )
        )

    @property
    def options(self):
        return {
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.low,
            "dilation": self.dilation,
            "groups": self.groups,
        }


def layer(C, O, size, kernel, stride=1, padding=0, high=None, dilation=1, groups=1):
    """An int stands for that value in each spatial dimension; high is the low padding too."""
    values = [kernel, stride, padding, padding if high is None else high, dilation]
    values = [v if isinstance(v, tuple) else (v,) * len(size) for v in values]
    return Layer(C, O, size, *values, groups)


LAYERS = {
    "1-D": layer(5, 7, (37,), 3, padding=1),
    "2-D": layer(6, 5, (13, 11), 3, padding=1),
    "3-D": layer(3, 4, (5, 6, 7), (3, 2, 3), (2, 1, 3), padding=(1, 0, 1), dilation=(1, 2, 1)),
    "rows around the chains of vectors": layer(2, 3, (4, 73), (1, 3), padding=(0, 1)),
    "7x7 planes": layer(33, 16, (7, 7), 3, padding=1),
    "14x14 planes": layer(16, 9, (14, 14), 3, padding=1),
    "1x1, planes merged": layer(40, 9, (9, 11), 1),
    "1x1, planes longer than a box": layer(3, 2, (70, 71), 1),
    "1x1, stride 2": layer(12, 10, (28, 28), 1, stride=2),
    "rows merged under a tall kernel": layer(4, 3, (9, 6), (3, 1), padding=(1, 0)),
    "3-D merged in part": layer(4, 3, (4, 3, 5), (3, 1, 1), padding=(1, 0, 0)),
    "stride 2": layer(4, 6, (33, 34), 3, stride=2, padding=1),
    "stride 3": layer(4, 6, (31, 50), 5, stride=3, padding=2),
    "strides that differ": layer(4, 6, (31, 29), (3, 4), stride=(1, 2), padding=(2, 1)),
    "stride beyond the kernel": layer(3, 2, (40, 41), 2, stride=5),
    "dilation": layer(4, 4, (20, 19), 3, padding=(2, 4), dilation=(2, 4)),
    "groups": layer(12, 8, (9, 8), 3, padding=1, groups=4),
    "depthwise": layer(10, 10, (12, 12), 3, padding=1, groups=10),
    "depthwise with a multiplier": layer(4, 12, (30,), 5, padding=2, groups=4),
    "padding beyond the kernel": layer(2, 3, (6, 5), 2, padding=4),
    "'same' with an even kernel": layer(3, 4, (9, 10), (4, 2), padding=(1, 0), high=(2, 1)),
    "fewer outputs than fit": layer(3, 4, (9, 10), 3, padding=1, high=-2),
    "a kernel larger than the input": layer(2, 3, (3, 4), 7, padding=3),
    "taps that only meet padding": layer(2, 3, (1, 2), 5, padding=4),
    "one position": layer(9, 8, (3, 3), 3),
    "planes longer than a box": layer(2, 2, (66, 67), 3, padding=1),
    "rows longer than a box": layer(2, 3, (9001,), 5, padding=2),
    "tall kernel over long rows": layer(2, 3, (2, 700), (2, 1), padding=(1, 0)),
    "patches": layer(3, 20, (32, 32), 8, stride=8),
}


# One kernel takes them all: what Triton's interpreter runs is one for each argument that differs.
IN_THE_INTERPRETER = {
    "1-D": torch.float32,
    "2-D": torch.bfloat16,
    "3-D": torch.float32,
    "1x1, stride 2": torch.float32,
    "strides that differ": torch.float32,
    "dilation": torch.float32,
    "groups": torch.float16,
    "depthwise with a multiplier": torch.float32,
    "fewer outputs than fit": torch.float32,
    "a kernel larger than the input": torch.float32,
    "one position": torch.float32,
}


def inputs(it, B, r, dtype, bias=False):
    """x, dy and r distinct sorted coordinates, or all of them; with bias, it is among them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, it.C, *it.size, generator=generator).to(dtype)
    dy = torch.randn(B, it.O, *it.size_out, generator=generator).to(dtype)
    width = it.I + bias
    at = torch.randperm(it.O * width, generator=generator)[:r].sort().values
    return x, dy, (at // width).int(), (at % width).int()


def exact(x, dy, o_idx, i_idx, it):
    """torch.autograd, one example at a time, in float64; the bias last of each row of weights."""
    weight = torch.zeros(it.O, it.C // it.groups, *it.kernel, dtype=torch.float64)
    bias = torch.zeros(it.O, dtype=torch.float64)
    pads = [p for pair in zip(it.low[::-1], it.high[::-1]) for p in pair]
    rows = torch.zeros(len(x), len(o_idx), dtype=torch.float64)
    for b in range(len(x)):
        parameters = weight.requires_grad_(), bias.requires_grad_()
        padded = F.pad(x[b : b + 1].double(), pads)
        conv = CONV[len(it.size)]
        y = conv(padded, *parameters, stride=it.stride, dilation=it.dilation, groups=it.groups)
        by_weight, by_bias = torch.autograd.grad(y, parameters, dy[b : b + 1].double())
        full = torch.cat([by_weight.reshape(it.O, -1), by_bias[:, None]], 1)
        rows[b] = full[o_idx.long(), i_idx.long()]
    return rows


def bound(x, dy, o_idx, i_idx, it):
    """The rounding bound of any float32 sum over the outputs, of which there are T."""
    T = torch.Size(it.size_out).numel()
    return (T + 1) * EPS32 * exact(x.abs(), dy.abs(), o_idx, i_idx, it)


def layers_and_dtypes(backend):
    """Every layer with every dtype where kernels are written for each, else with one of them in
    turn; with and without the bias in turn."""
    if backend in INTERPRETED:
        yield from ((name, dtype, True) for name, dtype in IN_THE_INTERPRETER.items())
        return
    each = backend == "cpu" or backend in dispatch.GPU_BACKENDS
    for l, name in enumerate(LAYERS):
        for d, dtype in enumerate(DTYPES):
            if d == l % 3 or each:
                yield name, dtype, (l + d) % 2 == 0


@pytest.mark.cases("name, dtype, bias", layers_and_dtypes)
def test_sampled_conv(backend, name, dtype, bias):
    it = LAYERS[name]
    r = {"triton": 35, "cuda": 70}.get(backend.name, 300)
    x, dy, o_idx, i_idx = inputs(it, 2, r, dtype, bias)
    r = len(o_idx)
    weights = torch.randn(r, generator=torch.Generator().manual_seed(1))
    row = torch.full((2, r + 9), torch.nan)
    ops.sampled_conv(
        x,
        dy,
        o_idx,
        i_idx,
        **it.options,
        bias=bias,
        weights=weights,
        out=row[:, 4 : 4 + r],
        backend=backend.name,
    )
    weights, T = weights.double(), torch.Size(it.size_out).numel()
    truth = exact(x, dy, o_idx, i_idx, it) * weights
    largest = bound(x, dy, o_idx, i_idx, it) * weights.abs() * (T + 2) / (T + 1)
    assert_within(row[:, 4 : 4 + r], truth, largest)
    assert row[:, :4].isnan().all() and row[:, 4 + r :].isnan().all()


def whole_layers(backend):
    small = ["depthwise with a multiplier"]
    return [(name,) for name in (small if backend in EMULATED else ["2-D", "stride 2", "groups"])]


@pytest.mark.cases("name", whole_layers)
def test_all_coordinates_in_any_order(backend, name):
    it = LAYERS[name]
    x, dy, o_idx, i_idx = inputs(it, 3, it.O * (it.I + 1), torch.float32, bias=True)
    order = torch.randperm(len(o_idx), generator=torch.Generator().manual_seed(1))
    for o, i in ((o_idx, i_idx), (o_idx[order], i_idx[order])):
        out = ops.sampled_conv(x, dy, o, i, **it.options, bias=True, backend=backend.name)
        assert_within(out, exact(x, dy, o, i, it), bound(x, dy, o, i, it))


@pytest.mark.parametrize("size_out", [(9, 11), (8, 10), (12, 9)], ids=str)
def test_transposed_convolution(backend, size_out):
    """With x and dy exchanged; (12, 9) has outputs that no tap reaches, as output_padding may."""
    B, C, O, kernel, stride, padding, dilation, groups = 2, 4, 6, (3, 2), (2, 3), (1, 0), (2, 1), 2
    x = torch.randn(B, C, 4, 3)
    dy = torch.randn(B, O, *size_out)
    I = O // groups * kernel[0] * kernel[1]
    at = torch.arange(C * I)

    def by_autograd(x, dy):
        rows = []
        for b in range(B):
            weight = torch.zeros(C, O // groups, *kernel, dtype=torch.float64, requires_grad=True)
            # Without padding, y is all that the weight reaches; then cut and extended to size_out.
            y = F.conv_transpose2d(
                x[b : b + 1].double(), weight, stride=stride, dilation=dilation, groups=groups
            )
            low = [-p for p in padding]
            high = [o - lo - n for o, lo, n in zip(size_out, low, y.shape[2:])]
            y = F.pad(y, [low[1], high[1], low[0], high[0]])
            (gradient,) = torch.autograd.grad(y, weight, dy[b : b + 1].double())
            rows.append(gradient.flatten())
        return torch.stack(rows)

    out = ops.sampled_conv(
        dy,
        x,
        (at // I).int(),
        (at % I).int(),
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        backend=backend.name,
    )
    assert_within(out, by_autograd(x, dy), 13 * EPS32 * by_autograd(x.abs(), dy.abs()))


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def inside_of_larger(x):
    wide = torch.full((len(x), x.shape[1] + 2, x.shape[2] + 3, x.shape[3] + 5), torch.nan)
    view = wide.to(x.dtype)[:, 1:-1, 2:-1, 3:-2]
    return view.copy_(x)


def transposed(x):
    return x.transpose(0, 3).contiguous().transpose(0, 3)


def flipped_planes(x):
    return x.mT.contiguous().mT


VIEWS = {f.__name__: f for f in (channels_last, inside_of_larger, transposed, flipped_planes)}


def layers_and_views(backend):
    """dtypes in turn; 3 coordinates are read in place on the CPU, which copies x for 100."""
    names = ["2-D"] if backend in EMULATED else ["2-D", "1x1, planes merged", "stride 2"]
    each = [(name, view, r) for name in names for r in (3, 100) for view in VIEWS]
    for nth, (name, view, r) in enumerate(each):
        if r == 3 or backend not in INTERPRETED:
            yield name, view, r, DTYPES[nth % 3]


@pytest.mark.cases("name, view, r, dtype", layers_and_views)
def test_strides(backend, name, view, r, dtype):
    """x and dy of any strides, each on its own and both; out with any strides."""
    it, view = LAYERS[name], VIEWS[view]
    x, dy, o_idx, i_idx = inputs(it, 3, r, dtype, bias=True)
    truth, largest = exact(x, dy, o_idx, i_idx, it), bound(x, dy, o_idx, i_idx, it)
    out = torch.full((r, 6), torch.nan).T[::2]
    for x_view, dy_view in ((view(x), dy), (x, view(dy)), (view(x), view(dy))):
        assert torch.equal(x_view, x) and torch.equal(dy_view, dy)
        got = ops.sampled_conv(
            x_view, dy_view, o_idx, i_idx, **it.options, bias=True, out=out, backend=backend.name
        )
        assert got.data_ptr() == out.data_ptr()
        assert_within(out, truth, largest)


def layers(backend):
    return [(name,) for name in (["1-D", "3-D"] if backend in INTERPRETED else LAYERS)]


@pytest.mark.cases("name", layers)
def test_channels_innermost(backend, name):
    """x and dy as channels_last has them, in one to three dimensions."""
    it = LAYERS[name]
    dtype = DTYPES[list(LAYERS).index(name) % 3]
    x, dy, o_idx, i_idx = inputs(it, 2, 70, dtype, bias=True)
    x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
    out = ops.sampled_conv(x, dy, o_idx, i_idx, **it.options, bias=True, backend=backend.name)
    assert_within(out, exact(x, dy, o_idx, i_idx, it), bound(x, dy, o_idx, i_idx, it))


@pytest.mark.backends("cuda")  # which cannot raise; every entry of the others is its own
@pytest.mark.parametrize("view", [torch.Tensor.contiguous, channels_last])
def test_only_bad_indices_give_nan(backend, view):
    it = LAYERS["2-D"]
    x, dy, o_idx, i_idx = inputs(it, 2, 40, torch.float32, bias=True)
    truth, largest = exact(x, dy, o_idx, i_idx, it), bound(x, dy, o_idx, i_idx, it)
    bad = torch.tensor([0, 7, 39])
    good = torch.ones(40, dtype=torch.bool).index_fill(0, bad, False)
    o_idx[bad] = torch.tensor([-1, it.O, 0]).int()
    i_idx[bad[2]] = it.I + 1
    out = ops.sampled_conv(
        view(x), view(dy), o_idx, i_idx, **it.options, bias=True, backend=backend.name
    )
    assert out[:, bad].isnan().all()
    assert_within(out[:, good], truth[:, good], largest[:, good])


@pytest.mark.cases("dtype", lambda backend: zip(DTYPES[:1] if backend in EMULATED else DTYPES))
def test_expanded_gradient(backend, dtype):
    """What a mean over the plane sends back: one value for each channel."""
    it = LAYERS["2-D"]
    x, dy, o_idx, i_idx = inputs(it, 2, 100, dtype, bias=True)
    dy = dy[:, :, :1, :1].expand(dy.shape)
    out = ops.sampled_conv(x, dy, o_idx, i_idx, **it.options, bias=True, backend=backend.name)
    assert_within(out, exact(x, dy, o_idx, i_idx, it), bound(x, dy, o_idx, i_idx, it))


def test_what_is_not_finite_stays_where_it_is(backend):
    """A tap that leaves an output out does not see what is there."""
    x, dy = torch.ones(1, 1, 7, 7), torch.ones(1, 1, 7, 7)
    x[0, 0, 0, 0] = torch.inf
    taps = torch.arange(9).int()
    out = ops.sampled_conv(
        x,
        dy,
        torch.zeros(9).int(),
        taps,
        kernel_size=(3, 3),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        backend=backend.name,
    )
    assert out.isinf().tolist() == [[True, True, False, True, True, False, False, False, False]]


def one_by_one(x, dy, o_idx, i_idx, it):
    """The definition in float64, a coordinate at a time over a padded x."""
    pads = [p for pair in zip(it.low[::-1], it.high[::-1]) for p in pair]
    padded = F.pad(x.double(), [max(p, 0) for p in pads])
    out = torch.zeros(len(x), len(o_idx), dtype=torch.float64)
    for k, (o, i) in enumerate(zip(o_idx.tolist(), i_idx.tolist())):
        met = torch.ones(len(x), *it.size_out, dtype=torch.float64)
        if i < it.I:
            place = torch.unravel_index(torch.tensor(i), (it.C // it.groups, *it.kernel))
            channel = o // (it.O // it.groups) * (it.C // it.groups) + place[0]
            taps = [
                slice(q * d, q * d + (n - 1) * stride + 1, stride)
                for q, d, n, stride in zip(place[1:], it.dilation, it.size_out, it.stride)
            ]
            met = padded[:, channel][(slice(None), *taps)]
        out[:, k] = (dy[:, o].double() * met).flatten(1).sum(1)
    return out


def layers_at_padding(backend):
    few = ("1-D", "stride 2", "taps that only meet padding")
    names = few if backend in INTERPRETED else LAYERS
    return [(name, innermost) for name in names for innermost in (False, True)]


@pytest.mark.filterwarnings("ignore:invalid value")  # of Triton's interpreter
@pytest.mark.cases("name, innermost", layers_at_padding)
def test_not_finite(backend, name, innermost):
    """Of dy also where it meets padding, as 0 times that is NaN; and nowhere else."""
    it = LAYERS[name]
    number = list(LAYERS).index(name)
    x, dy, o_idx, i_idx = inputs(it, 4, 90, DTYPES[number % 3], bias=True)
    clean = x, dy.clone()
    generator = torch.Generator().manual_seed(number)
    values = [torch.nan, torch.inf, -torch.inf]
    for b in range(3):  # one at a border, one anywhere, one that another may cancel
        for n, value in enumerate(values[: b + 1]):
            at = [int(torch.randint(size, (), generator=generator)) for size in it.size_out]
            if n == 0:
                at[b % len(at)] = (0, -1)[b % 2]
            dy[(b, int(torch.randint(it.O, (), generator=generator)), *at)] = value
    x = x.clone()
    x[(2, it.C - 1, *[0] * len(it.size))] = torch.inf
    truth = one_by_one(x, dy, o_idx, i_idx, it)
    assert truth[:3].isnan().any() and truth[3].isfinite().all()
    if innermost:
        x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
    out = ops.sampled_conv(x, dy, o_idx, i_idx, **it.options, bias=True, backend=backend.name)
    finite = truth.isfinite()
    assert torch.equal(out.isnan(), truth.isnan())
    assert torch.equal(out[truth.isinf()].double(), truth[truth.isinf()])
    largest = bound(*clean, o_idx, i_idx, it)
    assert_within(out[finite], truth[finite], largest[finite])


@pytest.mark.parametrize("B, r, size, size_out", [
    (0, 5, (4, 5), (4, 5)),
    (2, 0, (4, 5), (4, 5)),
    (2, 5, (4, 5), (0, 5)),
    (2, 5, (4, 0), (4, 5)),
])  # fmt: skip
def test_empty(backend, B, r, size, size_out):
    out = ops.sampled_conv(
        torch.ones(B, 2, *size),
        torch.ones(B, 3, *size_out),
        torch.zeros(r).int(),
        torch.zeros(r).int(),
        kernel_size=(3, 3),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        backend=backend.name,
    )
    assert torch.equal(out, torch.zeros(B, r))


def layers_of_one_dtype(backend):
    names = ["2-D", "1x1, planes longer than a box", "stride 2"]
    if backend in INTERPRETED:
        names = ["2-D"]
    return [(name, torch.float32) for name in names] + [("2-D", torch.float16)] * (backend == "cpu")


@pytest.mark.cases("name, dtype", layers_of_one_dtype)
def test_same_bits(backend, name, dtype):
    """Run to run, for any number of threads, for any batch around an example and any coordinates
    around one."""
    it = LAYERS[name]
    r = 30 if backend.emulated else 200
    x, dy, o_idx, i_idx = inputs(it, 5, r, dtype, bias=True)

    def run(part, k=slice(None)):
        return ops.sampled_conv(
            x[part], dy[part], o_idx[k], i_idx[k], **it.options, bias=True, backend=backend.name
        )

    whole = run(slice(None))
    assert torch.equal(whole, run(slice(None)))
    if backend.name == "cuda":
        assert torch.equal(whole[2:3, 1::2], run(slice(2, 3), slice(1, None, 2)))
    if backend.name == "cpu":
        for _ in numbers_of_threads():
            assert torch.equal(whole, run(slice(None)))
            assert torch.equal(whole[2:3], run(slice(2, 3)))
            assert torch.equal(whole[2:3, 1::2], run(slice(2, 3), slice(1, None, 2)))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_layer(data):
    """Every coordinate of layers nobody thought of."""
    n = data.draw(st.integers(1, 3))
    few = st.tuples(*[st.integers(1, 3)] * n)
    groups = data.draw(st.integers(1, 3))
    it = Layer(
        C=groups * data.draw(st.integers(1, 3)),
        O=groups * data.draw(st.integers(1, 3)),
        size=data.draw(st.tuples(*[st.integers(1, 20 if n < 3 else 6)] * n)),
        kernel=data.draw(st.tuples(*[st.integers(1, 4)] * n)),
        stride=data.draw(few),
        low=data.draw(st.tuples(*[st.integers(0, 3)] * n)),
        high=data.draw(st.tuples(*[st.integers(0, 4)] * n)),
        dilation=data.draw(few),
        groups=groups,
    )
    if min(it.size_out) < 1:
        return
    x, dy, o_idx, i_idx = inputs(it, 2, None, torch.float32, bias=True)
    out = ops.sampled_conv(x, dy, o_idx, i_idx, **it.options, bias=True)
    assert_within(out, exact(x, dy, o_idx, i_idx, it), bound(x, dy, o_idx, i_idx, it))


def test_opcheck():
    if dropinf.backends()["cpu"] != "available":
        pytest.skip(dropinf.backends()["cpu"])
    it = LAYERS["groups"]
    x, dy, o_idx, i_idx = inputs(it, 2, 12, torch.float32)
    torch.use_deterministic_algorithms(False)
    args = (x, dy, o_idx, i_idx, *it.options.values(), False, torch.ones(12), torch.zeros(2, 12))
    torch.library.opcheck(torch.ops.dropinf.sampled_conv.default, args)


good = {
    "x": torch.zeros(2, 4, 5, 5),
    "dy": torch.zeros(2, 6, 5, 5),
    "o_idx": torch.zeros(6).int(),
    "i_idx": torch.zeros(6).int(),
    "kernel_size": (3, 3),
    "stride": (1, 1),
    "padding": (1, 1),
    "dilation": (1, 1),
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 4)}, r"x must be \[B, C, \*S\] with 1 to 3 .*, got \(2, 4\)"),
        ({"x": torch.zeros(1, 1, 1, 1, 1, 1)}, r"x must be \[B, C, \*S\] with 1 to 3"),
        ({"dy": torch.zeros(2, 6, 5)}, r"dy must be \[B=2, O, \*S'\] with 2 .*, got \(2, 6, 5\)"),
        ({"dy": torch.zeros(1, 6, 5, 5)}, r"dy must be \[B=2, O, \*S'\]"),
        ({"dy": torch.zeros(2, 6, 5, 5).half()}, "dy must be torch.float32"),
        ({"x": torch.zeros(2, 4, 5, 5).long()}, "x must be floating point, got torch.int64"),
        ({"o_idx": torch.zeros(6).long()}, "o_idx must be torch.int32 on cpu, got torch.int64"),
        ({"i_idx": torch.zeros(5).int()}, r"must both be \[r\], got \(6,\) and \(5,\)"),
        ({"kernel_size": (3,)}, r"kernel_size must be 2 ints of at least 1, .*, got \(3,\)"),
        ({"kernel_size": 3}, "kernel_size must be 2 ints of at least 1, .*, got 3"),
        ({"stride": (1, 0)}, r"stride must be 2 ints of at least 1, .*, got \(1, 0\)"),
        ({"padding": (-1, 0)}, r"padding must be 2 ints of at least 0, .*, got \(-1, 0\)"),
        ({"padding": "same"}, "padding must be 2 ints of at least 0, .*, got same"),
        ({"dilation": (0, 1)}, "dilation must be 2 ints of at least 1"),
        ({"groups": 3}, "groups must divide C=4 and O=6, got 3"),
        ({"groups": 0}, "groups must divide C=4 and O=6, got 0"),
        ({"out": torch.zeros(2, 7)}, r"out must be floating point \(2, 6\) on cpu"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        ops.sampled_conv(**{**good, **change})


@pytest.mark.parametrize(
    "name, index, options",
    [
        ("o_idx", 6, {}),
        ("o_idx", -1, {}),
        ("i_idx", 36, {}),
        ("i_idx", 37, {"bias": True}),
        ("i_idx", -1, {}),
        ("i_idx", 18, {"groups": 2}),
        ("i_idx", 2**31 - 1, {}),
    ],
    ids=str,
)
def test_index_out_of_range(backend, name, index, options):
    call = {**good, **options, name: good[name].clone(), "backend": backend.name}
    call[name][2] = index
    assert_refused_or_nan(backend, lambda: ops.sampled_conv(**call), 2, name)


def test_float64_is_for_the_reference():
    it = LAYERS["2-D"]
    x, dy, o_idx, i_idx = inputs(it, 2, 50, torch.float64)
    out = ops.sampled_conv(x, dy, o_idx, i_idx, **it.options)
    torch.testing.assert_close(out, exact(x, dy, o_idx, i_idx, it), rtol=1e-12, atol=1e-12)
    if dropinf.backends()["cpu"] == "available":
        with pytest.raises(dropinf.BackendError, match=r"not torch.float64\. Here: 'reference'"):
            ops.sampled_conv(x, dy, o_idx, i_idx, **it.options, backend="cpu")
