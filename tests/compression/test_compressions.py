"""Compressions: which coordinates they keep, how they make entries of them, the same everywhere."""

import itertools
import time
import tracemalloc

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from dropinf import Dropout, FactoredDropout, Full, Sketch
from dropinf.compression.grid import grid_sides
from dropinf.compression.parts import draw


@settings(deadline=None)
@given(P=st.integers(1, 3000), share=st.floats(0, 1), seed=st.integers(0, 2**64 - 1))
def test_draw(P, share, seed):
    r = round(share * P)
    drawn = draw(P, r, seed, layer=3)
    assert drawn.dtype == np.int64 and len(drawn) == r
    assert (np.diff(drawn) > 0).all()  # sorted and distinct
    assert r == 0 or (drawn[0] >= 0 and drawn[-1] < P)
    assert np.array_equal(drawn, draw(P, r, seed, layer=3))


def test_draw_is_fixed_for_ever():
    """Values from Philox as published; a change here breaks every stored row."""
    assert draw(1000, 6, seed=0, layer=0).tolist() == [11, 114, 247, 284, 514, 577]
    assert draw(10, 7, seed=5, layer=2).tolist() == [0, 1, 2, 4, 7, 8, 9]
    billion = draw(1_200_000_000, 3, seed=1, layer=9)
    assert billion.tolist() == [222810304, 469616444, 635456603]


def test_draw_is_uniform():
    """Each of 50 coordinates in 20 % of 4,000 draws, within 5 standard deviations; so each pair."""
    draws = np.zeros((4000, 50))
    for seed in range(4000):
        draws[seed, draw(50, 10, seed, 0)] = 1
    deviation = np.sqrt(0.2 * 0.8 / 4000)
    assert np.abs(draws.mean(0) - 0.2).max() < 5 * deviation
    pairs = (draws.T @ draws / 4000)[np.triu_indices(50, 1)]
    rate = 10 * 9 / (50 * 49)
    assert np.abs(pairs - rate).max() < 5.5 * np.sqrt(rate * (1 - rate) / 4000)


def test_layers_and_seeds_differ():
    same = [set(draw(10**6, 1000, seed, layer)) for seed in (0, 1) for layer in (0, 1)]
    for i, one in enumerate(same):
        for other in same[:i]:
            assert len(one & other) < 10


def test_a_billion_coordinates_cost_no_more():
    """O(r) time and memory: P = 1.2e9 within 3x the time of a small layer, under 1 MB."""

    def seconds(P):
        best = np.inf
        for seed in range(20):
            start = time.perf_counter()
            draw(P, 1024, seed, 0)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(1_200_000_000) < 3 * seconds(4000)
    tracemalloc.start()
    draw(1_200_000_000, 1024, 0, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


def layers(*sizes):
    return [(f"layer {l}", [(P,)]) for l, P in enumerate(sizes)]


def kept(compression, *sizes):
    """Coordinates of each layer, of one parameter each."""
    return [len(part.index) for (part,) in compression.keep(layers(*sizes))]


def test_r_rate_total():
    sizes = [10, 1000, 30, 100000]
    assert kept(Dropout(r=50), *sizes) == [10, 50, 30, 50]
    assert kept(Dropout(rate=0.01), *sizes) == [1, 10, 1, 1000]
    assert kept(Dropout(rate=1.0), *sizes) == sizes
    assert kept(Full(), *sizes) == sizes
    shared = kept(Dropout(total=2000), *sizes)
    assert sum(shared) == 2000 and shared[0] == 1 and abs(shared[3] - 2000 * 100000 / 101040) < 5
    assert kept(Dropout(total=4), *sizes) == [1, 1, 1, 1]
    assert kept(Dropout(total=10**9), *sizes) == sizes


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=20),
    extra=st.integers(0, 3000),
    allocation=st.sampled_from(["size", "sqrt", "equal"]),
)
def test_total_is_met(sizes, extra, allocation):
    shared = kept(Dropout(total=len(sizes) + extra, allocation=allocation), *sizes)
    assert sum(shared) == min(len(sizes) + extra, sum(sizes))
    assert all(1 <= r <= P for r, P in zip(shared, sizes, strict=True))
    for r, P in zip(shared, sizes, strict=True):  # never less for the larger
        assert all(r <= other + 1 for other, Q in zip(shared, sizes, strict=True) if P <= Q)


def test_allocations():
    """One each, then in proportion to the weight; what a layer cannot take goes to the others."""
    sizes = [10_000, 40_000, 160_000]
    assert kept(Dropout(total=603, allocation="equal"), *sizes) == [201, 201, 201]
    assert kept(Dropout(total=703, allocation="sqrt"), *sizes) == [101, 201, 401]
    by_size = kept(Dropout(total=2103, allocation="size"), *sizes)
    assert by_size == [101, 401, 1601]
    assert kept(Dropout(total=301, allocation="equal"), 10, 1000, 1000) == [10, 146, 145]
    assert kept(Dropout(total=330, allocation="sqrt"), 10, 100, 10000) == [10, 30, 290]


def sketched(compression, *shapes):
    """Of one layer: [r, P] float64, its matrix from parts and entry maps."""
    (parts,) = compression.keep([("layer", list(shapes))])
    sizes = [int(np.prod(shape)) for shape in shapes]
    r = max(part.first + part.entry_map.r for part in parts)
    M, first = np.zeros((r, sum(sizes))), 0
    for part, size in zip(parts, sizes, strict=True):
        for c, position in enumerate(part.index):
            k = part.first + int(part.entry_map.entry[c])
            assert M[k, first + position] == 0
            M[k, first + position] = part.scale * int(part.entry_map.sign[c])
        first += size
    return M


@pytest.mark.parametrize("r, s", [(1, 1), (1, 7), (5, 3), (12, 4), (11, 5)])
@pytest.mark.parametrize("shapes", [[(60,)], [(7, 8), (4,)], [(1,), (9, 6), (5,)]], ids=str)
def test_sketch(shapes, r, s):
    """r sums of s distinct coordinates of the layer, each coordinate in at most one."""
    M = sketched(Sketch(r=r, s=s), *shapes)
    assert M.shape == (r, 60)
    ((*parts,),) = Sketch(r=r, s=s).keep([("layer", shapes)])
    parts = [part for part in parts if len(part.index)]
    for one, other in itertools.pairwise(parts):
        shared = one.first + one.entry_map.r > other.first
        assert one.entry_map.shares_last == other.entry_map.shares_first == shared
    assert not parts[0].entry_map.shares_first and not parts[-1].entry_map.shares_last
    used = M != 0
    assert (used.sum(1) == s).all() and (used.sum(0) <= 1).all()
    assert np.allclose(np.abs(M[used]), np.sqrt(60 / (r * s)))


@pytest.mark.parametrize("r, s", [(60, 1), (25, 3), (7, 9), (1, 1000)])
def test_sketch_of_all_coordinates(r, s):
    """Once r s reaches P every coordinate is in one sum, and the sums have one size or the next."""
    M = sketched(Sketch(r=r, s=s), (7, 8), (4,))
    used = M != 0
    assert (used.sum(0) == 1).all()
    assert set(used.sum(1)) <= {60 // r, -(-60 // r)}
    assert np.allclose(np.abs(M[used]), 1)


def test_sketch_is_unbiased():
    """The mean of MᵀM over seeds is the identity, to 5 standard errors of each element."""
    found = []
    for seed in range(2000):
        M = sketched(Sketch(r=4, s=3, seed=seed), (4, 5), (4,))
        found.append(M.T @ M)
    mean, spread = np.mean(found, 0), np.std(found, 0) / np.sqrt(len(found))
    assert (np.abs(mean - np.eye(24)) < 5 * spread + 1e-12).all()


def test_sketch_is_fixed_for_ever():
    """Its groups and signs, beside the coordinates; a change here breaks every stored row."""
    ((part,),) = Sketch(r=3, s=2, seed=1).keep([("layer", [(100,)])])
    assert part.index.tolist() == [3, 6, 19, 31, 38, 95]
    assert part.entry_map.entry.tolist() == [1, 0, 0, 2, 1, 2]
    assert part.entry_map.sign.tolist() == [-1, -1, -1, 1, 1, -1]


def test_grid_is_fixed_for_ever():
    """Rows and columns of both weights, four draws; a change here breaks every stored row."""
    (parts,) = FactoredDropout(r=8, seed=1).keep([("layer", [(30, 30), (30, 30)])])
    assert [(p.index // 30).tolist() for p in parts] == [[9, 9, 27, 27], [9, 9, 11, 11]]
    assert [(p.index % 30).tolist() for p in parts] == [[2, 22, 2, 22], [19, 20, 19, 20]]


@pytest.mark.parametrize("kind", [FactoredDropout, Sketch])
def test_layers_of_one_shape_differ(kind):
    one, other = kind(r=30).keep([("a", [(40, 50)]), ("b", [(40, 50)])])
    assert len(set(one[0].index) & set(other[0].index)) < 15


def test_sketch_of_one_is_dropout_with_signs():
    M = sketched(Sketch(r=9, s=1, seed=4), (6, 10))
    ((part,),) = Dropout(r=9, seed=4).keep([("layer", [(6, 10)])])
    assert sorted(np.nonzero(M)[1]) == part.index.tolist()


def test_grid():
    """Sampled rows x sampled columns, as many as fit, and each coordinate as likely as another."""
    counts = np.zeros((12, 30))
    for seed in range(3000):
        ((part,),) = FactoredDropout(r=15, seed=seed).keep([("layer", [(12, 5, 6)])])
        rows, columns = np.divmod(part.index, 30)
        assert len(part.index) == 15 and len(set(rows)) * len(set(columns)) == 15
        assert part.scale == pytest.approx(np.sqrt(360 / 15))
        counts[rows, columns] += 1
    rate = 15 / 360
    assert np.abs(counts / 3000 - rate).max() < 5 * np.sqrt(rate / 3000)


@pytest.mark.parametrize(
    "O, I, r, sides",
    [
        (100, 100, 64, (8, 8)),
        (100, 100, 1000, (25, 40)),
        (100, 100, 1021, (30, 34)),
        (10, 768, 1000, (10, 100)),
        (768, 10, 1000, (100, 10)),
        (3, 3, 100, (3, 3)),
        (1, 50, 20, (1, 20)),
        (50, 50, 1, (1, 1)),
        (50, 50, 7, (3, 2)),
    ],
)
def test_grid_sides(O, I, r, sides):
    assert grid_sides(O, I, r) == sides


def test_grid_of_a_layer():
    """Weight and bias share in proportion to size; with fewer entries, plain coordinates."""
    ((weight, bias),) = FactoredDropout(r=101).keep([("layer", [(20, 99), (20,)])])
    assert (len(weight.index), len(bias.index)) == (99, 2) and bias.first == 99
    ((weight, bias),) = FactoredDropout(r=1).keep([("layer", [(20, 99), (20,)])])
    assert len(weight.index) + len(bias.index) == 1
    assert weight.scale == pytest.approx(np.sqrt(2000))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "exactly one of r, rate, total; got none"),
        ({"r": 3, "rate": 0.1}, r"got \['r', 'rate'\]"),
        ({"r": 0}, "r must be a whole number from 1, got 0"),
        ({"r": 2.5}, "r must be a whole number from 1, got 2.5"),
        ({"r": True}, "r must be a whole number"),
        ({"total": -1}, "total must be a whole number from 1, got -1"),
        ({"rate": 0.0}, r"rate must be in \(0, 1\], got 0.0"),
        ({"rate": 1.5}, r"rate must be in \(0, 1\], got 1.5"),
        ({"rate": float("nan")}, r"rate must be in \(0, 1\], got nan"),
        ({"r": 3, "seed": -1}, "seed must be in"),
        ({"total": 3, "allocation": "fair"}, "allocation must be one of .*'equal'.*, got 'fair'"),
        ({"r": 3, "allocation": "sqrt"}, "allocation='sqrt' shares out total="),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Dropout(**arguments)


@pytest.mark.parametrize("s", [0, -1, 2.0, True])
def test_bad_s(s):
    with pytest.raises(ValueError, match="Sketch: s must be a whole number from 1, got"):
        Sketch(r=3, s=s)


def test_total_below_the_layers():
    with pytest.raises(ValueError, match="2 entries leave 'layer 2' without one; give at least 3"):
        Dropout(total=2).keep(layers(5, 5, 5))
