"""Weights of entries: the same laws for every op that takes them, on every backend."""

import math

import pytest
import torch
from conftest import BACKENDS

from dropinf import ops
from dropinf.ops import dispatch

ONES = dict.fromkeys(("kernel_size", "stride", "padding", "dilation"), (1, 1))


class Numbers:
    """Small whole numbers, so that every sum is exact, whatever its order."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape):
        return torch.randint(-8, 9, shape, generator=self.generator).float()

    def index(self, size, *shape, dtype=torch.int32):
        return torch.randint(size, shape, generator=self.generator).to(dtype)


def case(name, backend=None):
    """An op's name, its arguments, and the shape of its weights."""
    new, op = Numbers(), name.split(",")[0]
    T = 9 if name.endswith("one chunk") else 150  # of several
    if T == 150 and backend and backend.name == "triton" and backend.emulated:
        T = 72  # two chunks of its 64
    if name.startswith("sampled_outer"):
        shape = (40, 3) if "sums" in name else (40,)
        at = {"o_idx": new.index(5, *shape), "i_idx": new.index(8, *shape)}
        return op, {"x": new(2, T, 7), "dy": new(2, T, 5), **at, "bias": True}, shape
    if name.startswith("sampled_embedding"):
        at = {"o_idx": new.index(5, 40), "i_idx": torch.full((40,), 3).int()}
        ids = torch.full((2, T), 3)  # every coordinate meets every position
        return op, {"ids": ids, "dy": new(2, T, 5), **at}, (40,)
    if name.startswith("sampled_conv"):
        size = {9: (4, 4), 72: (8, 9), 150: (12, 12)}[T]
        x, dy = new(2, 3, *size), new(2, 5, *size)
        if "channels last" in name:
            x, dy = (t.to(memory_format=torch.channels_last) for t in (x, dy))
        at = {"o_idx": new.index(5, 40), "i_idx": new.index(3, 40)}
        return op, {"x": x, "dy": dy, **at, **ONES}, (40,)
    if name.startswith("sampled_norm"):
        # As many of -1 as of 1: statistics, and so all sums, are exact.
        signs = torch.ones(2, T, 8)
        signs.scatter_(2, torch.rand(2, T, 8, generator=new.generator).argsort(2)[..., 4:], -1)
        shape = (40, 3) if "sums" in name else (40,)
        return op, {"x": signs, "dy": new(2, T, 8), "index": new.index(16, *shape), "eps": 0}, shape
    if name == "factored_outer":
        arguments = {"x": new(2, T, 7), "dy": new(2, T, 5), "o_idx": None, "i_idx": None}
        return op, arguments, (35,)
    grad = new(9, 8).T if "strided" in name else new(8, 9)
    shape = (40, 3) if "sums" in name else (40,)
    return op, {"grads": grad, "indices": new.index(72, *shape).long()}, shape


NAMES = [
    "sampled_outer",
    "sampled_outer, one chunk",
    "sampled_outer, sums",
    "sampled_outer, sums, one chunk",
    "sampled_embedding",
    "sampled_embedding, one chunk",
    "sampled_conv",
    "sampled_conv, one chunk",
    "sampled_conv, channels last",
    "sampled_norm",
    "sampled_norm, one chunk",
    "sampled_norm, sums",
    "factored_outer",
    "gather_grads",
    "gather_grads, strided",
    "gather_grads, sums",
    "gather_grads, sums, strided",
]
PAIRS = [
    (name, backend)
    for name in NAMES
    for backend in BACKENDS
    if backend.split("-")[0] in dispatch.KERNELS[name.split(",")[0]]
]
every = pytest.mark.parametrize("name, backend", PAIRS, indirect=["backend"])


def run(op, arguments, weights, backend=None):
    """[B, r], also of the one gradient of gather_grads, whose weights are packed."""
    if op != "gather_grads":
        return getattr(ops, op)(**arguments, weights=weights, backend=backend)
    given = {name: [value] for name, value in arguments.items()}
    if weights is not None and weights.shape == arguments["indices"].shape:
        weights = weights.flatten()
    return ops.gather_grads(**given, weights=weights, backend=backend)[None]


def gradient(arguments):
    return arguments["grads" if "grads" in arguments else "dy"]


@every
def test_none_is_ones(backend, name):
    op, arguments, shape = case(name, backend)
    out = run(op, arguments, None, backend.name)
    assert out.any() and torch.equal(out, run(op, arguments, torch.ones(shape), backend.name))


@every
def test_linear(backend, name):
    op, arguments, shape = case(name, backend)
    new = Numbers()
    one, other = new(*shape) / 8, new(*shape) / 8
    assert ((one == 0) & (other != 0)).any() and not torch.equal(one, other)
    rows = [run(op, arguments, w, backend.name) for w in (one, other, one - 3 * other)]
    assert torch.equal(rows[2], rows[0] - 3 * rows[1]) and rows[2].any()
    # An entry has its own weights: changed ones change no other.
    other = one.clone()
    other[:10] += 1
    changed = run(op, arguments, other, backend.name)
    assert not torch.equal(changed[:, :10], rows[0][:, :10])
    assert torch.equal(changed[:, 10:], rows[0][:, 10:])


@pytest.mark.parametrize(
    "name, backend", [pair for pair in PAIRS if "sums" not in pair[0]], indirect=["backend"]
)
def test_the_finished_sum_is_multiplied(backend, name):
    """Where an entry is one coordinate, with one rounding, so that a constant is a scale."""
    op, arguments, shape = case(name, backend)
    dy = gradient(arguments)
    dy += torch.rand(dy.shape, generator=torch.Generator().manual_seed(1))
    sums = run(op, arguments, None, backend.name)
    for weights in (torch.randn(shape), torch.full(shape, 1.7)):
        assert torch.equal(run(op, arguments, weights, backend.name), sums * weights)


@every
@pytest.mark.filterwarnings("ignore:invalid value")  # of Triton's interpreter
def test_zeros_leave_out(backend, name):
    """Whatever is there."""
    op, arguments, shape = case(name, backend)
    weights = torch.randint(2, shape, generator=torch.Generator().manual_seed(1)).float()
    weights[0] = 0
    weights[1] = -0.0
    gradient(arguments).fill_(torch.nan)
    out = run(op, arguments, weights, backend.name)
    left_out = weights.reshape(len(weights), -1).any(1).logical_not()
    assert 1 < left_out.sum() < len(weights)
    assert (out[:, left_out] == 0).all() and out[:, ~left_out].isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_bad_weights(name):
    op, arguments, shape = case(name)
    of = f"{op}: weights"
    if op == "gather_grads":
        shape = (math.prod(shape),)  # packed
    for weights, message in (
        (torch.ones(3, *shape[1:]), rf"{of} must .*\({shape[0]},.*got \(3,"),
        (torch.ones(*shape, 1), f"{of} must "),
        (torch.ones(shape).double(), f"{of} must be torch.float32 on cpu, got torch.float64"),
        (torch.ones(shape).to(torch.int8), f"{of} must be torch.float32 on cpu, got torch.int8"),
        (torch.ones(shape, device="meta"), f"{of} must be torch.float32 on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            run(op, arguments, weights)


@pytest.mark.parametrize("name", NAMES)
def test_float64(name):
    """Inputs of float64 take weights of either."""
    op, arguments, shape = case(name)
    wide = {
        key: value.double() if getattr(value, "is_floating_point", bool)() else value
        for key, value in arguments.items()
    }
    weights = torch.randn(shape, dtype=torch.float64)
    out, narrow = run(op, wide, weights), run(op, wide, weights.float())
    assert out.dtype == narrow.dtype == torch.float64 and not torch.equal(out, narrow)
    assert torch.equal(narrow, run(op, wide, weights.float().double()))
