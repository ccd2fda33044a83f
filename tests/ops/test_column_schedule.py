"""The order of the columns kernel: nothing is lost, lanes that read together read other banks."""

import numpy as np
import pytest
import torch
from outer_cases import Layer, coordinates

import dropinf
from dropinf.ops import column_schedule
from dropinf.ops.column_schedule import column_order

pytestmark = pytest.mark.skipif(
    dropinf.backends()["cpu"] != "available", reason=dropinf.backends()["cpu"]
)

LONG = 4  # pieces of 8 steps, which come first; then as many of 4


LAYERS = [  # each here for a reason
    Layer(7, 5, 0),  # no coordinate
    Layer(7, 5, 1),
    Layer(7, 5, 40, bias=True),  # Full, with the bias
    Layer(64, 48, 900),
    Layer(767, 3071, 9000, bias=True),  # odd sizes
    Layer(4096, 4096, 65536),
    Layer(4096, 4096, 16384),  # four of each column
    Layer(2048, 11008, 65536),  # windows of outputs
    Layer(8192, 512, 30000, bias=True),  # more columns than a pass has
    Layer(1, 4096, 4096, bias=True),  # one column
]


def piece_of(step):
    return step // 8 if step < 8 * LONG else LONG + (step - 8 * LONG) // 4


def places(order):
    """For each pass, as the kernel computes them: where every lane reads dy and x in every step,
    [48, 512] numbers of cells."""
    for packed, columns in zip(order.packed.numpy(), order.columns.numpy(), strict=True):
        packed = packed.view(np.uint32)
        dy = np.stack([packed & 0xFFFF, packed >> 16], 1).reshape(48, 512)
        x = columns[[piece_of(step) for step in range(48)]]
        assert (dy % 16 == 0).all() and (x % 16 == 0).all()
        yield dy.astype(np.int64) // 16, x.astype(np.int64) // 16


def cell_of_output(n):
    return n % 4 * 1024 + n // 4


def cell_of_input(n):
    return 4096 + n % 4 * 512 + n // 4


def waits(cells, groups):
    """How many turns the reads of the eight lanes of each group take: the most different cells of
    one bank."""
    turns = [
        max(len({c for c in group if c % 8 == bank}) for bank in range(8))
        for group in cells.reshape(-1, 8).tolist()
    ]
    return np.array(turns).reshape(groups, -1)


def check(order, layer, o_idx, i_idx):
    """All that the kernel relies on."""
    assert order.passes.dtype == torch.int64 and order.passes.device.type == "cpu"
    assert order.num_entries == layer.r and len(order.passes) == len(order.packed)
    o_idx, i_idx = o_idx.numpy(), i_idx.numpy()
    summed = np.zeros(layer.r, int)
    for (i0, i1, o0, o1, pieces), (dy, x), target in zip(
        order.passes.tolist(), places(order), order.target.numpy(), strict=True
    ):
        assert 0 <= i0 < i1 <= layer.I + layer.bias and i0 % 4 in (0, layer.I % 4)
        assert 0 <= o0 < o1 <= layer.O and o0 % 4 == 0 and o1 - o0 <= 4096
        assert min(i1, layer.I) - i0 <= 2048
        real = target >= 0
        k = target[real]
        np.add.at(summed, k, 1)
        assert (dy[real] == cell_of_output(o_idx[k] - o0)).all()
        wanted = np.where(i_idx[k] == layer.I, 4096 + 2048, cell_of_input(i_idx[k] - i0))
        assert (x[real] == wanted).all()
        assert (dy < 4096).all() and ((x >= 4096) & (x <= 6144)).all()
        used = {piece_of(step) for step in np.flatnonzero(real.any(1))}
        assert used == {piece for piece in range(8) if pieces >> piece & 1}
    assert (summed == 1).all()  # every coordinate once


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_order(layer):
    o_idx, i_idx = coordinates(layer)
    order = column_order(o_idx, i_idx, layer.I, layer.O, bias=layer.bias)
    check(order, layer, o_idx, i_idx)
    again = column_order(o_idx, i_idx, layer.I, layer.O, bias=layer.bias)
    assert all(torch.equal(a, b) for a, b in zip(order.tensors, again.tensors, strict=True))


@pytest.mark.parametrize("s", [1, 3])
def test_sums(s):
    """Coordinates [r, s] have the order of r * s coordinates, in whatever places they stand."""
    layer = Layer(64, 48, 900, bias=True)
    mixed = torch.randperm(layer.r, generator=torch.Generator().manual_seed(0))
    flat = [index[mixed] for index in coordinates(layer)]
    order = column_order(*flat, layer.I, layer.O, bias=True)
    # As columns of a [s, r], so that they are not contiguous.
    sums = [index.reshape(-1, s).T.contiguous().T for index in flat]
    of_sums = column_order(*sums, layer.I, layer.O, bias=True)
    check(of_sums._replace(num_entries=layer.r), layer, *flat)
    assert all(torch.equal(a, b) for a, b in zip(order.tensors, of_sums.tensors, strict=True))
    assert (order.num_entries, order.s) == (900, 1)
    assert (of_sums.num_entries, of_sums.s) == (900 // s, s)
    none = torch.empty(5, 0, dtype=torch.int32)
    assert column_order(none, none, 3, 4)[0].shape == (0, 5)


def crowded(layer, seed=0):
    """As draws by energy: many coordinates in few rows and columns."""
    rng = np.random.default_rng(seed)
    rows, columns = (np.exp(2 * rng.normal(size=n)) for n in (layer.O, layer.I))
    o = rng.choice(layer.O, 2 * layer.r, p=rows / rows.sum())
    i = rng.choice(layer.I, 2 * layer.r, p=columns / columns.sum())
    at = rng.permutation(np.unique(o * layer.I + i))[: layer.r]
    at = torch.from_numpy(np.sort(at))
    return (at // layer.I).int(), (at % layer.I).int()


@pytest.mark.parametrize(
    "draw, r, most_passes, most_turns",
    [(coordinates, 65536, 3, 1.08), (coordinates, 16384, 2, 1.25), (crowded, 50000, 3, 1.25)],
)
def test_conflicts(draw, r, most_passes, most_turns):
    """How much longer reads of dy and of x take than without conflicts; with -s, the figures."""
    layer = Layer(4096, 4096, r)
    o_idx, i_idx = draw(layer)
    layer = layer._replace(r=len(o_idx))
    order = column_order(o_idx, i_idx, layer.I, layer.O)
    check(order, layer, o_idx, i_idx)
    assert len(order.passes) <= most_passes
    of_dy, of_x, filled = [], [], []
    for (*_, pieces), (dy, x), target in zip(
        order.passes.tolist(), places(order), order.target.numpy(), strict=True
    ):
        used = [step for step in range(48) if pieces >> piece_of(step) & 1]
        of_dy.append(waits(dy[used], len(used)).mean())
        of_x.append(waits(x[used], len(used)).mean())
        filled.append((target[used] >= 0).mean())
    print(
        f"\n{draw.__name__}, r={r}: {len(filled)} passes, {np.mean(filled):.1%} of the steps in "
        f"use; turns of a read of dy {np.mean(of_dy):.3f}, of x {np.mean(of_x):.3f}",
        end="",
    )
    assert max(np.mean(of_dy), np.mean(of_x)) <= most_turns


def test_what_does_not_fit():
    layer = Layer(2, 4096 * 70, 300)
    o_idx, i_idx = coordinates(layer)
    assert column_order(o_idx, i_idx, layer.I, layer.O) is None  # more windows than passes


def test_errors(monkeypatch):
    one = torch.ones(1, dtype=torch.int32)
    for arguments, message in (
        ((one, one, 1, 2), r"i_idx must be in \[0, 1\), got 1 to 1"),
        ((one, -one, 1, 2), r"i_idx must be in \[0, 1\), got -1"),
        ((one, one, 2, 1), r"o_idx must be in \[0, 1\), got 1 to 1"),
        ((one, one[:0], 2, 2), "must be int32"),
        ((one.long(), one, 2, 2), "must be int32"),
        ((one, one.long(), 2, 2), "must be int32"),
        ((one[:, None], one, 2, 2), "must be int32"),
        ((one[:, None, None], one[:, None, None], 2, 2), "must be int32"),
    ):
        with pytest.raises(ValueError, match=f"^column_order: .*{message}"):
            column_order(*arguments)
    monkeypatch.setattr(column_schedule, "_C", None)
    with pytest.raises(RuntimeError, match="column_order: needs the C"):
        column_order(one, one, 2, 2)
