"""Draws by energy: every coordinate has the probability that its weight says, whatever the rest."""

import time
import tracemalloc

import numpy as np
import pytest

from dropinf.compression import energy_draw
from dropinf.compression.energy import ParamEnergy, sides
from dropinf.compression.energy_draw import draw_by_energy


def param(shape, rows, columns):
    return ParamEnergy.of(shape, np.asarray(rows, float), np.asarray(columns, float))


def heavy(shape, seed=0, sigma=2.0):
    """Rows and columns over some orders of magnitude, with zeros among them."""
    rng = np.random.default_rng(seed)
    rows, columns = (np.exp(sigma * rng.normal(size=n)) for n in sides(shape))
    if len(rows) > 3:
        rows[:2] = 0
    return param(shape, rows, columns)


def probabilities(energies, r):
    """By floats, with the same levels; nothing else is the code's."""
    roots = [np.sqrt(np.outer(*e.values())).ravel() for e in energies]
    roots = np.concatenate(roots)
    P = len(roots)
    measure = 0.9 * roots / roots.sum() + 0.1 / P if roots.any() else np.ones(P) / P
    certain = np.zeros(P, dtype=bool)
    while True:
        pi = np.where(certain, 1, measure * (r - certain.sum()) / measure[~certain].sum())
        if not (pi > 1).any():
            return pi
        certain |= pi >= 1


LAYERS = {
    "weight and bias": [heavy((7, 5)), heavy((7,), 1)],
    "one hot column": [param((6, 6), np.ones(6), [1e6, 1, 1, 0, 1, 1])],
    "no energy": [param((4, 3), np.zeros(4), np.ones(3)), param((4,), np.zeros(4), [1.0])],
    "a part without": [heavy((5, 4), 2), param((9,), np.zeros(9), [1.0])],
    "far apart": [param((5, 3), np.full(5, 1e-30), np.ones(3)), param((3,), np.ones(3), [1e30])],
}


@pytest.mark.parametrize("r", [1, 5, 12])
@pytest.mark.parametrize("layer", LAYERS)
def test_all_starts_together_are_exact(layer, r, monkeypatch):
    """Over all starts, coordinate j is in a part pi_j of the draws, and no draw has one twice."""
    energies = LAYERS[layer]
    monkeypatch.setattr(energy_draw, "_BITS", 2)  # for few starts
    counts = [len(e.rows) for e in energies]
    rng = np.random.default_rng(r)
    order, turns = rng.permutation(sum(counts)), rng.integers(0, 2**32, sum(counts))
    totals, start = set(), 0

    def chance(num_rows, total, seed, layer):
        totals.add(total)
        return start, order, turns

    monkeypatch.setattr(energy_draw, "_chance", chance)
    P = sum(len(e.rows) * len(e.columns) for e in energies)
    hits, told = np.zeros(P), np.full(P, np.nan)
    while not totals or start < max(totals):
        drawn, pi = draw_by_energy(energies, r, 0, 0)
        assert len(np.unique(drawn)) == r and drawn[0] >= 0 and drawn[-1] < P
        assert (np.diff(drawn) > 0).all()
        hits[drawn] += 1
        told[drawn] = pi
        start += 1
    assert len(totals) == 1
    assert hits.min() > 0
    np.testing.assert_allclose(hits / start, told, rtol=1e-12)


@pytest.mark.parametrize("r", [1, 5, 12])
@pytest.mark.parametrize("layer", LAYERS)
def test_probabilities_are_those_of_the_energies(layer, r):
    """In proportion to sqrt(E g^2), a tenth of it uniform, at most 1: to the rounding of 2^-10."""
    energies = LAYERS[layer]
    expected = probabilities(energies, r)
    for seed in range(20):
        drawn, pi = draw_by_energy(energies, r, seed, 0)
        np.testing.assert_allclose(pi, expected[drawn], rtol=0.02)


def test_many_draws_have_their_probabilities():
    """2,460 coordinates in 3,000 draws: within 5 standard deviations."""
    energies = [heavy((60, 40)), heavy((60,), 1)]
    expected, n = probabilities(energies, 200), 3000
    assert (expected == 1).sum() > 2
    hits = np.zeros(2460)
    for seed in range(n):
        hits[draw_by_energy(energies, 200, seed, 7)[0]] += 1
    deviation = np.sqrt(expected * (1 - expected) / n)
    assert (np.abs(hits / n - expected) <= 5 * deviation + 0.01 * expected).all()


def test_rows_and_columns_are_not_in_step():
    """Of equal energies, one coordinate a row or less: from many columns, and rows of no period."""
    flat = [param((64, 64), np.ones(64), np.ones(64))]
    drawn, _ = draw_by_energy(flat, 64, 0, 0)
    assert len(set(drawn // 64)) == 64
    assert len(set(drawn % 64)) > 30  # 64 (1 - 1/e) = 40 at random, 1 in step
    drawn, _ = draw_by_energy(flat, 16, 0, 0)
    assert len(set(drawn // 64 % 4)) > 1


def test_draws_are_fixed_for_ever():
    """A change here breaks every row that is stored."""
    energies = [
        param((3, 4), [1, 100, 0], [3, 1, 4, 1]),
        param((3,), [1e-3, 1e3, 5], [1]),
    ]
    drawn, pi = draw_by_energy(energies, 6, seed=5, layer=2)
    assert drawn.tolist() == [3, 4, 5, 6, 11, 13]
    assert pi.tolist() == pytest.approx(
        [0.14095835501496032, 1.0, 0.874656989885521, 1.0, 0.05914409067256407, 1.0], rel=1e-15
    )
    big = [param((131072, 9216), np.arange(131072) ** 2.0, np.arange(1, 9217) ** -2.0)]
    drawn, pi = draw_by_energy(big, 3, seed=1, layer=9)
    assert drawn.tolist() == [665330781, 945967110, 1107322690]
    assert pi.tolist() == pytest.approx(
        [2.470236595469465e-08, 4.65540501074929e-07, 2.319029401093541e-09], rel=1e-15
    )


def test_layers_and_seeds_differ():
    energies = [heavy((1000, 1000))]
    sets = [set(draw_by_energy(energies, 500, s, l)[0]) for s in (0, 1) for l in (0, 1)]
    for i, one in enumerate(sets):
        for other in sets[:i]:
            assert len(one & other) < 250


def test_everything_and_more_than_has_energy():
    energies = [param((4, 5), [1, 0, 0, 0], [1, 0, 0, 0, 0]), param((4,), np.zeros(4), [1])]
    drawn, pi = draw_by_energy(energies, 24, 0, 0)
    assert drawn.tolist() == list(range(24)) and (pi == 1).all()
    drawn, pi = draw_by_energy(energies, 23, 0, 0)
    assert len(set(drawn)) == 23 and 0 in drawn
    np.testing.assert_allclose(pi[1:], 22 / 23)


def test_a_billion_coordinates_take_rows_and_columns_alone():
    """P = 1.2e9 in the time and memory of its 140,000 rows and columns."""
    rng = np.random.default_rng(0)
    energies = [param((131072, 9216), rng.random(131072) ** 4, rng.random(9216) ** 4)]
    best = min(_seconds(energies) for _ in range(5))
    assert best < 1  # 0.06 on a core of 2026
    tracemalloc.start()
    draw_by_energy(energies, 1024, 0, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * (131072 + 9216)


def _seconds(energies):
    start = time.perf_counter()
    draw_by_energy(energies, 1024, 0, 0)
    return time.perf_counter() - start


def test_the_largest_layers_do_not_overflow():
    """2^41 coordinates, of which one has all the energy."""
    rows, columns = np.zeros(1 << 21), np.zeros(1 << 20)
    rows[5], columns[7] = 1, 1
    drawn, pi = draw_by_energy([param((1 << 21, 1 << 20), rows, columns)], 1 << 16, 0, 0)
    assert len(np.unique(drawn)) == 1 << 16 and (drawn >= 0).all() and (drawn < 1 << 41).all()
    assert ((5 << 20) + 7 in drawn) and pi[drawn == (5 << 20) + 7] == 1
    np.testing.assert_allclose(pi[drawn != (5 << 20) + 7], 2.0**-25, rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((), (1, 1)),
        ((5,), (5, 1)),
        ((7, 3), (7, 3)),
        ((64, 32, 3, 3), (64, 288)),
        ((8, 100, 50), (800, 50)),  # packed experts
        ((48, 1, 4), (48, 4)),
    ],
)
def test_sides(shape, matrix):
    assert sides(shape) == matrix


def test_levels():
    """E g^2 to 2^(1/16) and what is 2^32 below the largest is none."""
    rng = np.random.default_rng(0)
    rows, columns = np.exp(rng.normal(size=50) * 3), np.exp(rng.normal(size=20) - 300)
    rows[3] = 0
    r, c = param((50, 20), rows, columns).values()
    some = rows > rows.max() / 2**31
    ratio = np.outer(r, c)[some] / np.outer(rows, columns)[some]
    assert ratio.min() >= 2 ** (-1 / 8) and ratio.max() <= 2 ** (1 / 8)
    assert r[3] == 0
