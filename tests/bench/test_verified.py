"""What is taken by default on a GPU was tested on one, as it is now.

That is: no line of a kernel was changed, or its machine code is what ran there.
"""

import json

import machine_code
import pytest
from gpu.results import sources
from nvcc import release
from places import ROOT

from dropinf.ops import dispatch

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def record_of(backend, op):
    return json.loads((ROOT / "bench" / "results" / dispatch.VERIFIED[backend, op]).read_text())


def unproven(backend, op, record):
    """Why a record does not show that the op, as it is here, ran on a GPU; None if it does."""
    if record["rehearsal"]:
        return "a rehearsal"
    counts = record["verified"].get(f"{backend}/{op}", {"passed": 0})
    if not counts["passed"] or counts["failed"] or not counts["complete"]:
        return "not all of its tests passed"
    if any(record["sanitizers"].get(tool, {}).get("state") != "clean" for tool in TOOLS):
        return "a sanitizer found something, or did not end"
    same = record.get("machine_code", {}).get("same_in", {})
    if sources()[op] not in (record["sources"].get(op), same.get(op)):
        return "it was changed since: see whether its machine code was (tests/machine_code.py)"
    return None


@pytest.mark.parametrize("backend, op", dispatch.VERIFIED)
def test_recorded_without_a_failure(backend, op):
    assert unproven(backend, op, record_of(backend, op)) is None


@pytest.mark.more
@pytest.mark.parametrize("backend, op", dispatch.VERIFIED)
def test_the_machine_code_is_what_ran(backend, op):
    record = record_of(backend, op)
    if record["sources"].get(op) == sources()[op]:
        pytest.skip("it has the lines that ran")
    if release() != record["machine_code"]["nvcc"]:
        pytest.skip(f"nvcc is {release()}, the record {record['machine_code']['nvcc']}")
    assert machine_code.changed(op, record) == set()


def test_what_proves_nothing():
    counts = {"passed": 9, "failed": 0, "skipped": 1, "complete": True}
    record = {
        "rehearsal": False,
        "verified": {"cuda/gram": counts},
        "sanitizers": {tool: {"state": "clean"} for tool in TOOLS},
        "sources": sources(),
        "machine_code": {"same_in": {"gram": "compared"}},
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
    same = {"same_in": {"gram": sources()["gram"]}}
    assert unproven("cuda", "gram", record | {"sources": {}, "machine_code": same}) is None


def test_what_machine_code_proves(monkeypatch):
    record = {"machine_code": {"kernels": {"gram": {"c0de": "gram_kernel", "beef": "gone_kernel"}}}}
    record["machine_code"]["only_nvcc"] = machine_code.only_nvcc()

    def changed(kernels):
        monkeypatch.setattr(machine_code, "of_file", lambda file: kernels)
        return machine_code.changed("gram", record)

    assert changed({"c0de": "renamed_kernelIf"}) == set()
    assert changed({"c0de": "gram_kernel", "d00d": "new_kernelIf"}) == {"new_kernelIf"}
    assert changed({"d00d": "gram_kernel"}) == {"gram_kernel"}
    record["machine_code"]["only_nvcc"] = "other"
    assert changed({"c0de": "gram_kernel"}) == {"what nvcc alone sees"}


def test_what_nvcc_alone_sees_is_in_one_file():
    files = (ROOT / "csrc").rglob("*.*")
    assert {f.name for f in files if "__CUDACC__" in f.read_text()} == {"common.cuh"}


def test_a_launch_on_another_stream_shows(tmp_path):
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    text = (ROOT / "csrc" / "cuda" / "common.cuh").read_text()
    for old, new in (("(shared_bytes), stream>>>", "(shared_bytes)>>>"), ("(void)stream;", "")):
        assert old in text
        (tmp_path / "csrc" / "cuda" / "common.cuh").write_text(text.replace(old, new))
        same = machine_code.only_nvcc(tmp_path) == machine_code.only_nvcc()
        assert same == (old == "(void)stream;")


BODY = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;    /* 0x00000a00ff017b82 */
        /*0010*/                   LDC R2, c[0x0][R1+{}] ;   /* 0x000fe20000000800 */
        /*0020*/              @!P0 ST [R2], {} ;             /* 0x00000a00ff017b82 */
        /*0030*/                   LDC R3, c[0x0][{}] ;      /* 0x000fe20000000800 */
"""


def test_what_a_digest_is_of():
    digest = machine_code.digest(BODY.format("0x210", "R3", "0x218"))
    assert machine_code.digest(BODY.format("-0x7e30", "R3", "0x480")) == digest
    assert machine_code.digest(BODY.format("0x210", "R4", "0x218")) != digest
    assert machine_code.digest(BODY.format("0x210", "R3", "0x210")) != digest  # one argument twice


def test_a_change_shows(tmp_path):
    before = sources()
    folder = tmp_path / "csrc"
    (folder / "cuda").mkdir(parents=True)
    for file in [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.*h")]:
        (folder / file.relative_to(ROOT / "csrc")).write_bytes(file.read_bytes())
    for file in (ROOT / "csrc" / "cuda").glob("*.cu"):
        (folder / "cuda" / file.name).write_text(file.read_text() + "// said\n\n")
    assert sources(tmp_path) == before and len(before) >= 9
    header = folder / "cuda" / "cholesky_layer.cuh"
    header.write_text(header.read_text().replace("kPanel = 8", "kPanel = 4"))
    changed = {op for op, digest in sources(tmp_path).items() if digest != before[op]}
    assert changed == {"damped_cholesky", "cholesky_solve"}
