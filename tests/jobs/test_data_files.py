"""Files of examples: what is read, and what is refused in which words."""

import importlib.util
import sys

import pytest

from dropinf.jobs.data_files import ids_of_column, read_data


def written(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def test_jsonl(tmp_path):
    """A byte order mark and blank lines are no examples; a text may have any sign."""
    text = '\ufeff{"a": "\\u2028é", "n": 1}\n\n{"a": "line\\nfeed\u2028", "n": [2]}'
    data = read_data(written(tmp_path, "x.jsonl", text))
    assert data.rows == [{"a": "\u2028é", "n": 1}, {"a": "line\nfeed\u2028", "n": [2]}]
    assert data.lines == [1, 3] and data.where(1) == f"{tmp_path}/x.jsonl, line 3"


def test_csv(tmp_path):
    """Fields may hold commas, quotes, line feeds and 200 kB."""
    long = "x" * 200_000
    text = f'a,b\r\n"one, ""two""\nthree",4\r\n\r\n{long},\r\n'
    data = read_data(written(tmp_path, "x.csv", text))
    assert data.rows == [{"a": 'one, "two"\nthree', "b": "4"}, {"a": long, "b": ""}]
    assert data.lines == [2, 5]


def test_parquet(tmp_path):
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    rows = [{"a": "é", "n": 1}, {"a": "b", "n": 2}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    data = read_data(tmp_path / "x.parquet")
    assert data.rows == rows and data.where(1).endswith("x.parquet, row 2")
    with pytest.raises(ValueError, match=r"y.parquet cannot be read as Parquet: "):
        read_data(written(tmp_path, "y.parquet", "nothing"))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"Parquet needs pyarrow: pip install 'dropinf\[arrow\]'"):
        read_data(written(tmp_path, "x.parquet", "nothing"))


WRONG = {
    ("x.jsonl", '{"a": 1}\n{"a": '): "x.jsonl, line 2 is not JSON: ",
    ("x.jsonl", "[1, 2]"): "x.jsonl, line 1 must be a JSON object of columns, got [1, 2]; an array",
    ("x.jsonl", "[" * 100_000): "x.jsonl, line 1 is not JSON: ",
    ("x.jsonl", "\n \n"): "x.jsonl holds no example",
    ("x.jsonl", b'{"a": "\xff"}'): "x.jsonl is not UTF-8 (invalid start byte at byte 7)",
    ("x.csv", "a,b\n"): "x.csv holds no example",
    ("x.csv", ""): "x.csv holds no example",
    ("x.csv", "a,a\n1,2\n"): "x.csv has two columns 'a'",
    ("x.csv", "a,b\n1,2\n1,2,3"): "x.csv, line 3 has 3 fields where the header has 2",
    ("x.csv", 'a,b\n1,"2'): "x.csv, line 2 is not CSV: ",
    ("x.txt", "a"): "x.txt: data must be a file of .jsonl, .ndjson, .json, .csv, .parquet, not '.t",
}


@pytest.mark.parametrize(("name", "content"), WRONG)
def test_wrong_files(tmp_path, name, content):
    with pytest.raises(ValueError) as error:
        read_data(written(tmp_path, name, content))
    said = str(error.value)
    assert WRONG[name, content] in said and "\n" not in said


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no data file .*none\.jsonl"):
        read_data(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="is a directory, where a JSONL, CSV or Parquet file"):
        read_data(tmp_path)


def test_columns(tmp_path):
    data = read_data(written(tmp_path, "x.jsonl", '{"a": "x", "b": 1}\n{"a": 2}\n'))
    with pytest.raises(ValueError, match=r"line 2 has no column 'b' \(\[data\] label\); .* 'a'$"):
        data.column("b", "label", int, "a number")
    with pytest.raises(ValueError, match=r"line 2: column 'a' must be a text, got 2$"):
        data.column("a", "text", str, "a text")


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        ("3 5 -1", [3, 5, -1]),
        ('"a" "b" "c"', ["a", "b", "c"]),
        ('"07" "1" "2"', ["07", "1", "2"]),
        ('"7" "1" "2"', [7, 1, 2]),
        ('"a" "b" 3', "line 3: ids must be all whole numbers or all strings, got 3 after 'a'"),
        ('"a" "b" "a"', "line 3: id 'a' is that of line 1 too; ids must differ"),
        ("1 2 9223372036854775808", "line 3: id 9223372036854775808 has more than 64 bits"),
        ("1 2.5 3", "line 2: column 'id' must be a whole number or a string, got 2.5"),
        ("1 true 3", "line 2: column 'id' must be a whole number or a string, got True"),
        ("1 null 3", "line 2: column 'id' must be a whole number or a string, got None"),
    ],
)
def test_ids(tmp_path, values, ids):
    lines = "".join(f'{{"id": {value}}}\n' for value in values.split())
    data = read_data(written(tmp_path, "x.jsonl", lines))
    if isinstance(ids, list):
        assert ids_of_column(data, "id") == ids
        return
    with pytest.raises(ValueError) as error:
        ids_of_column(data, "id")
    assert ids in str(error.value)


def test_pyarrow_is_not_needed_for_others(tmp_path):
    """Nor imported."""
    assert importlib.util.find_spec("dropinf.jobs.data_files")
    before = set(sys.modules)
    read_data(written(tmp_path, "x.csv", "a\n1\n"))
    assert not {"pyarrow", "pandas"} & (set(sys.modules) - before)
