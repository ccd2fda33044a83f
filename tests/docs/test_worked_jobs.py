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
