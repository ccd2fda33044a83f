"""Projections: their matrices, seen by projecting the unit vectors, and what they promise."""

import math

import numpy as np
import pytest
import torch

from dropinf.compression import Kron, projections
from dropinf.compression.projections import (
    FJLTProjection,
    GaussianProjection,
    RademacherProjection,
    SJLTProjection,
)

EPS32, EPS64 = 2.0**-24, 2.0**-53  # largest relative error of one rounding
P = 12  # = O I; not a power of two


def kron(r, seed=3, layer=1, P=P):
    O, a = (3 if P % 3 == 0 else 1), (2 if r % 2 == 0 else 1)
    return Kron(O, P // O, a, r // a, seed, layer)


KINDS = {
    "gaussian": lambda r, seed=3, layer=1, P=P: GaussianProjection(P, r, seed, layer),
    "rademacher": lambda r, seed=3, layer=1, P=P: RademacherProjection(P, r, seed, layer),
    "sjlt1": lambda r, seed=3, layer=1, P=P: SJLTProjection(P, r, seed, layer),
    "sjlt": lambda r, seed=3, layer=1, P=P: SJLTProjection(P, r, seed, layer, s=min(r, 3)),
    "fjlt": lambda r, seed=3, layer=1, P=P: FJLTProjection(P, r, seed, layer),
    "kron": kron,
}
STREAMS = {"gaussian": 0x81, "rademacher": 0x82, "sjlt1": 0x83, "sjlt": 0x83, "fjlt": 0x84}
BLOCKED = ["gaussian", "rademacher", "sjlt1", "sjlt"]

every_kind = pytest.mark.parametrize("kind", KINDS)
blocked = pytest.mark.parametrize("kind", BLOCKED)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 8 numbers, so that small layers have several."""
    monkeypatch.setattr(projections, "_BLOCK", 8)


def matrix(projection):
    """[P, r], the images of the unit vectors."""
    return projection.project(torch.eye(projection.P, dtype=torch.float64)).numpy()


def words(kind, seed, layer, block, count):
    """The random words of a block, as Python integers."""
    key = np.array([seed, STREAMS[kind] * 2**56 + layer], dtype=np.uint64)
    stream = np.random.Philox(key=key, counter=np.array([0, 0, 0, block], dtype=np.uint64))
    return [int(word) for word in stream.random_raw(count)]


def gradients(n, k, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator, dtype=torch.float64).to(dtype)


def assert_image(out, values, M, eps=EPS64):
    """out = values M to the rounding of a sum: one for each term, and a few of M and the scale."""
    exact = values.double().numpy() @ M
    bound = (len(M) + 8) * eps * (values.double().abs().numpy() @ np.abs(M))
    assert (np.abs(out.double().numpy() - exact) <= bound).all()


@pytest.mark.parametrize("r", [1, 5, 40])
def test_gaussian_is_its_definition(r, small_blocks):
    """Generator number h + b, h the first word of the layer, gives block b."""
    M = matrix(GaussianProjection(P, r, 7, 2))
    (word,) = words("gaussian", 7, 2, 0, 1)
    width = max(1, 8 // r)
    blocks = [
        torch.randn(
            min(width, P - start),
            r,
            generator=torch.Generator().manual_seed((word // 2**32 + b) % 2**32),
        )
        for b, start in enumerate(range(0, P, width))
    ]
    np.testing.assert_allclose(M, torch.cat(blocks).double() / math.sqrt(r), rtol=4 * EPS64)


@pytest.mark.parametrize("kind", ["gaussian", "kron"])
def test_normal_numbers_are_normal(kind):
    """The largest distance to the normal distribution function, and 5-sigma moments."""
    N = 1 << 20
    if kind == "gaussian":
        z = matrix(GaussianProjection(1, N, 5, 0)).ravel() * math.sqrt(N)
    else:
        z = Kron(N, 1, 1, 1, 5, 0).A.double().numpy().ravel()
    cdf = 0.5 * (1 + torch.erf(torch.from_numpy(np.sort(z)) / math.sqrt(2)).numpy())
    # Dvoretzky, Kiefer & Wolfowitz, Massart 1990: 2 exp(-2 N d^2), here below 1e-10.
    assert np.abs(cdf - np.arange(N) / N).max() < math.sqrt(12 / N)
    assert abs(z.mean()) < 5 / math.sqrt(N)
    assert abs((z**2).mean() - 1) < 5 * math.sqrt(2 / N)
    assert abs((z[1:] * z[:-1]).mean()) < 5 / math.sqrt(N)


@pytest.mark.parametrize("r", [1, 3, 40])
def test_rademacher_is_its_definition(r, small_blocks):
    """Every bit is a sign, from the lowest, coordinate after coordinate."""
    M = matrix(RademacherProjection(P, r, 7, 2))
    width = max(1, 8 // r)
    for j in range(P):
        bits = words("rademacher", 7, 2, j // width, 20)
        for k in range(r):
            word, bit = divmod(j % width * r + k, 64)
            sign = 2 * (bits[word] >> bit & 1) - 1
            assert M[j, k] == pytest.approx(sign / math.sqrt(r), rel=4 * EPS64)


@pytest.mark.parametrize("r, s", [(1, 1), (5, 1), (7, 3), (4, 4), (40, 3)])
def test_sjlt_is_its_definition(r, s, small_blocks):
    """One entry in each of s parts, from a word's high half; the sign from its lowest bit."""
    M = matrix(SJLTProjection(P, r, 7, 2, s))
    assert ((M != 0).sum(1) == s).all()
    np.testing.assert_allclose(np.abs(M[M != 0]), 1 / math.sqrt(s), rtol=4 * EPS64)
    width = max(1, 8 // s)
    expected = np.zeros((P, r))
    for j in range(P):
        drawn = words("sjlt", 7, 2, j // width, 8 * s)
        for i in range(s):
            word = drawn[j % width * s + i]
            low, high = i * r // s, (i + 1) * r // s
            entry = low + (word // 2**32) * (high - low) // 2**32
            expected[j, entry] = (2 * (word % 2) - 1) / math.sqrt(s)
    np.testing.assert_allclose(M, expected, rtol=4 * EPS64)


def test_sjlt_entries_are_uniform():
    """Pearson's statistic of 2^13 coordinates in each part, within 5 sigma of its mean."""
    P, r, s = 1 << 13, 50, 3
    projection, unit = SJLTProjection(P, r, 11, 4, s), torch.eye(256)
    counts = sum(
        (projection.project(unit, slice(start, start + 256)) != 0).sum(0).numpy()
        for start in range(0, P, 256)
    )
    for i in range(s):
        part = counts[i * r // s : (i + 1) * r // s]
        expected, freedom = P / len(part), len(part) - 1
        statistic = ((part - expected) ** 2 / expected).sum()
        assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


def sylvester(m):
    H = np.ones((1, 1))
    while len(H) < m:
        H = np.block([[H, H], [H, -H]])
    return H


@pytest.mark.parametrize("P, r", [(1, 1), (2, 1), (12, 5), (16, 16), (17, 3), (100, 100)])
def test_fjlt_is_its_definition(P, r):
    """Signs are the bits of block 0, entries where the r smallest words of block 1 are."""
    M = matrix(FJLTProjection(P, r, 7, 2))
    m = 1
    while m < P:
        m *= 2
    bits = words("fjlt", 7, 2, 0, 2)
    signs = np.array([2 * (bits[j // 64] >> j % 64 & 1) - 1 for j in range(P)])
    drawn = words("fjlt", 7, 2, 1, m)
    entries = sorted(sorted(range(m), key=drawn.__getitem__)[:r])
    expected = signs[:, None] * sylvester(m)[:P, entries] / math.sqrt(r)
    np.testing.assert_allclose(M, expected, rtol=4 * EPS64)


@pytest.mark.parametrize("O, I, a, b", [(1, 1, 1, 1), (3, 4, 2, 2), (5, 3, 1, 4), (2, 7, 4, 9)])
def test_kron_is_two_sided(O, I, a, b):
    """AᵀGB, with A and B up to a factor from the unit matrices of one column and of one row."""
    projection = Kron(O, I, a, b, 7, 2)
    assert (projection.P, projection.r) == (O * I, a * b)
    M = matrix(projection).reshape(O, I, a, b)
    A, B, factor = M[:, 0, :, 0], M[0, :, 0, :], M[0, 0, 0, 0]  # A B[0, 0], B A[0, 0], A B[0, 0]
    G = gradients(6, O * I)
    out = projection.project(G).reshape(6, a, b).numpy()
    exact = np.einsum("oa,noi,ib->nab", A, G.reshape(6, O, I).numpy(), B) / factor
    sizes = np.einsum("oa,noi,ib->nab", np.abs(A), G.reshape(6, O, I).abs().numpy(), np.abs(B))
    assert (np.abs(out - exact) <= (O + I + 12) * EPS64 * sizes / abs(factor)).all()


def test_kron_has_two_independent_factors():
    A, B = Kron(200, 200, 50, 50, 7, 2).A, Kron(200, 200, 50, 50, 7, 2).B
    correlation = (A * B).mean() * 50
    assert 0 < abs(correlation) < 5 / math.sqrt(200 * 50)


@every_kind
@pytest.mark.parametrize("r", [1, 4, 12])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_image_and_dtype(kind, r, dtype, small_blocks):
    projection = KINDS[kind](r)
    assert (projection.P, projection.r) == (P, r)
    values = gradients(5, P, dtype)
    out = projection.project(values)
    wide = dtype == torch.float64
    assert out.shape == (5, r) and out.dtype == (torch.float64 if wide else torch.float32)
    assert_image(out, values, matrix(projection), EPS64 if wide else EPS32)
    turned = values.T.contiguous().T.requires_grad_()
    assert not projection.project(turned).requires_grad
    assert_image(projection.project(turned), values, matrix(projection), EPS64 if wide else EPS32)


@blocked
@pytest.mark.parametrize("P, r", [(5, 40), (1, 3)])
def test_more_entries_than_coordinates(kind, P, r):
    projection = KINDS[kind](r, P=P)
    values = gradients(3, P)
    assert matrix(projection).shape == (P, r)
    assert_image(projection.project(values), values, matrix(projection))


@every_kind
def test_one_number(kind):
    projection = KINDS[kind](1, P=1)
    (number,) = matrix(projection).ravel()
    assert number == 1 or number == -1 or (kind in ("gaussian", "kron") and number != 0)
    out = projection.project(torch.full((2, 1), 3.0))
    np.testing.assert_allclose(out.double(), np.full((2, 1), 3 * number), rtol=4 * EPS32)


POSITIONS = [
    slice(None),
    slice(2, 9),
    slice(4, 8),
    slice(11, None),
    slice(-3, None),
    [0],
    [11],
    [1, 2, 5, 10],
    [0, 3, 4, 5, 6, 11],
    list(range(12)),
]


@every_kind
@pytest.mark.parametrize("r", [1, 6])
@pytest.mark.parametrize("at", POSITIONS, ids=str)
def test_some_positions(kind, r, at, small_blocks):
    """What is not in `at` is zero."""
    projection = KINDS[kind](r)
    M = matrix(projection)
    at = at if isinstance(at, slice) else torch.tensor(at)
    rows = M[at if isinstance(at, slice) else at.numpy()]
    values = gradients(4, len(rows))
    assert_image(projection.project(values, at), values, rows)


@every_kind
def test_parts_add_up(kind, small_blocks):
    """The results of the parts of any partition, contiguous or not, sum to that of the whole."""
    projection = KINDS[kind](4)
    M, values, rng = matrix(projection), gradients(3, P), np.random.default_rng(0)
    for _ in range(20):
        owner = rng.integers(0, 3, P)
        parts = [torch.from_numpy(np.flatnonzero(owner == i)) for i in range(3)]
        total = sum(projection.project(values[:, part], part) for part in parts)
        assert_image(total, values, M)
        a, b = sorted(rng.integers(0, P + 1, 2).tolist())
        parts = [slice(0, a), slice(a, b), slice(b, P)]
        assert_image(sum(projection.project(values[:, part], part) for part in parts), values, M)


@blocked
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_kept_or_made_again_is_the_same(kind, dtype, monkeypatch, small_blocks):
    """To the bit; a block is made once if kept, every time if not."""
    made = []

    def run():
        projection = KINDS[kind](4)
        original = projection._made
        projection._made = lambda block, rows: made.append((block, rows)) or original(block, rows)
        outs = [projection.project(gradients(5, P, dtype)) for _ in range(2)]
        return [*outs, projection.project(gradients(5, 3, dtype), torch.tensor([0, 6, 11]))]

    kept, (blocks, rows) = run(), zip(*sorted(made), strict=True)
    assert blocks == tuple(range(len(blocks))) and len(blocks) > 1 and sum(rows) == P
    made.clear()
    monkeypatch.setattr(projections, "_KEEP", 0)
    again = run()
    assert len(made) > 2 * len(blocks)
    for a, b in zip(kept, again, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(kept[0], kept[1])


@blocked
def test_bound_of_what_is_kept(kind, monkeypatch):
    """P times the numbers of a coordinate: r, or s of a sparse map."""
    numbers = {"sjlt1": 1, "sjlt": 3}.get(kind, 4)
    for bound, keeps in ((P * numbers, True), (P * numbers - 1, False)):
        monkeypatch.setattr(projections, "_KEEP", bound)
        projection = KINDS[kind](4)
        projection.project(gradients(1, P))
        assert bool(projection._kept) == keeps


@blocked
@pytest.mark.parametrize("at", [slice(5, 6), [4], [0, 11], slice(3, 3), []], ids=str)
def test_blocks_without_positions_are_not_made(kind, at, monkeypatch):
    monkeypatch.setattr(projections, "_BLOCK", 1)  # a block for each coordinate
    projection = KINDS[kind](4)
    made, original = [], projection._made
    projection._made = lambda block, rows: made.append(block) or original(block, rows)
    wanted = list(range(P))[at] if isinstance(at, slice) else at
    where = at if isinstance(at, slice) else torch.tensor(at, dtype=torch.int64)
    out = projection.project(gradients(2, len(wanted)), where)
    assert made == wanted and out.any() == bool(wanted)


def test_a_large_matrix_is_never_held():
    """4 TiB of it; three coordinates touch two blocks."""
    at = torch.tensor([5, 6, 2**28 - 1])
    for kind in (GaussianProjection, RademacherProjection):
        projection = kind(2**28, 4096, 0, 0)
        out = projection.project(torch.ones(1, 3), at)
        assert not projection._kept and 0 < out.square().mean() < 1  # of mean 3 / 4096
    sparse = SJLTProjection(2**40, 4096, 0, 0)
    assert sparse.project(torch.ones(1, 1), torch.tensor([2**40 - 1])).abs().sum() == 1


@every_kind
def test_products_are_unbiased(kind, small_blocks):
    """The mean of M Mᵀ over seeds is the identity, to 5 of its standard errors."""
    r, seeds = 4, 1000
    total, squares = np.zeros((P, P)), np.zeros((P, P))
    for seed in range(seeds):
        M = matrix(KINDS[kind](r, seed=seed))
        total += M @ M.T
        squares += (M @ M.T) ** 2
    mean = total / seeds
    error = np.sqrt(np.maximum(0, squares / seeds - mean**2) / seeds)
    assert (np.abs(mean - np.eye(P)) <= 5 * error + 1e-12).all()


@every_kind
def test_same_every_time(kind):
    """By seed and layer alone: n, what was projected before, and the global generator are not."""
    values = gradients(3, P, torch.float32)
    first = KINDS[kind](4).project(values)
    torch.manual_seed(1)
    used = KINDS[kind](4)
    used.project(values[:1])
    used.project(values[:, 5:8], slice(5, 8))
    used.project(values.double())
    assert torch.equal(used.project(values), first)
    seeds = [(3, 1), (3, 2), (4, 1), (1, 3), (3, 2**40), (2**64 - 1, 1), (3 + 2**63, 1)]
    many = [KINDS[kind](6, seed=s, layer=l, P=48).project(torch.eye(48)) for s, l in seeds]
    assert len({tuple(M.flatten().tolist()) for M in many}) == len(seeds)


def test_streams_are_apart():
    """From one another's, and from those of a draw of coordinates and of a projector."""
    key = [np.array([3, layer], dtype=np.uint64) for layer in (1, 2**63 + 1)]
    first = {int(np.random.Philox(key=k).random_raw(1)[0]) for k in key}
    kinds = [kind for kind in KINDS if kind != "sjlt1"]
    first |= {int(KINDS[k](4)._philox(b).random_raw(1)[0]) for k in kinds for b in range(3)}
    assert len(first) == 2 + 3 * len(kinds)


@every_kind
def test_empty(kind):
    projection = KINDS[kind](4)
    assert projection.project(torch.empty(0, P)).shape == (0, 4)
    nothing = projection.project(torch.empty(2, 0), torch.empty(0, dtype=torch.int64))
    assert torch.equal(nothing, torch.zeros(2, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_on_a_gpu(small_blocks):
    """The matrix of the CPU, and the same bits every time."""
    values, at = gradients(500, P), torch.tensor([0, 3, 11])
    for make in KINDS.values():
        projection = make(4)
        M = matrix(projection)
        out = projection.project(values.cuda())
        assert out.is_cuda and torch.equal(out, projection.project(values.cuda()))
        assert_image(out.cpu(), values, M)
        some = projection.project(values[:, at].cuda(), at.cuda())
        assert_image(some.cpu(), values[:, at], M[at])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: GaussianProjection(0, 1, 0, 0), r"Gaussian: P must be in 1 \.\. 2\^63 - 1, got 0"),
        (lambda: RademacherProjection(3, 0, 0, 0), "Rademacher: r must be in 1"),
        (
            lambda: SJLTProjection(3, 2**31, 0, 0),
            r"SJLT: r must be in 1 \.\. 2\^31 - 1, got 2147483648",
        ),
        (lambda: GaussianProjection(3, 1, -1, 0), r"seed must be in 0 \.\. 2\^64 - 1, got -1"),
        (lambda: GaussianProjection(3, 1, 0, 2**56), r"layer must be in 0 \.\. 2\^56 - 1"),
        (lambda: SJLTProjection(3, 4, 0, 0, s=5), r"SJLT: s must be in 1 \.\. r=4, got 5"),
        (
            lambda: FJLTProjection(3, 4, 0, 0),
            r"FJLT: r must be at most P=3, got 4: .*take r=P, or another",
        ),
        (lambda: Kron(-2, -3, 1, 1, 0, 0), "Kron: O, I, a and b must be from 1"),
    ],
)
def test_refused_maps(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "values, at, message",
    [
        (torch.ones(12), slice(None), r"values must be \[n, k\] floating point, got \(12,\)"),
        (torch.ones(1, 12, dtype=torch.int64), slice(None), "floating point, got .*int64"),
        (torch.ones(1, 11), slice(None), "as many of the P=12 positions as values has columns, 11"),
        (torch.ones(1, 13), slice(0, 13), "as many of the P=12 positions"),
        (torch.ones(1, 6), slice(0, 12, 2), "a slice must have step 1"),
        (torch.ones(1, 12), slice(0, 12, 2), "a slice must have step 1"),
        (torch.ones(1, 2), torch.tensor([1]), r"at must be \[k=2\] int64 on cpu, got \(1,\)"),
        (torch.ones(1, 1), torch.tensor([1], dtype=torch.int32), "got .* torch.int32 on cpu"),
        (torch.ones(1, 1), torch.tensor([1], device="meta"), "int64 on cpu, got .* on meta"),
        (torch.ones(1, 2), torch.tensor([2, 1]), r"rising positions in 0 \.\. 11; sort them"),
        (torch.ones(1, 2), torch.tensor([1, 1]), "rising positions"),
        (torch.ones(1, 1), torch.tensor([12]), "rising positions"),
        (torch.ones(1, 1), torch.tensor([-1]), "rising positions"),
    ],
)
def test_refused_values(values, at, message):
    with pytest.raises(ValueError, match=message):
        GaussianProjection(12, 3, 0, 0).project(values, at)
