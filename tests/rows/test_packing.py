"""Rows that are kept in fewer bytes: what is lost, and that all else goes on as with float32."""

import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from survival_cases import tensors
from torch import nn
from torch.utils.data import DataLoader

from dropinf import Dropout, Plan, RowStore, collect, scores, self_influence, topk
from dropinf.manifest import sealed, unsealed
from dropinf.rows import part_writer
from dropinf.rows.packing import Packing
from dropinf.solvers import CG, Cholesky, DataInf, Diagonal, Eigen, Identity

NARROW = [torch.bfloat16, torch.float16, torch.int8]
DTYPES = [torch.float32, *NARROW]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))


def losses(net, batch):
    return net(batch[0]).square().sum(1)


PLAN = Plan.make(net(), Dropout(r=8))
BATCH = 4


def rows_of(n, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1e-3, 30.0]).repeat_interleave(8)
    return scale * sizes * torch.randn(n, PLAN.width, generator=generator)


def bound(dtype, rows, bounds):
    """How far off an entry [n, R] may be, by the definition of each type."""
    rows = rows.double()
    if dtype == torch.bfloat16:
        return rows.abs() * 2**-8 + 2**-133  # 8 digits, from 2^-126 on
    largest = torch.zeros_like(rows)
    for start, stop in itertools.pairwise(bounds):
        if start < stop:
            largest[:, start:stop] = rows[:, start:stop].abs().amax(1, keepdim=True)
    if dtype == torch.float16:  # 11 digits, down to 2^-28 of the largest
        return (rows.abs() * 2**-11 + largest * 2**-38) * (1 + 1e-6) + 2**-149
    return largest / 254 * (1 + 1e-5) + 2**-126  # a half of one of 127 steps


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.integers(0, 130),
    st.sampled_from(NARROW),
    st.integers(0, 10**6),
)
def test_what_is_lost(widths, n, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    bounds = tuple(torch.tensor([0, *widths]).cumsum(0).tolist())
    packing = Packing(dtype, bounds)
    exponents = torch.randint(-140, 120, (n, len(widths)), generator=generator)
    exponents = exponents.repeat_interleave(torch.tensor(widths), 1)
    numbers = torch.randn(n, bounds[-1], generator=generator, dtype=torch.float64)
    exponents -= torch.randint(0, 36, exponents.shape, generator=generator)  # within a layer
    rows = torch.ldexp(numbers, exponents).float()
    rows[torch.rand(rows.shape, generator=generator) < 0.2] = 0
    packed = packing.pack(rows)
    found = packing.unpack(packed)
    assert found.dtype == torch.float32 and found.shape == rows.shape
    assert ((found.double() - rows.double()).abs() <= bound(dtype, rows, bounds)).all()
    assert not found[rows == 0].any()
    columns = [slice(bounds[-1] // 3, bounds[-1]), slice(0, bounds[-1] // 2)]
    some = packing.unpack(packed, columns)
    assert torch.equal(some, torch.cat([found[:, part] for part in columns], 1))
    numbers, scales = packing.views(packed)
    assert numbers.dtype == dtype and (scales is None) == (dtype == torch.bfloat16)
    if scales is not None:
        assert scales.shape == (n, len(widths))


def test_wide_types_lose_nothing():
    rows = rows_of(5)
    for wide in (rows, rows.double()):
        store = RowStore(wide, PLAN)
        assert store.dtype == wide.dtype and store.rows.data_ptr() == wide.data_ptr()
    half = rows.half()
    assert torch.equal(RowStore(half, PLAN).rows, half.float())
    assert torch.equal(RowStore(rows.bfloat16(), PLAN).rows, rows.bfloat16().float())
    assert torch.equal(RowStore(rows, PLAN, dtype=torch.float64).rows, rows.double())


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_store(dtype, tmp_path):
    """In memory, on disk, grown, joined, picked out of, pickled: the same numbers."""
    rows, valid = rows_of(9), torch.ones(9, dtype=torch.bool)
    valid[2] = False
    rows[2] = torch.nan  # an invalid row may hold anything
    store = RowStore(rows[:5], PLAN, valid[:5], ids=range(5), dtype=dtype)
    store.save(tmp_path / "rows")
    loaded = RowStore.load(tmp_path / "rows")
    for grown in (store, loaded):
        grown.append(rows[5:], ids=range(5, 9))
        assert grown.dtype == dtype
    expected = Packing.of(PLAN, dtype)
    expected = expected.unpack(expected.pack(rows.nan_to_num(0)))
    again = RowStore.load(tmp_path / "rows")
    again.verify()
    halves = RowStore.join([store[range(4)], store[range(4, 9)]])
    pickled = [pickle.loads(pickle.dumps(s)) for s in (store, again, halves)]
    for found in (store, loaded, again, halves, *pickled):
        assert torch.equal(found.rows, expected) and torch.equal(found.valid, valid)
        assert torch.equal(torch.cat([chunk for _, chunk in found.chunks()]), expected)
        assert torch.equal(found.at([7, 0]), expected[[7, 0]]) and found.dtype == dtype
        assert torch.equal(found[[8, 5]].rows, expected[[8, 5]])
        columns = [slice(12, 16), slice(0, 3)]
        some = torch.cat([chunk for _, chunk in found.chunks(columns)])
        assert torch.equal(some, torch.cat([expected[:, part] for part in columns], 1))
    a_row = {torch.bfloat16: 32, torch.float16: 8 + 32, torch.int8: 8 + 16}[dtype]
    assert store.num_bytes == 9 * a_row
    files = (tmp_path / "rows").glob("part-*/rows.bin")
    assert sum(file.stat().st_size for file in files) == 9 * a_row


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_collect(dtype, tmp_path, monkeypatch):
    """As in float32, and narrowed then; on disk with a stop between."""
    monkeypatch.setattr(part_writer, "_FLUSH_SECONDS", 0.0)
    loader = DataLoader(tensors(), BATCH)
    options = {"progress": False, "check": False}
    wide = collect(net(), loader, losses, PLAN, **options)
    expected = RowStore(wide.rows, PLAN, dtype=dtype)
    found = collect(net(), loader, losses, PLAN, dtype=dtype, **options)
    assert found.dtype == dtype and torch.equal(found.rows, expected.rows)
    assert (found.rows != wide.rows).any()

    def fails(net, batch):
        if batch[1][0] == 8:
            raise OSError("stop")
        return losses(net, batch)

    path = tmp_path / "rows"
    with pytest.raises(OSError), pytest.warns(UserWarning, match="the first 8 rows are in"):
        collect(net(), loader, fails, PLAN, path, dtype=dtype, **options)
    for other in (None, torch.float32):
        with pytest.raises(ValueError, match=r"collected with dtype='torch\.\w+', not "):
            collect(net(), loader, losses, PLAN, path, resume=True, dtype=other, **options)
    found = collect(net(), loader, losses, PLAN, path, resume=True, dtype=dtype, **options)
    assert found.dtype == dtype and torch.equal(found.rows, expected.rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "solver",
    [Cholesky(), Cholesky(dtype=torch.float64), Eigen(), CG(), DataInf(), Diagonal(), Identity()],
    ids=lambda s: type(s).__name__,
)
def test_through_the_solvers(dtype, solver):
    """Scores are those of the rows that are read, whatever they are kept in."""
    kept, queries = (RowStore(rows_of(n, n), PLAN, dtype=dtype) for n in (30, 4))
    read, asked = RowStore(kept.rows, PLAN), RowStore(queries.rows, PLAN)
    found, exact = (
        [
            scores(q, s, solver.fit(s)),
            *topk(q, s, solver, 5),
            self_influence(s, solver),
            scores(q, s, solver, relative=True),
        ]
        for q, s in ((queries, kept), (asked, read))
    )
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))
    if dtype != torch.float32:
        wide = RowStore(rows_of(30, 30), PLAN)
        off = scores(asked, wide, solver.fit(wide)) - exact[0]
        assert 0 < off.norm() < 0.05 * exact[0].norm()


def test_bad_input(tmp_path):
    rows = rows_of(3)
    with pytest.raises(ValueError, match=r"kept in one of float32, .*, int8, not torch\.int32"):
        RowStore(rows, PLAN, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"kept in one of float32, .*, int8, not torch\.uint8"):
        collect(net(), [], losses, PLAN, dtype=torch.uint8)
    huge = rows.double()
    huge[1, 3] = 1e300
    for dtype in (torch.float32, *NARROW):
        with pytest.raises(ValueError, match="row 1 of 3 is beyond the range of torch"):
            RowStore(huge, PLAN, dtype=dtype)
    largest = torch.full_like(rows, torch.finfo(torch.float32).max)
    with pytest.raises(ValueError, match=r"row 0 of 3 is beyond the range of torch\.bfloat16"):
        RowStore(largest, PLAN, dtype=torch.bfloat16)
    for dtype in (torch.float16, torch.int8):
        with pytest.raises(ValueError, match=rf"row 0 of 3 is beyond the range of {dtype}"):
            RowStore(largest, PLAN, dtype=dtype)
        nearly = 0.98 * largest
        assert torch.allclose(RowStore(nearly, PLAN, dtype=dtype).rows, nearly, rtol=1e-3)
    store = RowStore(rows, PLAN, dtype=torch.int8)
    with pytest.raises(ValueError, match="store 1 has other dtype than the first one"):
        RowStore.join([store, RowStore(rows, PLAN)])
    with pytest.raises(ValueError, match=r"append: rows must be of \(dtype, ids, origin\)"):
        store.append(rows.double())
    store.append(rows)
    assert len(store) == 6


@pytest.mark.parametrize("scales", [0, 1, 3, 17, "2", True, -1])
def test_another_number_of_scales(scales, tmp_path):
    """A journal that is whole and says something else of the scales than the plan."""
    RowStore(rows_of(3), PLAN, dtype=torch.int8).save(tmp_path / "rows")
    part = tmp_path / "rows" / "part-000000"
    first, second = (part / "journal.jsonl").read_bytes().splitlines()
    header = unsealed(first)
    assert header["scales"] == 2
    first = sealed({**header, "scales": scales})
    (part / "journal.jsonl").write_bytes(first + b"\n" + second + b"\n")
    (part / "part.json").unlink()
    with (part / "rows.bin").open("ab") as file:
        file.write(bytes(1000))
    with pytest.raises(ValueError, match="scales") as error:
        RowStore.load(tmp_path / "rows")
    assert "\n" not in str(error.value)


def test_journals_of_before(tmp_path):
    """Their first line says nothing of scales: there are none."""
    RowStore(rows_of(3), PLAN).save(tmp_path / "rows")
    part = tmp_path / "rows" / "part-000000"
    first, second = (part / "journal.jsonl").read_bytes().splitlines()
    header = unsealed(first)
    del header["scales"]
    (part / "journal.jsonl").write_bytes(sealed(header) + b"\n" + second + b"\n")
    (part / "part.json").unlink()
    with pytest.warns(UserWarning, match="is not finished"):
        store = RowStore.load(tmp_path / "rows")
    assert torch.equal(store.rows, rows_of(3))
