"""The worked jobs of the manual run, and what they show is so."""

import os
import re
import subprocess
import sys

import pytest
from places import ROOT


def printed(name, *options):
    """What a script of docs/worked prints."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "worked" / name), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.more
def test_wrong_labels():
    """Looking where self-influence points is worth more than looking anywhere."""
    pytest.importorskip("sklearn")
    text = printed("wrong_labels.py")
    assert float(re.search(r"AUC of self-influence: (\S+)", text)[1]) > 0.98
    accuracy = [float(value) for value in re.findall(r"(0\.\d{3}) \+-", text)]
    given, at_random, by_influence, _ = accuracy
    assert by_influence > max(given, at_random)


@pytest.mark.more
def test_what_taught():
    """Training without the highest costs more than without as many others."""
    pytest.importorskip("transformers")
    text = printed("what_taught.py", "--seeds", "2")
    found = re.findall(r"^(.{16})(\d\.\d{3}) \+- (\d\.\d{3})", text, re.M)
    loss = {name.strip(): (float(mean), float(spread)) for name, mean, spread in found}
    for what in ("none left out", "at random", "the lowest"):
        assert loss["the highest"][0] - loss[what][0] > 3 * loss["the highest"][1]


@pytest.mark.more
def test_neighbours():
    """A flat index is exact; with more lists more is found; the page has what comes out."""
    pytest.importorskip("faiss", reason="pip install 'dropinf[faiss]'")
    pytest.importorskip("sklearn", reason="pip install 'dropinf[demo]'")
    text = printed("neighbours.py")
    found, off = re.search(r"flat: (\S+) of the exact top 10, scores off by (\S+)", text).groups()
    assert float(found) == 1 and float(off) < 1e-5
    page = (ROOT / "docs" / "arrow.md").read_text()
    for there, here in zip(table(page), table(text), strict=True):
        assert there == pytest.approx(here, abs=0.05)  # k-means rounds otherwise elsewhere
    for column in (1, 2, 3, 4):
        values = [row[column] for row in table(text)]
        assert values == sorted(values) and values[0] < 0.7 and values[-1] == 1


def table(text):
    """Its numbers, percents as shares."""
    lines = [
        line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| \d", line)
    ]
    return [
        [float(cell.split()[0]) / (100 if "%" in cell else 1) for cell in line] for line in lines
    ]


@pytest.mark.more
def test_with_dask():
    """Scores of several processes are those of one, to rounding."""
    pytest.importorskip("distributed", reason="pip install 'dropinf[dask]'")
    pytest.importorskip("sklearn", reason="pip install 'dropinf[demo]'")
    text = printed("with_dask.py")
    assert "1500 rows in 6 stores, written by 3 processes\n" in text
    assert [float(off) < 1e-5 for off in re.findall(r"off by (\S+)", text)] == [True, True]
    same, queries = re.search(r"same order, for (\d+) of (\d+) queries", text).groups()
    assert int(queries) == 297 and int(same) >= 290  # two scores may be equal to rounding
