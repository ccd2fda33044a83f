"""Runs of the experiments of bench/experiments in their tiny sizes."""

import json
import os
import re
import subprocess
import sys

from places import ROOT

FOLDER = ROOT / "bench" / "experiments"


def run_quick(name, path):
    """`python bench/experiments/<name>.py --quick`, and what it wrote."""
    command = [sys.executable, FOLDER / f"{name}.py", "--quick", "--out", path]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=True)
    return json.loads(path.read_text())


def assert_second_run_changes_the_date_alone(name, path):
    """Of all that the first wrote beside `path`."""

    def written():
        files = sorted(f for f in path.parent.iterdir() if f.suffix in (".json", ".md", ".svg"))
        assert len(files) >= 3  # the JSON, its page and a figure
        return {f.name: re.sub(r"\d{4}-\d\d-\d\d(T[^\"]*)?", "DATE", f.read_text()) for f in files}

    before = written()
    run_quick(name, path)
    assert written() == before
