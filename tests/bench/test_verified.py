"""What is taken by default on a GPU was tested on one, as it is now."""

import json

import pytest
from gpu.results import sources
from places import ROOT

from dropinf.ops import dispatch


@pytest.mark.parametrize("backend, op", dispatch.VERIFIED)
def test_recorded_without_a_failure(backend, op):
    data = json.loads((ROOT / "bench" / "results" / dispatch.VERIFIED[backend, op]).read_text())
    counts = data["verified"][f"{backend}/{op}"]
    assert data["device"]["type"] == "cuda" and not data["rehearsal"]
    assert counts["complete"] and counts["passed"] > 0 and counts["failed"] == 0
    assert set(data["sanitizers"]) == {"memcheck", "racecheck", "synccheck", "initcheck"}
    assert all(tool["state"] == "clean" for tool in data["sanitizers"].values())
    assert data["sources"][op] == sources()[op], (
        f"the {backend} kernel of {op} was changed since a GPU ran it: take it out of "
        "dispatch.VERIFIED, or run `make gpu`"
    )


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
