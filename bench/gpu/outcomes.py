"""A pytest plugin: only the backends asked for, and one line a test in a file that survives a kill.

DROPINF_BACKENDS names the params of the fixture `backend` to keep, DROPINF_OUTCOMES the file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

WANTED = os.environ["DROPINF_BACKENDS"].split(",")
FILE = Path(os.environ["DROPINF_OUTCOMES"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, left = [], []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        backend = params.get("backend")
        in_test_gpu = item.path.name == "test_gpu.py"
        (kept if backend in WANTED or (in_test_gpu and backend is None) else left).append(item)
        op = item.path.stem.removeprefix("test_")
        if in_test_gpu and backend is not None:
            op = params.get("op", "sampled_outer").partition("-")[0]
        item.user_properties.append(("of", f"{backend}/{op}" if backend else op))
    items[:] = kept
    config.hook.pytest_deselected(items=left)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test has one line: when it failed, or was skipped, or passed its call."""
    if report.when != "call" and report.outcome == "passed":
        return
    of = dict(report.user_properties)["of"]
    line = {"of": of, "test": report.nodeid, "outcome": report.outcome}
    if report.failed:
        line["error"] = str(report.longrepr)[-600:]
    with FILE.open("a") as file:
        file.write(json.dumps(line) + "\n")
