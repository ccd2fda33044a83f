"""score_topk: the largest scores of all rows, whatever parts the rows come in."""

import itertools

import numpy as np
import pytest
import torch
from conftest import EMULATED, EPS32, numbers_of_threads

import dropinf
from dropinf import ops
from dropinf.ops import dispatch, topk

OPS = ("score_topk",)

SHAPES = {  # m, n, k
    "one": (1, 1, 1),
    "the best": (3, 50, 1),
    "as many as there are": (2, 7, 7),
    "more than there are": (2, 9, 40),
    "a block of 128": (3, 300, 128),
    "and one more": (2, 300, 129),
    "longer than a tile": (2, 2500, 5),
}
OF_ONE_QUERY = ("more than there are", "and one more", "longer than a tile")


def whole(m, n, R=6, seed=0):
    """Queries and rows of small whole numbers: exact products, full of ties."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(-2, 3, (m, R), generator=generator).float()
    return queries, torch.randint(-2, 3, (n, R), generator=generator).float()


def nothing(m, k, dtype=torch.float32):
    return torch.full((m, k), -torch.inf, dtype=dtype), torch.full((m, k), -1)


def run(backend, queries, rows, k, parts, **options):
    """Merged in parts, [(start, stop), ...]."""
    values, indices = nothing(len(queries), k, queries.dtype)
    for start, stop in parts:
        part = {name: option[start:stop] for name, option in options.items()}
        ops.score_topk(
            queries,
            rows[start:stop],
            values,
            indices,
            first=start,
            backend=backend.name,
            **part,
        )
    return values, indices


def truth(scores, k, valid=None):
    """NaN first, then falling, the lower row first; as numpy arrays."""
    values = np.full((len(scores), k), -np.inf)
    indices = np.full((len(scores), k), -1)
    for q, row in enumerate(scores):
        there = [i for i, s in enumerate(row) if s != -np.inf and (valid is None or valid[i])]
        best = sorted(there, key=lambda i: (not np.isnan(row[i]), -np.nan_to_num(row[i]), i))[:k]
        values[q, : len(best)] = row[best]
        indices[q, : len(best)] = best
    return values, indices


def assert_equal(got, wanted):
    np.testing.assert_array_equal(got[0].double().numpy(), wanted[0])
    np.testing.assert_array_equal(got[1].numpy(), wanted[1])


def shapes(backend):
    return zip(("the best", *OF_ONE_QUERY) if backend in EMULATED else SHAPES)


@pytest.mark.cases("shape", shapes)
def test_score_topk(backend, shape):
    m, n, k = SHAPES[shape]
    if backend.emulated and shape in OF_ONE_QUERY:
        m = 1
    queries, rows = whole(m, n)
    rows[-1] = 5 * queries[0]  # the best comes last
    wanted = truth(queries.double().numpy() @ rows.double().numpy().T, k)
    third = n // 3
    for parts in (
        [(0, n)],
        [(0, third), (third, third), (third, n)],
        [(third, n), (0, third)],  # in any order
    ):
        assert_equal(run(backend, queries, rows, k, parts), wanted)


def test_factors_and_valid(backend):
    queries, rows = whole(1 if backend.emulated else 3, 200)
    factors = torch.randint(-2, 3, (200,)).float()
    valid = torch.rand(200) < 0.4
    wanted = truth(queries.double().numpy() @ rows.double().numpy().T * factors.numpy(), 90, valid)
    for parts in ([(0, 200)], [(0, 33), (33, 200)]):
        got = run(backend, queries, rows, 90, parts, factors=factors, valid=valid)
        assert_equal(got, wanted)


def test_not_finite(backend):
    """NaN counts as largest, ±inf as numbers; -inf never enters; -0 ties with 0."""
    special = [0.0, torch.nan, torch.inf, 1.0, -torch.inf, -0.0, torch.nan, 3e38, -3e38, 1e-44]
    scores = torch.tensor(special * 3)
    queries, rows = torch.ones(1, 1), torch.ones(30, 1)  # a product would make 0 of -0
    for k in (12,) if backend.emulated else (4, 12, 30):
        wanted = truth(scores[None].double().numpy(), k)
        for parts in ([(0, 30)], [(0, 7), (7, 9), (9, 30)], [(9, 30), (0, 9)]):
            assert_equal(run(backend, queries, rows, k, parts, factors=scores), wanted)


def test_rows_far_into_a_store(backend):
    """Row numbers of more than 32 bits."""
    first = 2**33 + 5
    values, indices = nothing(1, 3)
    for start, score in ((first, 1.0), (first - 1, 1.0), (7, 0.5), (first + 9, 1.0)):
        ops.score_topk(
            torch.ones(1, 1),
            torch.full((1, 1), score),
            values,
            indices,
            first=start,
            backend=backend.name,
        )
    assert indices.tolist() == [[first - 1, first, first + 9]]


@pytest.mark.backends("reference")  # of what all have in common
def test_only_some_scores_at_a_time(backend, monkeypatch):
    monkeypatch.setattr(topk, "_MAX_SCORES", 30)
    queries, rows = whole(4, 50)
    wanted = truth(queries.double().numpy() @ rows.double().numpy().T, 6)
    assert_equal(run(backend, queries, rows, 6, [(0, 50)]), wanted)


def test_real_numbers(backend):
    """Within the rounding bound of a float32 sum, and no better row is left out."""
    m, n, R, k = 1 if backend.emulated else 3, 400, 50, 20
    queries, rows = torch.randn(m, R), torch.randn(n, R)
    values, indices = run(backend, queries, rows, k, [(0, 150), (150, n)])
    exact = queries.double() @ rows.double().T
    bound = (R + 1) * EPS32 * (queries.double().abs() @ rows.double().abs().T)
    assert ((values - exact.gather(1, indices)).abs() <= bound.gather(1, indices)).all()
    assert (values.diff(dim=1) <= 0).all()
    rest = exact.scatter(1, indices, -torch.inf)
    assert (rest <= values[:, -1:] + bound).all()


def test_many(backend):
    """The largest k that the kernels for GPUs take; the others take any."""
    queries, rows = whole(1, 1500)
    products = queries.double().numpy() @ rows.double().numpy().T
    for k in (1024, 1025):
        if k == 1025 and backend.name in dispatch.GPU_BACKENDS:
            message = rf"'{backend.name}' takes k up to 1024, got 1025; backend='reference' takes"
            with pytest.raises(ValueError, match=message):
                ops.score_topk(queries, rows, *nothing(1, k), backend=backend.name)
            continue
        got = run(backend, queries, rows, k, [(0, 1200), (1200, 1500)])
        assert_equal(got, truth(products, k))
    if backend.emulated:  # its tensors are on the CPU, where the default asks no GPU
        return
    values, indices = nothing(1, 1025)
    ops.score_topk(queries, rows, values, indices)
    assert_equal((values, indices), truth(products, 1025))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("k", [1, 7, 300])
@pytest.mark.parametrize("kind", ["rising", "ties", "whole", "not finite"])
def test_long_stores(backend, k, kind):
    """More scores enter than are kept at a time, in parts of any order and size."""
    generator = torch.Generator().manual_seed(0)
    n, queries = 3000, torch.ones(1, 1)
    scores = {
        "rising": torch.arange(n).float(),
        "ties": torch.zeros(n),
        "whole": torch.randint(-9, 9, (n,), generator=generator).float(),
        "not finite": torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0])[
            torch.randint(5, (n,), generator=generator)
        ],
    }[kind]
    wanted = truth(scores[None].double().numpy(), k)
    cuts = [0, 1, 255, 256, 513, 1500, n]
    forward = list(itertools.pairwise(cuts))
    for parts in ([(0, n)], forward, forward[::-1], forward[::2] + forward[1::2]):
        rows = torch.ones(n, 1)
        assert_equal(run(backend, queries, rows, k, parts, factors=scores), wanted)
    backwards = truth(scores.flip(0)[None].double().numpy(), k)
    assert_equal(
        run(backend, queries, torch.ones(n, 1), k, forward, factors=scores.flip(0)), backwards
    )


@pytest.mark.backends("cpu")
def test_whatever_the_number_of_threads(backend):
    queries, rows = whole(70, 900)
    first, *others = (run(backend, queries, rows, 5, [(0, 900)]) for _ in numbers_of_threads())
    assert_equal(first, truth(queries.double().numpy() @ rows.double().numpy().T, 5))
    for other in others:
        assert all(map(torch.equal, first, other))


def special(kind, n):
    """n scores of a kind, in float32."""
    generator = torch.Generator().manual_seed(n)
    infinite = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3e38, -1e-44])
    return {
        "real": torch.randn(n, generator=generator),
        "ties": torch.randint(-9, 9, (n,), generator=generator).float(),
        "zeros": torch.zeros(n).copysign(torch.randn(n, generator=generator)),
        "rising": torch.where(torch.arange(n) % 16 == 0, torch.arange(n).float(), -torch.inf),
        "not finite": infinite[torch.randint(len(infinite), (n,), generator=generator)],
        "few": torch.where(torch.arange(n) % 9001 == 9000, 1.0, -torch.inf),
        "NaN": torch.full((n,), torch.nan),
    }[kind]


def best(scores, first, values, indices):
    """What `truth` gives for scores [m, c] and what is kept, of many scores: by numpy's sorts."""
    scores, kept = scores.double().numpy(), values.double().numpy()
    m, c = scores.shape
    everything = np.concatenate([kept, scores], 1)
    rows = np.concatenate([indices.numpy(), np.tile(first + np.arange(c), (m, 1))], 1)
    order = np.lexsort(
        (rows, -np.nan_to_num(everything, posinf=1e39, neginf=-1e39), ~np.isnan(everything))
    )[:, : kept.shape[1]]
    found = np.take_along_axis(everything, order, 1)
    return found, np.where(found == -np.inf, -1, np.take_along_axis(rows, order, 1))


@pytest.fixture
def merge(backend):
    """The merge of a backend on tensors of the CPU; on the host of a device of `sms` SMs."""
    if backend.name == "cuda" and backend.device == "cpu":
        set_num_sms = torch.ops.dropinf_host.set_num_sms
    else:
        set_num_sms = int

    def run(scores, first, values, indices, sms=1):
        set_num_sms(sms)
        there = [t.to(backend.device) for t in (values.clone(), indices.clone())]
        dispatch.KERNELS["score_topk"][backend.name](scores.to(backend.device), first, *there)
        return tuple(t.cpu() for t in there)

    yield run
    set_num_sms(1)


def same_bits(one, other):
    return all(torch.equal(a.view(b), c.view(b)) for a, c, b in zip(one, other, BITS))


BITS = (torch.int32, torch.int64)
KINDS = ("real", "ties", "zeros", "rising", "not finite", "few", "NaN")


@pytest.mark.backends("cuda")
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_number_of_parts(merge, kind):
    """Of a few SMs and of many, with nothing kept and with kept rows below and above."""
    c, first = 25_001, 2**33
    scores = special(kind, c)[None]
    below_and_above = torch.tensor([[5, first + 2 * c, 9, first + 3 * c]])
    for k, kept in ((4, [torch.nan, 7.0, 7.0, 0.0]), (4, [1.0, 0.0, 0.0, -1.0]), (70, None)):
        values, indices = nothing(1, k)
        if kept:
            values, indices = torch.tensor([kept]), below_and_above
        one, *others = (merge(scores, first, values, indices, sms) for sms in (0, 1, 132))
        assert_equal(one, best(scores, first, values, indices))
        assert all(same_bits(one, other) for other in others)


@pytest.mark.backends("cuda")
def test_parts_in_any_order_of_calls(merge):
    """Ties within a part, across parts and across calls: the lower row comes first."""
    cuts = [(0, 20_000), (20_000, 20_003), (20_003, 37_000)]
    scores = special("ties", 37_000)[None]
    wanted = best(scores, 0, *nothing(1, 50))
    for calls in itertools.permutations(cuts):
        kept = nothing(1, 50)
        for sms, (start, stop) in zip((1, 132, 3), calls, strict=True):
            kept = merge(scores[:, start:stop], start, *kept, sms)
        assert_equal(kept, wanted)


@pytest.mark.backends("cuda")
@pytest.mark.parametrize("c", [3, 2048, 2049, 16_415])
@pytest.mark.parametrize("k", [1, 64, 65, 1024])
def test_sizes_about_tiles_and_parts(merge, c, k):
    scores, kept = special("real", c)[None], nothing(1, k)
    assert_equal(merge(scores, 5, *kept, 132), best(scores, 5, *kept))


@pytest.mark.backends("cuda")
@pytest.mark.parametrize("m", [2, 5])
def test_parts_of_many_queries(merge, m):
    """Rows of scores with a stride, each with what it keeps."""
    wide = special("real", m * 17_000).view(m, 17_000)
    wide[:, :100] = wide[:, 16_900:] = torch.inf  # beside the scores
    scores = wide[:, 100:16_900]
    values = torch.linspace(3, -3, m * 9).view(m, 9)
    indices = 10**6 + torch.arange(m * 9).view(m, 9)
    assert_equal(merge(scores, 0, values, indices, 132), best(scores, 0, values, indices))


@pytest.mark.backends("cuda-host")
def test_a_last_part_without_scores(merge):
    """264 parts of whole sectors may be more than there are: 263 of 8,224 are 2,162,912."""
    scores, kept = special("real", 264 * 8192 + 1)[None], nothing(1, 1)
    assert_equal(merge(scores, 5, *kept, 132), best(scores, 5, *kept))


@pytest.mark.backends("cuda-host")
def test_number_of_parts(backend):
    """Two blocks for each SM, and no more parts than pay."""
    parts, set_num_sms = torch.ops.dropinf_host.score_topk_parts, torch.ops.dropinf_host.set_num_sms
    set_num_sms(132)
    wanted = {
        (1, 1 << 22, 10): 264,
        (16, 1 << 18, 100): 17,
        (64, 65_536, 10): 5,
        (264, 1 << 22, 10): 1,
        (1, 1 << 22, 1024): 64,  # the second launch has as many candidates as a part has scores
        (1, 16_383, 1): 1,
        (1, 16_384, 1): 2,
        (1, 1, 1024): 1,
        (1 << 40, 1 << 40, 1): 1,
    }
    assert {sizes: parts(*sizes) for sizes in wanted} == wanted
    set_num_sms(1)
    assert parts(1, 1 << 22, 10) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_rows_as_a_store_keeps_them(backend, dtype):
    """In few bits, with scales; float64 queries widen them."""
    queries, rows = whole(1 if backend.emulated else 3, 200)
    scales = 2.0 ** torch.randint(-3, 3, (200, 2), generator=torch.Generator().manual_seed(1))
    wide = rows.double() * scales.double().repeat_interleave(torch.tensor([2, 4]), 1)
    for given in (queries, queries.double()):
        if given.dtype == torch.float64 and backend.name != "reference":
            continue
        for options, exact in (({}, rows.double()), ({"scales": scales}, wide)):
            wanted = truth(queries.double().numpy() @ exact.numpy().T, 30)
            values, indices = nothing(len(given), 30, given.dtype)
            for start, stop in ((90, 200), (0, 90)):
                part = {name: option[start:stop] for name, option in options.items()}
                ops.score_topk(
                    given,
                    rows[start:stop].to(dtype),
                    values,
                    indices,
                    first=start,
                    offsets=(0, 2, 6),
                    backend=backend.name,
                    **part,
                )
            assert_equal((values, indices), wanted)


def test_float64():
    queries, rows = whole(2, 60)
    queries[0, 0] += 2.0**-20
    queries, rows = queries.double(), rows.double()
    values, indices = nothing(2, 9, torch.float64)
    ops.score_topk(queries, rows, values, indices)
    assert_equal((values, indices), truth(queries.numpy() @ rows.numpy().T, 9))
    if dropinf.backends()["triton"] == "available":
        with pytest.raises(dropinf.BackendError, match=r"not torch.float64\. Here: 'reference'"):
            ops.score_topk(queries, rows, values, indices, backend="triton")


@pytest.mark.parametrize("m, c, k", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (2, 0, 0)])
def test_empty(backend, m, c, k):
    queries, rows = whole(m, c)
    values, indices = run(backend, queries, rows, k, [(0, c)])
    assert values.shape == indices.shape == (m, k)
    assert (values == -torch.inf).all() and (indices == -1).all()


def test_rows_without_columns(backend):
    values, indices = run(backend, torch.zeros(1, 0), torch.zeros(3, 0), 2, [(0, 3)])
    assert values.tolist() == [[0.0, 0.0]] and indices.tolist() == [[0, 1]]


good = {
    "queries": torch.zeros(2, 4),
    "rows": torch.zeros(3, 4),
    "values": torch.full((2, 5), -torch.inf),
    "indices": torch.full((2, 5), -1),
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"queries": torch.zeros(4)}, r"queries must be \[m, R\] float32 or float64"),
        ({"queries": torch.zeros(2, 4).half()}, "queries must be .*, got torch.float16"),
        ({"rows": torch.zeros(3, 5)}, r"rows must be \[c, R=4\], got \(3, 5\)"),
        (
            {"rows": torch.zeros(3, 4).double()},
            "rows must be float32, .* on cpu, got torch.float64",
        ),
        ({"rows": torch.zeros(3, 4, device="meta")}, "rows must be .* on cpu, got .* on meta"),
        ({"scales": torch.ones(3, 1)}, "scales need offsets"),
        ({"values": torch.zeros(2, 5).double()}, "values must be torch.float32"),
        ({"indices": torch.zeros(2, 5).int()}, "indices must be torch.int64"),
        ({"indices": torch.zeros(2, 4).long()}, r"must both be \[m=2, k\], got .* and \(2, 4\)"),
        ({"values": torch.zeros(3, 5)}, r"must both be \[m=2, k\], got \(3, 5\)"),
        ({"values": torch.zeros(5, 2).T}, "values is written in place and must be contiguous"),
        ({"factors": torch.ones(2)}, r"factors must be \[c=3\], got \(2,\)"),
        ({"factors": torch.ones(3).double()}, "factors must be torch.float32"),
        ({"valid": torch.ones(3)}, "valid must be torch.bool"),
        ({"valid": torch.ones(3, 1).bool()}, r"valid must be \[c=3\], got \(3, 1\)"),
        ({"first": -1}, "first must be at least 0, got -1"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        ops.score_topk(**{**good, **change})
