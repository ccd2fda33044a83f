"""The tests on GPU backends, as they are and under compute-sanitizer."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from gpu.results import ROOT, Deadline, Results, environment

OP_TESTS = [
    "test_sampled_outer",
    "test_sampled_embedding",
    "test_sampled_conv",
    "test_gather_grads",
    "test_gram",
    "test_damped_cholesky",
    "test_cholesky_solve",
    "test_score_topk",
]
TOOLS = ["memcheck", "racecheck", "synccheck", "initcheck"]
# Some cases of every op, for tools that slow a kernel down a hundredfold.
FEW = "same_bits or each_layer_has_its_own_shift or accumulate or many_layers"
# In a rehearsal these stand for the kernels on a GPU, and few tests for all.
REHEARSED = "cuda-host,triton,reference"
REHEARSED_FILES = ["test_gather_grads", "test_gram"]
REHEARSED_TESTS = "empty or many_layers"


def existing(names: list[str]) -> list[str]:
    return [f"tests/{n}.py" for n in names if (ROOT / "tests" / f"{n}.py").exists()]


def run_tests(results: Results, seconds: float) -> None:
    """Each file in a process of its own, since a kernel that breaks the device ends one."""
    deadline = Deadline(seconds)
    rehearsal = results.data["rehearsal"]
    failures: list[dict] = []
    verified = results.data["verified"]
    files = existing([*(REHEARSED_FILES if rehearsal else OP_TESTS), "test_gpu"])
    for file in files:
        left = deadline.left()
        if left < 10:
            results.leave_out("test", file, f"the {seconds:.0f} s are spent")
            incomplete(verified, file, [])
            continue
        options = ["-k", REHEARSED_TESTS] if rehearsal else []
        # Half of what is left, so that one slow file does not keep the others from running.
        code, lines, output = pytest(rehearsal, min(left, max(60.0, left / 2)), [file, *options])
        for of, counts in counted(lines).items():
            sums = verified.setdefault(of, {**dict.fromkeys(counts, 0), "complete": True})
            for outcome, number in counts.items():
                sums[outcome] += number
        failures += [line for line in lines if line["outcome"] == "failed"]
        if code not in (0, 1, 5):  # all passed, some failed, none was there
            reason = "its time was over" if code is None else f"pytest ended with {code}"
            results.leave_out("test", file, f"{reason}: {output[-300:]}")
            incomplete(verified, file, lines)
        results.save()
    results.data["parts"]["test"]["failures"] = failures[:50]
    results.save()


def incomplete(verified: dict[str, dict], file: str, lines: list[dict]) -> None:
    """Some tests of these have not run: those of the file's op; test_gpu.py has some of all."""
    op = Path(file).stem.removeprefix("test_")
    seen = {line["of"] for line in lines}
    for of, counts in verified.items():
        if op == "gpu" or of in seen or of.endswith(f"/{op}"):
            counts["complete"] = False


def counted(lines: list[dict]) -> dict[str, dict[str, int]]:
    """(backend, op) -> how many passed, failed, were skipped."""
    counts = Counter((line["of"], line["outcome"]) for line in lines)
    outcomes = ("passed", "failed", "skipped")
    return {of: {o: counts[of, o] for o in outcomes} for of in {line["of"] for line in lines}}


def sanitize(results: Results, seconds: float) -> None:
    """Few and small cases under each tool; what it printed last, and whether it found errors."""
    deadline = Deadline(seconds)
    rehearsal = results.data["rehearsal"]
    program = shutil.which("compute-sanitizer")
    for nth, tool in enumerate(TOOLS):
        if program is None:
            results.data["sanitizers"][tool] = {"state": "missing", "reason": "not on the PATH"}
            results.save()
            continue
        # Only our own kernels; torch's allocator would hide what is beyond a tensor's end.
        wrapper = [program, "--tool", tool, "--target-processes", "all", "--error-exitcode", "99"]
        wrapper += ["--kernel-name", "kns=dropinf"]
        left = deadline.left() / (len(TOOLS) - nth)
        files = existing(REHEARSED_FILES if rehearsal else OP_TESTS)
        backend = "cuda-host" if rehearsal else "cuda"
        chosen = [*files, "-x", "-k", FEW]
        code, lines, output = pytest(rehearsal, left, chosen, wrapper, backend)
        found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
        if code == 99 or any(map(int, found)):
            state = "errors"
        elif code is None:
            state = "time was over"
        elif code == 5 or not lines:
            state = "no test was run"
        else:
            state = "clean" if code == 0 and found else "tests failed"
        results.data["sanitizers"][tool] = {
            "state": state,
            "exit_code": code,
            "errors": sum(map(int, found)) if found else None,
            "outcomes": dict(Counter(line["outcome"] for line in lines)),
            "output": output[-1500:],
        }
        results.save()


def pytest(
    rehearsal: bool,
    seconds: float,
    arguments: list[str],
    wrapper: list[str] | None = None,
    backends: str | None = None,
) -> tuple[int | None, list[dict], str]:
    """The exit code, None if time was over; the outcomes; what was printed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes.jsonl"
        made = environment(
            rehearsal,
            DROPINF_BACKENDS=backends or (REHEARSED if rehearsal else "cuda,triton"),
            DROPINF_OUTCOMES=str(file),
            DROPINF_REHEARSE="1" if rehearsal else "",
            PYTORCH_NO_CUDA_MEMORY_CACHING="1" if wrapper else "",
        )
        if not made["PYTORCH_NO_CUDA_MEMORY_CACHING"]:  # any value switches it on
            del made["PYTORCH_NO_CUDA_MEMORY_CACHING"]
        options = ["-q", "-p", "gpu.outcomes", "-p", "no:cacheprovider", "--tb=short"]
        command = [*(wrapper or []), sys.executable, "-m", "pytest", *options, *arguments]
        code, output = finished(command, seconds, made)
        lines = file.read_text().splitlines() if file.exists() else []
    return code, [json.loads(line) for line in lines], output


def finished(command: list[str], seconds: float, made: dict[str, str]) -> tuple[int | None, str]:
    """Exit code and output of a command, which is killed with its children when time is over."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=made,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        output.seek(0)
        return code, output.read()
