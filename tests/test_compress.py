"""Dropout and Full: coordinates without replacement, the same everywhere."""

import time
import tracemalloc

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from dropinf import Dropout, Full
from dropinf.compress import draw


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


def test_r_rate_total():
    sizes = [10, 1000, 30, 100000]
    assert [len(c) for c in Dropout(r=50).coordinates(sizes)] == [10, 50, 30, 50]
    assert [len(c) for c in Dropout(rate=0.01).coordinates(sizes)] == [1, 10, 1, 1000]
    assert [len(c) for c in Dropout(rate=1.0).coordinates(sizes)] == sizes
    assert [len(c) for c in Full().coordinates(sizes)] == sizes
    shared = [len(c) for c in Dropout(total=2000).coordinates(sizes)]
    assert sum(shared) == 2000 and shared[0] == 1 and abs(shared[3] - 2000 * 100000 / 101040) < 5
    assert [len(c) for c in Dropout(total=4).coordinates(sizes)] == [1, 1, 1, 1]
    assert [len(c) for c in Dropout(total=10**9).coordinates(sizes)] == sizes


@given(sizes=st.lists(st.integers(1, 500), min_size=1, max_size=20), extra=st.integers(0, 3000))
def test_total_is_met(sizes, extra):
    shared = [len(c) for c in Dropout(total=len(sizes) + extra).coordinates(sizes)]
    assert sum(shared) == min(len(sizes) + extra, sum(sizes))
    assert all(1 <= r <= P for r, P in zip(shared, sizes, strict=True))


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
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Dropout(**arguments)


def test_total_below_the_layers():
    with pytest.raises(ValueError, match="total=2 leaves some of the 3 layers without"):
        Dropout(total=2).coordinates([5, 5, 5])
