"""bench/gpu/kernels.cu, for a GPU with nvcc alone: compiled and run on the host in tiny sizes."""

import re
import subprocess

import pytest
from cuda_host import build
from kernel_faults import FAULTS

SOURCE = build.ROOT / "bench" / "gpu" / "kernels.cu"
ROW = re.compile(r"(\S.*\S) +" + r" +".join([r"(\d+\.\d+)"] * 5))


def run(sources):
    """Its exit code, names that it found right and wrong, rows of its table, and its last line."""
    program = build.program(SOURCE, sources)
    done = subprocess.run([program, "--small"], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    right, wrong = (
        [line[6:] for line in lines if line.startswith(w)] for w in ("right ", "WRONG ")
    )
    rows = {m[1]: [float(n) for n in m.groups()[1:]] for m in map(ROW.fullmatch, lines) if m}
    return done.returncode, right, wrong, rows, lines[-1]


def test_all_launchers_are_right():
    code, right, wrong, rows, last = run(build.SOURCES)
    assert (code, wrong, last) == (0, [], "all are right")
    headers = [f.with_suffix(".cuh").read_text() for f in build.SOURCES.glob("cuda/*.cu")]
    launchers = {
        name for header in headers for name in re.findall(r"^cudaError_t (\w+)\(", header, re.M)
    } - {"widest_cholesky", "score_topk_parts"}  # which launch nothing
    assert {re.match(r"\w+", name)[0] for name in right} == launchers
    for way in (
        "direct",
        "staged, passes: 1",
        "staged, passes: 2",
        "channels last",
        "chunks apart",
        "parts: 1",
        "parts: 2",
    ):
        assert any(name.endswith(way) for name in right), way
    assert list(rows) == right
    for median, least, most, read, ratio in rows.values():
        assert 0 < least <= median <= most and ratio == pytest.approx(median / read, abs=0.01)


def test_a_fault_ends_it_with_1(tmp_path):
    code, right, wrong, rows, last = run(build.planted(tmp_path, *FAULTS["sampled_outer"]))
    assert code == 1 and last == "NOT all are right" and len(rows) == len(right + wrong)
    assert all("staged" in name and " entries are wrong, " in name for name in wrong)
    assert len(wrong) == 2 and not any("staged" in name for name in right)
