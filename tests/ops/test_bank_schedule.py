"""The order of the staged kernel: no bank of shared memory is asked twice, nothing is lost."""

import copy
import math
import pickle
import re

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from outer_cases import Layer, coordinates, drawn_by_energy
from torch import nn

import dropinf
from dropinf import Dropout, Plan, capture, ops
from dropinf.capturing import runs
from dropinf.ops import bank_schedule, outer, outer_ways
from dropinf.ops.bank_schedule import staged_order

pytestmark = pytest.mark.skipif(
    dropinf.backends()["cpu"] != "available", reason=dropinf.backends()["cpu"]
)


LAYERS = [  # each here for a reason
    Layer(7, 5, 0),  # no coordinate
    Layer(7, 5, 1),
    Layer(7, 5, 35),  # Full
    Layer(7, 5, 40, 4, bias=True),  # Full, with the bias
    Layer(768, 3072, 31),  # a warp less one
    Layer(768, 3072, 33, bias=True),  # a warp more one
    Layer(767, 3071, 1000, bias=True),  # odd sizes
    Layer(767, 3071, 1000, 4, bias=True),
    Layer(64, 64, 4096),  # Full; all banks equally full
    Layer(4096, 4096, 8192),
    Layer(4096, 4096, 8192, 4),
    Layer(768, 50257, 8192),  # an LM head: windows of outputs
    Layer(768, 50257, 8192, 4, bias=True),
    Layer(4096, 4096, 65536),  # several passes
    Layer(4096, 4096, 65536, 4),
    Layer(1, 3000, 200, bias=True),  # one feature
    Layer(3000, 1, 200),  # one output
]


def order_of(layer, o_idx, i_idx, **options):
    return staged_order(
        o_idx, i_idx, layer.I, layer.O, layer.element_size, bias=layer.bias, **options
    )


def unpack(order):
    """(o - o0, i) of every slot, [num_slots] int64 each."""
    packed = order.packed.numpy().view(np.uint32).astype(np.int64)
    return packed >> 16, packed & 0xFFFF


def degrees(element, element_size):
    """For each warp of 32 lanes, how often it waits: the most different words in one bank."""
    words = element.reshape(-1, 32) * element_size // 4
    return np.array(
        [max(len({w for w in warp if w % 32 == b}) for b in range(32)) for warp in words.tolist()]
    )


def first_fit(o, i, element_size):
    """How many warps: each coordinate in the first that has a lane, and its words or free banks."""
    warps = []
    for words in zip(o * element_size // 4, i * element_size // 4, strict=True):
        for lanes, banks in warps:
            if len(lanes) < 32 and all(
                b.get(w % 32, w) == w for b, w in zip(banks, words, strict=True)
            ):
                break
        else:
            lanes, banks = [], ({}, {})
            warps.append((lanes, banks))
        lanes.append(words)
        for b, w in zip(banks, words, strict=True):
            b[w % 32] = w
    return len(warps)


def check(order, layer, o_idx, i_idx, max_slots=9600, max_bytes=40 * 1024):
    """All that the kernel relies on."""
    o_idx, i_idx = o_idx.numpy().astype(np.int64), i_idx.numpy().astype(np.int64)
    r, s = o_idx.shape if o_idx.ndim == 2 else (len(o_idx), 1)
    o_idx, i_idx = o_idx.reshape(r, s), i_idx.reshape(r, s)
    assert order.passes.dtype == torch.int64 and order.passes.device.type == "cpu"
    assert order.packed.dtype == order.target.dtype == torch.int32
    assert order.element_size == layer.element_size and order.num_entries == r
    all_o, all_i = unpack(order)
    next_k = next_slot = 0
    for k0, k1, o0, o1, first, num_slots in order.passes.tolist():
        assert k0 == next_k and k1 > k0 and first == next_slot
        next_k, next_slot = k1, first + num_slots
        assert num_slots % 32 == 0 and num_slots <= max_slots
        assert o0 >= 0 and o1 <= layer.O and o0 * layer.element_size % 16 == 0
        staged = [(layer.I + layer.bias) * layer.element_size, (o1 - o0) * layer.element_size]
        assert sum(-(-size // 16) * 16 for size in staged) <= max_bytes
        slots = slice(first, next_slot)
        o, i, target = all_o[slots], all_i[slots], order.target.numpy()[slots]
        real = target >= 0
        # Every coordinate of the pass once, and what a slot holds is the coordinate of its target.
        assert np.array_equal(np.sort(target[real]), np.arange((k1 - k0) * s))
        assert np.array_equal(o[real] + o0, o_idx[k0:k1].ravel()[target[real]])
        assert np.array_equal(i[real], i_idx[k0:k1].ravel()[target[real]])
        assert (target[~real] == -1).all() and (o < max(o1 - o0, 1)).all()
        # The others repeat a coordinate of their own warp.
        for warp in range(num_slots // 32):
            lanes = slice(32 * warp, 32 * warp + 32)
            pairs = list(zip(o[lanes].tolist(), i[lanes].tolist(), strict=True))
            mine = real[lanes]
            assert mine.any()
            assert {p for p, m in zip(pairs, mine, strict=True) if not m} <= {
                p for p, m in zip(pairs, mine, strict=True) if m
            }
        for element in (o, i):
            assert (degrees(element, layer.element_size) == 1).all()
        if len(o) < 4000:
            lanes = np.argsort(target[real])
            assert num_slots == 32 * first_fit(o[real][lanes], i[real][lanes], layer.element_size)
    assert next_k == r and next_slot == len(order.packed) == len(order.target)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_no_conflicts(layer):
    o_idx, i_idx = coordinates(layer)
    order = order_of(layer, o_idx, i_idx)
    check(order, layer, o_idx, i_idx)
    again = order_of(layer, o_idx, i_idx)
    for a, b in zip(order[:3], again[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("element_size", [2, 4])
def test_one_bank(element_size):
    """What crowds in one word is read by many lanes at once; words of one bank are not."""
    layer = Layer(4096, 4096, 300, element_size)
    some = torch.arange(300, dtype=torch.int32)
    same = torch.full((300,), 5, dtype=torch.int32)
    bank = some % 30 * (128 // element_size)
    for o_idx, i_idx, warps in (
        (same, some, 10),  # all in one output
        (some, same, 10),
        (same, same, 10),
        (some, bank, 30),  # in 30 words of one bank
    ):
        order = order_of(layer, o_idx, i_idx)
        check(order, layer, o_idx, i_idx)
        assert len(order.packed) == warps * 32


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("max_slots", [16384, 1024])
def test_signed(element_size, max_slots):
    """[r, s] coordinates, in any order."""
    layer = Layer(700, 900, 500, element_size)
    rng = np.random.default_rng(0)
    o_idx = torch.from_numpy(rng.integers(0, layer.O, (layer.r, 4), dtype=np.int32))
    i_idx = torch.from_numpy(rng.integers(0, layer.I, (layer.r, 4), dtype=np.int32))
    order = order_of(layer, o_idx, i_idx, max_slots=max_slots)
    check(order, layer, o_idx, i_idx, max_slots)
    assert len(order.passes) == 1 or max_slots == 1024


def test_nothing_to_sum():
    """No entries, and entries without a coordinate."""
    none = torch.empty(0, dtype=torch.int32)
    assert staged_order(none, none, 3, 4, 2).passes.shape == (0, 6)
    order = staged_order(none.reshape(5, 0), none.reshape(5, 0), 3, 4, 2)
    assert order.num_entries == 5 and len(order.packed) == 0


def test_weight_and_bias():
    """A weight's coordinates and then its bias's, which begin at output 0 again."""
    weight, bias = coordinates(Layer(64, 50000, 3000)), coordinates(Layer(1, 50000, 50), seed=1)
    o_idx = torch.cat([weight[0], bias[0]])
    i_idx = torch.cat([weight[1], torch.full((50,), 64, dtype=torch.int32)])
    for element_size in (2, 4):
        layer = Layer(64, 50000, 3050, element_size, bias=True)
        order = order_of(layer, o_idx, i_idx)
        check(order, layer, o_idx, i_idx)
        assert len(order.passes) <= 2 * math.ceil(50000 * element_size / 40e3)


def test_what_does_not_fit():
    o_idx, i_idx = (torch.tensor(v, dtype=torch.int32) for v in ([1, 2], [0, 3]))
    # An offset in bytes has 16 bits, whatever room there is.
    for width, element_size in ((32768, 2), (16384, 4)):
        wide = (o_idx, i_idx, width, 8, element_size)
        assert staged_order(*wide, max_bytes=1 << 20) is not None
        assert staged_order(*wide, bias=True, max_bytes=1 << 20) is None
        tall = (torch.arange(40000).int(), torch.arange(40000).int() % 2, 2, 40000, element_size)
        windows = staged_order(*tall, max_bytes=1 << 20, max_slots=1 << 20).passes
        assert ((windows[:, 3] - windows[:, 2]) * element_size <= 65536).all()
    assert staged_order(o_idx, i_idx, 20472, 8, 2) is not None  # with a window of 16 bytes
    assert staged_order(o_idx, i_idx, 20473, 8, 2) is None
    assert staged_order(o_idx, i_idx, 10240, 8, 4) is None
    # The coordinates of one entry in windows too far apart, or more than a pass may have.
    far = torch.tensor([[0, 60000]], dtype=torch.int32)
    assert staged_order(far, far % 2, 2, 60001, 2) is None
    one_bank = torch.tensor([[0, 64]], dtype=torch.int32)
    assert staged_order(far * 0 + 1, one_bank, 65, 60001, 2, max_slots=64) is not None
    assert staged_order(far * 0 + 1, one_bank, 65, 60001, 2, max_slots=32) is None
    # Not sorted, over too many outputs.
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(60000).astype(np.int32))
    assert staged_order(shuffled, shuffled % 2, 2, 60001, 2) is None
    assert staged_order(shuffled[:500] % 9000, shuffled[:500] % 2, 2, 9000, 2) is not None


def test_errors(monkeypatch):
    one = torch.ones(1, dtype=torch.int32)
    for arguments, message in (
        ((one, one, 1, 2, 2), r"i_idx must be in \[0, 1\), got 1 to 1"),
        ((one, -one, 1, 2, 2), r"i_idx must be in \[0, 1\), got -1"),
        ((one, one, 2, 1, 2), r"o_idx must be in \[0, 1\), got 1 to 1"),
        ((one, one[:0], 2, 2, 2), "must have one shape"),
        ((one.long(), one, 2, 2, 2), "o_idx must be int32"),
        ((one, one, 2, 2, 8), "element_size must be 2 or 4, got 8"),
    ):
        with pytest.raises(ValueError, match=f"^staged_order: .*{message}"):
            staged_order(*arguments)
    monkeypatch.setattr(bank_schedule, "_C", None)
    with pytest.raises(RuntimeError, match="staged_order: needs the C"):
        staged_order(one, one, 2, 2, 2)


@pytest.mark.parametrize("draw", [coordinates, drawn_by_energy])
def test_padding(draw):
    """How many slots only fill up warps; with -s, the figures and what a sorted order costs.

    Coordinates by energy crowd in few rows and columns, and need no more.
    """
    for layer, bound in (
        (Layer(768, 768, 1024), 0.2),
        (Layer(768, 3072, 8192), 0.05),
        (Layer(4096, 4096, 8192), 0.06),
        (Layer(4096, 4096, 8192, 4), 0.06),
        (Layer(4096, 4096, 65536), 0.06),
        (Layer(4096, 4096, 65536, 4), 0.06),
        (Layer(768, 50257, 65536), 0.06),
        (Layer(768, 50257, 8192), 0.3),
    ):
        o_idx, i_idx = draw(layer)
        order = order_of(layer, o_idx, i_idx)
        padding = len(order.packed) / layer.r - 1
        in_warps = layer.r // 32 * 32
        plain = [degrees(e.numpy()[:in_warps], layer.element_size).mean() for e in (o_idx, i_idx)]
        slots = order.passes[:, 5]
        print(
            f"\n{layer}: padding {padding:.1%} in {len(slots)} passes; conflicts of the sorted "
            f"order {plain[0]:.2f} in dy and {plain[1]:.2f} in x",
            end="",
        )
        assert 0 <= padding <= bound
        assert max(plain) > 2
        # Balanced: the last pass is the only one that may be smaller, and not by much.
        assert slots.min() >= 0.9 * slots.max()


def emulated(order, x, dy, weights, s):
    """The kernel: sums of the slots, then scattered to their targets and added with weights."""
    B, T, _ = x.shape
    x = torch.cat([x, torch.ones(B, T, 1, dtype=x.dtype)], 2)  # a bias reads it
    out = torch.full((B, order.num_entries), torch.nan, dtype=x.dtype)
    o, i = (torch.from_numpy(a) for a in unpack(order))
    for k0, k1, o0, o1, first, num_slots in order.passes.tolist():
        window = dy[..., o0:o1]
        sums = torch.zeros(B, num_slots, dtype=x.dtype)
        at = slice(first, first + num_slots)
        for t in range(T):
            sums += x[:, t, i[at]] * window[:, t, o[at]]
        targets = order.target[at].long()
        parts = torch.full((B, (k1 - k0) * s), torch.nan, dtype=x.dtype)
        parts[:, targets[targets >= 0]] = sums[:, targets >= 0]
        parts = parts.reshape(B, k1 - k0, s)
        out[:, k0:k1] = (parts * weights[k0:k1]).sum(2)
    return out


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("max_slots", [16384, 128])
@pytest.mark.parametrize("s", [1, 4])
def test_rows_in_this_order(element_size, max_slots, s):
    """Rows from a small emulation of the kernel are the definition's, entry by entry."""
    layer = Layer(37, 91, 400, element_size, bias=True)
    rng = np.random.default_rng(0)
    o_idx, i_idx = coordinates(layer)
    if s > 1:
        o_idx, i_idx = (t[torch.from_numpy(rng.integers(0, 400, (50, s)))] for t in (o_idx, i_idx))
    x = torch.from_numpy(rng.standard_normal((3, 6, layer.I)))
    dy = torch.from_numpy(rng.standard_normal((3, 6, layer.O)))
    order = order_of(layer, o_idx, i_idx, max_slots=max_slots)
    check(order, layer, o_idx, i_idx, max_slots)
    assert (len(order.passes) == 1) == (max_slots == 16384)
    weights = torch.from_numpy(rng.standard_normal((len(o_idx), s)))
    rows = emulated(order, x, dy, weights, s)

    with_bias = torch.cat([x, torch.ones(3, 6, 1, dtype=x.dtype)], 2)
    dense = torch.einsum("bto,bti->boi", dy, with_bias)
    truth = dense[:, o_idx.long(), i_idx.long()].reshape(3, -1, s) * weights
    truth = truth.sum(2)
    assert (rows - truth).abs().max() < 1e-12


def test_sampled_outer_checks_it():
    """An order is for r coordinates and one element size; rows are the same with it."""
    layer = Layer(37, 91, 400)
    o_idx, i_idx = coordinates(layer)
    x, dy = torch.randn(2, 5, 37).bfloat16(), torch.randn(2, 5, 91).bfloat16()
    order = order_of(layer, o_idx, i_idx)
    without = ops.sampled_outer(x, dy, o_idx, i_idx)
    assert torch.equal(ops.sampled_outer(x, dy, o_idx, i_idx, order=order), without)
    pair = [torch.stack([index, index], 1) for index in (o_idx, i_idx)]
    message = "sampled_outer: order must be for {} in {}-byte elements on cpu, got one for {}"
    for arguments, wanted in (
        ((x.float(), dy.float(), o_idx, i_idx), ("[400, 1] coordinates", 4)),
        ((x, dy, o_idx[1:], i_idx[1:]), ("[399, 1] coordinates", 2)),
        ((x, dy, *pair), ("[400, 2] coordinates", 2)),
    ):
        whole = re.escape(message.format(*wanted, "[400, 1] coordinates in 2-byte elements on cpu"))
        with pytest.raises(ValueError, match=whole):
            ops.sampled_outer(*arguments, order=order)


def test_kept_by_the_plan(monkeypatch):
    """Coordinates and orders are made once for a plan, not for a batch or a capture."""
    model = nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.LayerNorm(12), nn.Linear(12, 6))
    plan, x = Plan.make(model, Dropout(r=50)), torch.randn(6, 4, 9)

    def rows():
        with capture(model, plan) as tap:
            return [tap.rows(model(part).square().sum((1, 2))) for part in (x[:3], x[3:])]

    def twice():
        return rows() + rows()

    without = twice()
    prepared = dict(plan.prepared)
    assert len(prepared) == 3 and not any(kept.orders for kept in prepared.values())
    made, used = [], []

    def make(*arguments, **options):
        made.append(staged_order(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(outer_ways, "order_if_faster", make)
    # On CUDA tensors they are made; here the CPU stands in for it.
    monkeypatch.setattr(runs, "_on_cuda", lambda device: True)
    for module in ("closing", "kept"):  # sites in Python, whose checks are seen
        monkeypatch.setattr(f"dropinf.capturing.{module}.CPP", None)
    monkeypatch.setattr(outer, "_check_order", lambda op, order, o_idx, x: used.append(order))
    for a, b in zip(twice(), without, strict=True):
        assert torch.equal(a, b)
    assert len(made) == 3 and {id(order) for order in used} == {id(order) for order in made}
    assert len(used) == 12
    assert all(plan.prepared[key] is kept for key, kept in prepared.items())
    for other in (pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)):
        assert other.fingerprint == plan.fingerprint and not other.prepared


small = st.integers(1, 90)


@settings(max_examples=150, deadline=None)
@given(
    I=small,
    O=small,
    num_entries=st.integers(0, 60),
    s=st.sampled_from([1, 1, 3]),
    element_size=st.sampled_from([2, 4]),
    bias=st.booleans(),
    max_warps=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_small_graphs(I, O, num_entries, s, element_size, bias, max_warps, seed):
    """Coordinates that may repeat, in any order; beside passes that take what fits."""
    layer = Layer(I, O, num_entries, element_size, bias)
    rng = np.random.default_rng(seed)
    shape = (num_entries,) if s == 1 else (num_entries, s)
    o_idx = torch.from_numpy(rng.integers(0, O, shape, dtype=np.int32))
    i_idx = torch.from_numpy(rng.integers(0, I + bias, shape, dtype=np.int32))
    order = order_of(layer, o_idx, i_idx, max_slots=32 * max_warps)

    def warps(k0, k1):
        part = (e[k0:k1].ravel() for e in (o_idx.numpy(), i_idx.numpy()))
        return first_fit(*part, element_size)

    sizes, k0 = [], 0
    while k0 < num_entries:
        fitting = [k1 for k1 in range(k0 + 1, num_entries + 1) if warps(k0, k1) <= max_warps]
        if not fitting:
            assert order is None
            return
        # One more coordinate never takes fewer warps, so that those that fit are in front.
        assert fitting == list(range(k0 + 1, k0 + 1 + len(fitting)))
        sizes.append(warps(k0, fitting[-1]))
        k0 = fitting[-1]
    check(order, layer, o_idx, i_idx, 32 * max_warps)
    assert len(order.passes) == len(sizes)
    assert not sizes or int(order.passes[:, 5].max()) // 32 <= max(sizes)


@pytest.mark.parametrize("num_words", [1, 40, 3000])
@pytest.mark.parametrize("n", [0, 1, 40, 3000])
def test_pack_warps(n, num_words):
    rng = np.random.default_rng(n)
    x_word, dy_word = rng.integers(0, num_words, (2, n), dtype=np.int32)
    warp, count = dropinf._C.pack_warps(x_word, dy_word)
    assert count == first_fit(dy_word, x_word, 4)
    assert np.bincount(warp, minlength=1).max() <= 32
    for words in (x_word, dy_word):
        read = {(w, b % 32, b) for w, b in zip(warp.tolist(), words.tolist(), strict=True)}
        assert len(read) == len({(w, bank) for w, bank, _ in read})
    if n:
        with pytest.raises(IndexError):
            dropinf._C.pack_warps(x_word - num_words, dy_word)
