"""Rows as Arrow: the same numbers at the same addresses, what goes with them, what has no type."""

import gc
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dropinf import Full, Plan, RowStore

pyarrow = pytest.importorskip("pyarrow", reason="pip install 'dropinf[arrow]'")

PLAN = Plan.make(nn.Sequential(nn.Linear(4, 1), nn.Linear(2, 1, bias=False)), Full())  # R = 7


def rows_of(n, dtype=torch.float32):
    return torch.randn(n, 7, generator=torch.Generator().manual_seed(n)).to(dtype)


def addresses(table):
    """Where the numbers of each chunk of rows stand."""
    return [chunk.values.buffers()[1].address for chunk in table["row"].chunks]


def numbers(table):
    """[n, R]."""
    return np.array(table["row"].to_pylist()).reshape(-1, 7)


def file_at(address):
    """What is mapped there, by the kernel."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split()
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return name
    return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_in_memory_are_not_copied(dtype):
    rows = rows_of(5, dtype)
    table = RowStore(rows, PLAN).to_arrow()
    assert addresses(table) == [rows.data_ptr()]
    assert np.array_equal(numbers(table), rows.numpy())
    assert table["id"].to_pylist() == [0, 1, 2, 3, 4]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what is mapped")
def test_rows_on_disk_are_not_copied(tmp_path):
    """Two parts, mapped from their files, which outlive the store."""
    first, second = rows_of(5), rows_of(3)
    RowStore(first, PLAN, ids=["a", "b", "c", "d", "\u0434"]).save(tmp_path / "rows")
    store = RowStore.load(tmp_path / "rows")
    valid = torch.tensor([True, False, True])
    second[1] = 0
    store.append(second, ["x", "y", "z"], valid)
    table = store.to_arrow()
    mapped = [file_at(address) for address in addresses(table)]
    assert mapped == [
        str(tmp_path / "rows" / f"part-00000{k}" / "rows.bin") for k in range(len(store.parts))
    ]
    assert addresses(table) == [part.packed.data_ptr() for part in store.parts]
    del store
    gc.collect()
    assert np.array_equal(numbers(table), torch.cat([first, second]).numpy())
    assert table["id"].to_pylist() == ["a", "b", "c", "d", "\u0434", "x", "y", "z"]
    assert table["valid"].to_pylist() == [True] * 6 + [False, True]
    table.validate(full=True)


def test_schema():
    store = RowStore(rows_of(4), PLAN, origin=torch.tensor([[0, 0], [0, 1], [2, 0], [2, 3]]))
    table = store.to_arrow()
    assert table.schema.names == ["id", "row", "valid", "origin"]
    assert table.schema.field("row").type == pyarrow.list_(pyarrow.float32(), 7)
    assert table["origin"].to_pylist() == store.origin.tolist()
    about = json.loads(table.schema.metadata[b"dropinf"])
    assert about["plan"] == PLAN.fingerprint and about["weights"] is None
    assert about["layers"] == [
        {"name": "0", "first": 0, "r": 5},
        {"name": "1", "first": 5, "r": 2},
    ]
    for layer, block in zip(about["layers"], PLAN.blocks, strict=True):
        part = numbers(table)[:, layer["first"] : layer["first"] + layer["r"]]
        assert np.array_equal(part, store.rows[:, block.entries].numpy())


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(n):
    table = RowStore(rows_of(n), PLAN).to_arrow()
    assert table.num_rows == n and numbers(table).shape == (n, 7)
    table.validate(full=True)


def test_rows_that_are_not_contiguous():
    rows = rows_of(6)[::2]
    assert np.array_equal(numbers(RowStore(rows, PLAN).to_arrow()), rows.numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_what_has_no_type(dtype):
    """A sentence, whose way out works."""
    store = RowStore(rows_of(4), PLAN, ids=["a", "b", "c", "d"], dtype=dtype)
    with pytest.raises(ValueError, match=f"no type for rows that are kept in {dtype}") as error:
        store.to_arrow()
    way_out = str(error.value).partition(", and ")[2].removesuffix(" has them so in memory")
    table = eval(way_out, {"RowStore": RowStore, "store": store}).to_arrow()
    assert np.array_equal(numbers(table), store.rows.numpy())
    assert table["id"].to_pylist() == store.ids


def test_damage_is_found(tmp_path):
    RowStore(rows_of(5), PLAN).save(tmp_path / "rows")
    file = tmp_path / "rows" / "part-000000" / "rows.bin"
    data = bytearray(file.read_bytes())
    data[17] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"rows.bin is damaged in rows 0 to 4"):
        RowStore.load(tmp_path / "rows").to_arrow()


def test_without_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install 'dropinf\[arrow\]'"):
        RowStore(rows_of(1), PLAN).to_arrow()
