"""Which way `sampled_outer` takes on CUDA: by r, the shape and the chip, and as measured."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import EPS32, assert_within
from outer_cases import Layer, coordinates, drawn_by_energy
from places import ROOT
from properties import given, settings, st

import dropinf
from dropinf import ops
from dropinf.capturing import runs
from dropinf.ops import column_schedule, outer_ways
from dropinf.ops.bank_schedule import StagedOrder, staged_order
from dropinf.ops.column_schedule import ColumnOrder

OPS = ("sampled_outer",)

pytestmark = pytest.mark.skipif(
    dropinf.backends()["cpu"] != "available", reason=dropinf.backends()["cpu"]
)

CHIPS = ("sm_80", "sm_86", "sm_90")


def chosen(layer, chip="sm_90", draw=coordinates, s=None):
    """The order of a layer on a chip; with s, of coordinates [r, s]."""
    at = draw(layer)
    if s:
        at = [index.reshape(-1, s) for index in at]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outer_ways, "block_bytes", lambda device: outer_ways.BLOCK_BYTES[chip])
        return outer_ways.order_if_faster(
            *at, layer.I, layer.O, layer.element_size, bias=layer.bias
        )


def described(order):
    """Its way, and how many passes it has."""
    if order is None:
        return "direct"
    return f"{'staged' if isinstance(order, StagedOrder) else 'columns'} {len(order.passes)}"


@pytest.mark.parametrize(
    "layer, ways",
    [  # on sm_80, sm_86 and sm_90
        # What was measured.
        (Layer(4096, 4096, 64), ("direct", "direct", "direct")),
        (Layer(4096, 4096, 1024), ("staged 1", "staged 1", "staged 1")),
        (Layer(4096, 4096, 8192), ("staged 1", "staged 1", "staged 1")),
        (Layer(4096, 4096, 16384), ("staged 2", "staged 2", "staged 2")),
        (Layer(4096, 4096, 65536), ("staged 8", "staged 8", "columns 3")),
        # Few coordinates leave most sectors unread; each pass reads x anew.
        (Layer(4096, 4096, 511), ("direct", "direct", "direct")),
        (Layer(11008, 4096, 1500), ("staged 1", "direct", "staged 1")),
        (Layer(11008, 4096, 3000), ("staged 1", "staged 3", "staged 1")),
        # Elements of four bytes have no columns.
        (Layer(4096, 4096, 8192, 4), ("staged 1", "staged 2", "staged 1")),
        (Layer(4096, 4096, 32768, 4), ("staged 4", "staged 4", "staged 4")),
        (Layer(4096, 4096, 32768), ("staged 4", "staged 4", "columns 2")),
        (Layer(4096, 8192, 16384), ("staged 2", "staged 2", "staged 2")),  # 2 of each in a window
        (Layer(512, 512, 9000), ("staged 1", "staged 1", "staged 1")),
        # 40 KB: one pass of one block, or two passes of two blocks where x is the narrow side.
        (Layer(4096, 16384, 8192, bias=True), ("staged 1", "staged 2", "staged 2")),
        (Layer(16384, 4096, 8192, bias=True), ("staged 1", "direct", "staged 1")),
        (Layer(4096, 11008, 8192), ("staged 1", "staged 2", "staged 1")),
        (Layer(24000, 4096, 8192), ("direct", "direct", "staged 1")),  # 55 KB
        (Layer(30000, 4096, 9000), ("direct", "direct", "direct")),  # x fits nowhere
        (Layer(768, 8, 1024), ("staged 1", "staged 1", "staged 1")),  # LoRA: 4 words, read by all
    ],
    ids=str,
)
def test_ways(layer, ways):
    assert tuple(described(chosen(layer, chip)) for chip in CHIPS) == ways


def test_what_the_kernels_have():
    """The rule and csrc/cuda have the same numbers."""
    files = ("sampled_outer", "sampled_outer_staged", "sampled_outer_columns")
    text = "".join((ROOT / "csrc" / "cuda" / f"{name}.cuh").read_text() for name in files)
    named = dict(re.findall(r"(k\w+) = ([\d *]+)[;,]", text))
    value = {name: math.prod(map(int, product.split("*"))) for name, product in named.items()}
    assert value["kUnroll"] == outer_ways._LEAST_POSITIONS
    assert value["kMaxPositions"] == outer_ways._MOST_POSITIONS
    assert value["kStagedBytes"] == outer_ways._BUFFER_BYTES
    assert value["kMostCoordinates"] * value["kStagedThreads"] == outer_ways.MANY
    assert value["kColumnOutputs"] == column_schedule.OUTPUTS
    assert value["kColumnInputs"] == column_schedule.INPUTS
    cells = column_schedule.OUTPUTS + column_schedule.INPUTS + 1
    assert 2 * cells * value["kCellBytes"] == column_schedule.SHARED_BYTES


@pytest.mark.parametrize("layer", [Layer(4096, 4096, r) for r in (1024, 8192, 16384)], ids=str)
def test_the_measured_order_is_taken(layer):
    """That of positions of 40 KB, whatever room a chip has."""
    measured = staged_order(*coordinates(layer), layer.I, layer.O, 2)
    for chip in CHIPS:
        assert all(map(torch.equal, chosen(layer, chip).tensors, measured.tensors))


def test_crowded():
    """Coordinates in many words of one bank would have a warp each."""
    o_idx = torch.arange(0, 4096, dtype=torch.int32)
    assert outer_ways.order_if_faster(o_idx, o_idx * 64 % 16384, 16384, 4096, 2) is None


def test_two_blocks_against_fewer_passes(monkeypatch):
    """Bytes of all passes over the share of bandwidth; were shares equal, one pass would win."""
    layer = Layer(4096, 16384, 8192, bias=True)
    assert described(chosen(layer)) == "staged 2"
    monkeypatch.setattr(outer_ways, "_SHARE_OF_BANDWIDTH", {1: 0.8, 2: 0.8})
    assert described(chosen(layer)) == "staged 1"
    monkeypatch.setattr(outer_ways, "_SHARE_OF_BANDWIDTH", {1: 0.2, 2: 0.8})
    assert described(chosen(Layer(4096, 11008, 8192))) == "staged 2"
    monkeypatch.undo()
    # Two passes of 7.5 KB have four positions in a buffer: one block of sm_86, and nothing gained.
    assert described(chosen(Layer(1024, 5632, 8192), "sm_86")) == "staged 1"


def test_room_is_asked_of_the_device(monkeypatch):
    """The table is for tensors on the CPU alone."""
    said = {"shared_memory_per_block_optin": 101376}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**said))
    assert outer_ways.block_bytes(torch.device("cuda:1")) == 101376
    assert outer_ways.block_bytes(torch.device("cpu")) == 227 * 1024
    said.clear()
    monkeypatch.setattr(outer_ways, "_DEFAULT_CHIP", "sm_80")
    assert outer_ways.block_bytes(torch.device("cpu")) == 163 * 1024
    assert outer_ways.block_bytes(torch.device("cuda")) == 0
    monkeypatch.setattr(outer_ways, "block_bytes", lambda _: 0)
    assert outer_ways.order_if_faster(*coordinates(Layer(64, 64, 900)), 64, 64, 2) is None


def test_sums():
    """Coordinates [r, s] take the ways of r * s others."""
    layer = Layer(1024, 1024, 16384)
    assert described(chosen(layer)) == described(chosen(layer, s=1)) == "columns 1"
    order = chosen(layer, s=2)
    assert described(order) == "columns 1" and (order.num_entries, order.s) == (8192, 2)
    assert described(chosen(layer, "sm_80", s=2)) == "staged 2"


@pytest.mark.parametrize("chip", CHIPS)
def test_draws_by_energy(chip):
    """They take the ways of uniform draws of their r and shape."""
    for layer in (
        Layer(4096, 4096, 64),
        Layer(4096, 4096, 8192),
        Layer(4096, 4096, 32768),
        Layer(768, 3072, 8192, 4),
        Layer(1024, 1024, 16384),
        Layer(30000, 4096, 8192),
    ):
        uniform, drawn = (chosen(layer, chip, draw) for draw in (coordinates, drawn_by_energy))
        assert type(uniform) is type(drawn), layer


def test_weighted_coordinates(monkeypatch):
    """Weights change no way, nor what an order is."""
    monkeypatch.setattr(runs, "_on_cuda", lambda device: True)
    for layer in (Layer(256, 256, 10000), Layer(256, 256, 900), Layer(256, 256, 9)):
        at, cpu = coordinates(layer), torch.device("cpu")
        orders = [
            runs.order(
                runs.Coordinates(*at, weights, None, {}), ops.sampled_outer, 256, 256, 2, cpu, None
            )
            for weights in (None, torch.randn(layer.r))
        ]
        assert described(orders[0]) == described(orders[1]) == described(chosen(layer))
        if orders[0] is not None:
            assert all(map(torch.equal, orders[0].tensors, orders[1].tensors))


sizes = st.builds(lambda wide, more: 1000 * wide + more, st.integers(0, 20), st.integers(1, 99))


@settings(max_examples=80, deadline=None)
@given(
    chip=st.sampled_from(sorted(outer_ways.BLOCK_BYTES)),
    I=sizes,
    O=sizes,
    reads=st.sampled_from([0, 1, 2, 5, 200]),
    element_size=st.sampled_from([2, 4]),
    bias=st.booleans(),
    s=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_what_is_chosen_fits(chip, I, O, reads, element_size, bias, s, seed):
    """What run_staged and the columns kernel need is what a block of the chip has.

    Of layers with about so many coordinates that direct would read x and dy `reads` times.
    """
    r = min(reads * (I + O + 16) * element_size // 32, I * O, 12000)
    layer = Layer(I, O, r // s * s, element_size, bias)
    order = chosen(layer, chip, lambda layer: coordinates(layer, seed), s)
    limit = outer_ways.BLOCK_BYTES[chip]
    if isinstance(order, ColumnOrder):
        assert element_size == 2 and limit >= 2 * 6145 * 16
    if not isinstance(order, StagedOrder):
        return
    up = lambda n: -(-n * element_size // 16) * 16  # noqa: E731
    k0, k1, o0, o1, _, slots = order.passes.T
    x, dy = up(I + bias), up(int((o1 - o0).max()))
    assert 4 * (x + dy) <= limit  # two buffers of two positions
    assert 4 * int((k1 - k0).max()) * s <= limit  # and then the sums
    assert max(x, dy) <= 1 << 16 and slots.max() <= 9600
    assert (order.num_entries, order.s) == (layer.r // s, s)


@pytest.mark.backends("cuda-host")  # the shared memory of a GPU is what it is
@pytest.mark.parametrize(
    "layer, chip, passes",
    [
        (Layer(4096, 4096, 600), "sm_86", 1),
        (Layer(4096, 11008, 1500), "sm_86", 2),
        (Layer(4096, 16384, 1700, bias=True), "sm_90", 2),
        (Layer(24000, 4096, 1800), "sm_90", 1),
    ],
    ids=str,
)
def test_rows_of_the_way(backend, request, layer, chip, passes):
    """The staged kernel takes what is chosen for a chip, on that chip, as its bits show."""
    set_max = torch.ops.dropinf_host.set_max_shared_bytes
    request.addfinalizer(lambda: set_max(163 * 1024))  # which all other tests have
    order = chosen(layer, chip)
    assert described(order) == f"staged {passes}"
    T, (o_idx, i_idx) = 11, coordinates(layer)
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(1, T, n, generator=generator).bfloat16() for n in (layer.I, layer.O))

    def rows(order, num_bytes):
        set_max(num_bytes)
        given = {"bias": layer.bias, "order": order, "backend": backend.name}
        return ops.sampled_outer(x, dy, o_idx, i_idx, **given)

    block = outer_ways.BLOCK_BYTES[chip]
    out, direct = rows(order, block), rows(None, block)
    ones = torch.cat([x, torch.ones(1, T, 1, dtype=x.dtype)], 2)
    terms = ones.double()[:, :, i_idx.long()] * dy.double()[:, :, o_idx.long()]
    assert_within(out, terms.sum(1), (T + 1) * EPS32 * terms.abs().sum(1))
    assert not torch.equal(out, direct)
    largest = max(sum(-(-2 * n // 16) * 16 for n in (layer.I + layer.bias, o1 - o0))
                  for _, _, o0, o1, *_ in order.passes.tolist())  # fmt: skip
    assert torch.equal(rows(order, 4 * largest), out)
    assert torch.equal(rows(order, 4 * largest - 1), direct)
