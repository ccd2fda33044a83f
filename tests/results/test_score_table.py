"""Scores as Arrow, pandas, CSV and columns of a Dataset: all say the same, by the ids."""

import csv
import errno
import os
import sys

import numpy as np
import pytest
import torch
from score_cases import plan_of

from dropinf import RowStore, ScoreTable, scores, self_influence
from dropinf.solvers import Cholesky

STRINGS = ["b", "a", "\u0434, \n\u0434", '"', "e", "f"]
PLAN = plan_of(3, 2)


def store_of(n, ids=None, invalid=(), seed=0):
    rows = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
    valid = torch.ones(n, dtype=torch.bool)
    valid[list(invalid)] = False
    return RowStore(rows, PLAN, valid, ids=ids)


@pytest.fixture(params=[None, [50, 3, 41, 7, 12, 0], STRINGS], ids=["order", "integers", "strings"])
def case(request):
    """(scores [3, 6], store, queries); row 2 and query 1 are invalid."""
    store, asked = store_of(6, request.param, invalid=[2]), store_of(3, ["q", 'x"', "z"], [1], 1)
    return scores(asked, store, Cholesky(0.1).fit(store)), store, asked


def ids_of(store):
    return store.ids if isinstance(store.ids, list) else store.ids.tolist()


def test_arrow_is_the_memory_of_the_scores(case):
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'dropinf[arrow]'")
    found, store, _ = case
    table = ScoreTable(*case).to_arrow()
    assert table.column_names == ["id", "score_q", 'score_x"', "score_z"]
    assert table["id"].to_pylist() == ids_of(store)
    for q, name in enumerate(table.column_names[1:]):
        (column,) = table[name].chunks
        assert column.buffers()[1].address == found[q].data_ptr()
        assert column.type == pyarrow.float32()
        np.testing.assert_array_equal(column.to_numpy(), found[q].numpy())
    assert np.isnan(table['score_x"'].to_numpy()).all()
    table.validate(full=True)


def test_pandas_and_csv_say_the_same(case, tmp_path):
    pandas = pytest.importorskip("pandas", reason="pip install 'dropinf[arrow]'")
    pytest.importorskip("pyarrow", reason="pip install 'dropinf[arrow]'")
    found, store, _ = case
    table = ScoreTable(*case)
    frame = table.to_pandas()
    assert frame["id"].tolist() == ids_of(store)
    np.testing.assert_array_equal(frame.drop(columns="id").to_numpy().T, found.numpy())
    pandas.testing.assert_frame_equal(
        frame, table.to_arrow().to_pandas(), check_dtype=False, check_column_type=False
    )
    table.to_csv(tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    assert header == list(frame.columns)
    assert [line[0] for line in lines] == list(map(str, ids_of(store)))
    read = [[np.float32(value) if value else np.nan for value in line[1:]] for line in lines]
    np.testing.assert_array_equal(np.array(read).T, found.numpy())  # to the last digit


def test_one_number_an_example(tmp_path):
    store = store_of(6, invalid=[2])
    own = self_influence(store, Cholesky(0.1).fit(store))
    table = ScoreTable(own, store, "self_influence")
    assert table.names == ["self_influence"] and len(table) == 6
    table.to_csv(tmp_path / "own.csv")
    lines = (tmp_path / "own.csv").read_text().splitlines()
    assert lines[0] == "id,self_influence" and lines[3] == "2,"
    assert float(lines[1].split(",")[1]) == pytest.approx(float(own[0]), rel=1e-7)
    assert repr(table) == "ScoreTable(6 training examples, 1 columns)"


def test_float64_and_long_tables(tmp_path):
    """More lines than are written at a time."""
    store = store_of(2500)
    numbers = torch.randn(2, 2500, dtype=torch.float64)
    ScoreTable(numbers, store, ["one", "two"]).to_csv(tmp_path / "long.csv")
    read = np.loadtxt(tmp_path / "long.csv", delimiter=",", skiprows=1)
    np.testing.assert_array_equal(read, np.column_stack([np.arange(2500), numbers.T.numpy()]))


def test_columns_of_a_dataset_by_position():
    """Rows in another order than the data, and examples without a row."""
    datasets = pytest.importorskip("datasets", reason="pip install 'dropinf[arrow]'")
    data = datasets.Dataset.from_dict({"text": list("abcdefgh")})
    order = [5, 0, 7, 2]
    numbers = torch.arange(8.0).view(2, 4)
    out = ScoreTable(numbers, store_of(4, order), ["one", "two"]).add_to(data)
    assert out["text"][:] == list("abcdefgh") and out.column_names == ["text", "one", "two"]
    for name, row in zip(("one", "two"), numbers, strict=True):
        expected = np.full(8, np.nan)
        expected[order] = row
        np.testing.assert_array_equal(np.array(out[name][:]), expected)
    assert data.column_names == ["text"]


@pytest.mark.parametrize("format_", [None, "torch", "numpy"])
def test_columns_of_a_dataset_by_a_column(format_):
    datasets = pytest.importorskip("datasets", reason="pip install 'dropinf[arrow]'")
    for ids in (STRINGS, [50, 3, 41, 7, 12, 0]):
        data = datasets.Dataset.from_dict({"key": ids}).shuffle(seed=1).with_format(format_)
        own = torch.arange(6.0)
        out = ScoreTable(own, store_of(6, ids), "own").add_to(data, ids="key").with_format(None)
        assert dict(zip(out["key"], out["own"], strict=True)) == dict(
            zip(ids, own.tolist(), strict=True)
        )


@pytest.mark.parametrize(
    "ids, options, words",
    [
        ([0, 9], {}, "id 9 is not among its positions; give ids=, the column"),
        (["a", "b"], {}, "id 'a' is not among its positions"),
        (["a", "z"], {"ids": "key"}, "id 'z' is not among its column 'key'"),
        (["a", "b"], {"ids": "none"}, "the data have no column 'none'; they have 'key', 'twice', "),
        (["u", "v"], {"ids": "twice"}, "the data have two rows of id 'u'"),
        (["u", "v"], {"ids": "many"}, "column 'many' has no integers or strings, .* but list"),
        ([1, 1], {}, "the table has two rows of id 1; of tokens, add scores up"),
    ],
)
def test_ids_that_are_not_those_of_the_data(ids, options, words):
    datasets = pytest.importorskip("datasets", reason="pip install 'dropinf[arrow]'")
    columns = {"key": ["a", "b", "c"], "twice": ["u", "u", "v"], "many": [[1], [2], [3]]}
    data = datasets.Dataset.from_dict(columns)
    with pytest.raises(ValueError, match=f"ScoreTable.add_to: {words}"):
        ScoreTable(torch.zeros(2), store_of(2, ids), "own").add_to(data, **options)


def test_a_column_that_is_there():
    datasets = pytest.importorskip("datasets", reason="pip install 'dropinf[arrow]'")
    data = datasets.Dataset.from_dict({"key": ["a", "b"]})
    table = ScoreTable(torch.zeros(2), store_of(2), "own")
    with pytest.raises(ValueError, match="a column 'own' already; take it out with remove_columns"):
        table.add_to(table.add_to(data))
    assert table.add_to(table.add_to(data).remove_columns("own")).column_names == ["key", "own"]


def test_no_dataset():
    datasets = pytest.importorskip("datasets", reason="pip install 'dropinf[arrow]'")
    table = ScoreTable(torch.zeros(2), store_of(2), "own")
    stream = datasets.Dataset.from_dict({"x": [1, 2]}).to_iterable_dataset()
    for given in (stream, [1, 2]):
        with pytest.raises(TypeError, match=r"takes a datasets.Dataset, got .*; of a stream, map"):
            table.add_to(given)
    by_id = dict(zip(table.ids, [0.5, 1.5], strict=True))  # and that can be done
    mapped = stream.map(lambda example, i: {"own": by_id[i]}, with_indices=True)
    assert [example["own"] for example in mapped] == [0.5, 1.5]


def test_what_is_refused():
    store, asked = store_of(6), store_of(3)
    for numbers, queries, words in (
        (torch.zeros(2, 6), asked, r"must be \[3, 6\].* got \(2, 6\)"),
        (torch.zeros(6, 3), asked, r"must be \[3, 6\].* got \(6, 3\)"),
        (torch.zeros(6), asked, r"must be \[3, 6\].* got \(6,\)"),
        (torch.zeros(1, 1, 6), "own", r"got \(1, 1, 6\)"),
        (torch.zeros(2, 6), ["a", "a"], "two columns would be named 'a'; give names"),
        (torch.zeros(6), "id", "two columns would be named 'id'"),
        (torch.zeros(6, dtype=torch.bfloat16), "own", "must be float32 or float64, got torch.bf"),
    ):
        with pytest.raises(ValueError, match=f"ScoreTable: .*{words}"):
            ScoreTable(numbers, store, queries)
    with pytest.raises(TypeError, match="scores must be a tensor, got ndarray"):
        ScoreTable(torch.zeros(6).numpy(), store, "own")
    tokens = RowStore(
        asked.rows, PLAN, origin=torch.tensor([[0, 0], [0, 1], [1, 0]]), ids=[4, 4, 5]
    )
    with pytest.raises(ValueError, match="two columns would be named 'score_4'"):
        ScoreTable(torch.zeros(3, 6), store, tokens)
    named = [f"{i}_{t}" for i, t in tokens.origin.tolist()]  # as the sentence says
    assert ScoreTable(torch.zeros(3, 6), store, named).names == ["0_0", "0_1", "1_0"]


def test_nothing_is_half_written(tmp_path, monkeypatch):
    table = ScoreTable(torch.zeros(6), store_of(6), "own")
    table.to_csv(tmp_path / "there")
    before = (tmp_path / "there").read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for name in ("there", "new"):
        with pytest.raises(OSError, match="No space left"):
            ScoreTable(torch.ones(6), store_of(6), "own").to_csv(tmp_path / name)
    assert (tmp_path / "there").read_bytes() == before and os.listdir(tmp_path) == ["there"]


@pytest.mark.parametrize(
    "module, call",
    [
        ("pyarrow", ScoreTable.to_arrow),
        ("pandas", ScoreTable.to_pandas),
        ("datasets", lambda table: table.add_to([])),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {module}: pip install 'dropinf\[arrow\]'"):
        call(ScoreTable(torch.zeros(6), store_of(6), "own"))
