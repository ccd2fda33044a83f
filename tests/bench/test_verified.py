"""What is taken by default on a GPU was tested on one, as it is now."""

import json

import pytest
from gpu.results import sources
from places import ROOT

from dropinf.ops import dispatch

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def unproven(backend, op, record):
    """Why a record does not show that the op, as it is here, ran on a GPU; None if it does."""
    if record["rehearsal"]:
        return "a rehearsal"
    counts = record["verified"].get(f"{backend}/{op}", {"passed": 0})
    if not counts["passed"] or counts["failed"] or not counts["complete"]:
        return "not all of its tests passed"
    if any(record["sanitizers"].get(tool, {}).get("state") != "clean" for tool in TOOLS):
        return "a sanitizer found something, or did not end"
    if record["sources"].get(op) != sources()[op]:
        return "it was changed since: take it out of VERIFIED, or run `make gpu`"
    return None


@pytest.mark.parametrize("backend, op", dispatch.VERIFIED)
def test_recorded_without_a_failure(backend, op):
    file = ROOT / "bench" / "results" / dispatch.VERIFIED[backend, op]
    assert unproven(backend, op, json.loads(file.read_text())) is None


def test_what_proves_nothing():
    counts = {"passed": 9, "failed": 0, "skipped": 1, "complete": True}
    record = {
        "rehearsal": False,
        "verified": {"cuda/gram": counts},
        "sanitizers": {tool: {"state": "clean"} for tool in TOOLS},
        "sources": sources(),
    }
    assert unproven("cuda", "gram", record) is None
    for change in (
        {"rehearsal": True},
        {"verified": {}},
        {"verified": {"cuda/gram": counts | {"failed": 1}}},
        {"verified": {"cuda/gram": counts | {"complete": False}}},
        {"verified": {"cuda/gram": counts | {"passed": 0}}},
        {"sanitizers": {}},
        {"sanitizers": record["sanitizers"] | {"racecheck": {"state": "time was over"}}},
        {"sources": {}},
        {"sources": {"gram": "other"}},
    ):
        assert unproven("cuda", "gram", record | change), change


def test_a_change_shows(monkeypatch, tmp_path):
    before = sources()
    folder = tmp_path / "csrc"
    (folder / "cuda").mkdir(parents=True)
    for file in [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.*h")]:
        (folder / file.relative_to(ROOT / "csrc")).write_bytes(file.read_bytes())
    for file in (ROOT / "csrc" / "cuda").glob("*.cu"):
        (folder / "cuda" / file.name).write_text(file.read_text() + "// said\n\n")
    monkeypatch.setattr("gpu.results.ROOT", tmp_path)
    assert sources() == before and len(before) >= 9
    header = folder / "cuda" / "cholesky_layer.cuh"
    header.write_text(header.read_text().replace("kPanel = 8", "kPanel = 4"))
    changed = {op for op, digest in sources().items() if digest != before[op]}
    assert changed == {"damped_cholesky", "cholesky_solve"}
