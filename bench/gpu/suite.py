"""The tests on GPU backends, as they are and under compute-sanitizer."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from gpu import processes
from gpu.results import ROOT, Deadline, Results, environment

# The longest first.
OP_TESTS = [
    "test_sampled_conv",
    "test_sampled_outer",
    "test_sampled_embedding",
    "test_damped_cholesky",
    "test_gram",
    "test_gather_grads",
    "test_cholesky_solve",
    "test_score_topk",
]
GPU_TEST = "test_gpu"  # has some tests of every op
BACKENDS = ["cuda", "triton"]
# Paths of users, with the kernels that are taken by default, and with all of a backend.
PATH_TESTS = {
    "test_gpu_capturing": ["default", "cuda", "triton"],
    "test_gpu_rows": ["default", "cuda", "triton"],
    "test_gpu_tools": ["default", "cuda"],
}
TOOLS = ["memcheck", "racecheck", "synccheck", "initcheck"]
# Some cases of every op, for tools that slow a kernel down a hundredfold.
FEW = "same_bits or each_layer_has_its_own_shift or accumulate or many_layers or agrees"
QUICK_TOOLS = ["memcheck", "racecheck"]
STAGED = "agrees and staged"  # the kernel with most to go wrong: copies, barriers, buffers
# In a rehearsal these stand for the kernels on a GPU, and few tests for all.
REHEARSED = ["cuda-host", "reference"]
REHEARSED_FILES = ["test_gather_grads", "test_gram"]
REHEARSED_TESTS = "empty or many_layers"
REHEARSED_PATHS = "checkpointing or after_a_fork or out_of_memory or job"


def files_of(names: list[str]) -> dict[str, str]:
    """Name -> path in the checkout, of those that are there."""
    found = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    return {name: str(found[name].relative_to(ROOT)) for name in names if name in found}


class PytestRun:
    """Tests of one backend in a process of their own, since a broken kernel ends one."""

    def __init__(
        self, rehearsal: bool, backend: str, arguments: list[str], wrapper: list[str] | None = None
    ) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.outcomes = Path(self.folder.name) / "outcomes.jsonl"
        self.printed = Path(self.folder.name) / "printed.txt"
        made = environment(rehearsal, DROPINF_BACKENDS=backend, DROPINF_OUTCOMES=str(self.outcomes))
        if wrapper:  # any value switches it on
            made["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        options = ["-q", "-m", "", "-p", "gpu.outcomes", "-p", "no:cacheprovider", "--tb=short"]
        command = [*(wrapper or []), sys.executable, "-m", "pytest", *options, *arguments]
        with self.printed.open("w") as output:
            self.process = processes.start(command, made, output)

    def finished(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> tuple[int | None, list[dict], str]:
        """The exit code, None if it had not finished; the outcomes; what was printed."""
        code = self.process.poll()
        processes.end(self.process)
        with self.folder:
            lines = self.outcomes.read_text().splitlines() if self.outcomes.exists() else []
            printed = self.printed.read_text(errors="replace")
        return code, [json.loads(line) for line in lines if line.endswith("}")], printed


def at_once() -> int:
    """Most of a process is imports, compilations and truths on the CPU; a GPU is shared."""
    return min(8, max(2, (os.cpu_count() or 1) // 2))


def run_tests(results: Results, seconds: float) -> None:
    """Files and backends side by side; what has finished is written at once."""
    deadline = Deadline(seconds)
    rehearsal = results.data["rehearsal"]
    files = files_of([*(REHEARSED_FILES if rehearsal else OP_TESTS), GPU_TEST])
    backends = REHEARSED if rehearsal else BACKENDS
    waiting = [(name, backend) for name in files for backend in backends]
    paths = files_of(list(PATH_TESTS))
    waiting += [(name, at) for name in paths for at in PATH_TESTS[name][: 1 if rehearsal else None]]
    files |= paths
    needed = set(waiting)
    running: dict[tuple[str, str], PytestRun] = {}
    complete: set[tuple[str, str]] = set()
    outcomes: list[dict] = []
    while waiting or running:
        while waiting and len(running) < at_once() and deadline.left() > 0:
            job = waiting.pop(0)
            few = REHEARSED_PATHS if job[0] in paths else REHEARSED_TESTS
            options = ["-k", few] if rehearsal else []
            running[job] = PytestRun(rehearsal, job[1], [files[job[0]], *options])
        time.sleep(0.05)
        over = deadline.left() <= 0
        for job in [job for job, run in running.items() if over or run.finished()]:
            code, lines, printed = running.pop(job).end()
            outcomes += lines
            if code in (0, 1, 5):  # all passed, some failed, none was there
                complete.add(job)
            else:
                reason = "its time was over" if code is None else f"pytest ended with {code}"
                results.leave_out("test", " on ".join(job), f"{reason}: {printed[-300:]}")
            record(results, outcomes, needed - complete)
        if over and not running:
            for job in waiting:
                results.leave_out("test", " on ".join(job), f"the {seconds:.0f} s are spent")
            return


def record(results: Results, outcomes: list[dict], missing: set[tuple[str, str]]) -> None:
    """Per backend and op how many tests passed, failed, were skipped; whether all have run."""
    verified = counted(outcomes)
    for of, counts in verified.items():
        backend, _, op = of.rpartition("/")  # no backend: a whole model, which takes all
        counts["complete"] = not any(
            name in (f"test_{op}", GPU_TEST) and backend in ("", at) for name, at in missing
        )
    results.data["verified"] = verified
    failures = [line for line in outcomes if line["outcome"] == "failed"]
    results.data["parts"]["test"]["failures"] = failures[:50]
    results.save()


def counted(lines: list[dict]) -> dict[str, dict]:
    """backend/op -> how many passed, failed, were skipped."""
    counts = Counter((line["of"], line["outcome"]) for line in lines)
    outcomes = ("passed", "failed", "skipped")
    return {of: {o: counts[of, o] for o in outcomes} for of in {line["of"] for line in lines}}


def sanitize(results: Results, seconds: float, quick: bool) -> None:
    """Few and small cases under all tools, side by side: what each printed last, and found."""
    deadline = Deadline(seconds)
    rehearsal = results.data["rehearsal"]
    program = shutil.which("compute-sanitizer")
    tools, names, chosen = TOOLS, [*OP_TESTS, GPU_TEST], FEW
    if quick:
        tools, names, chosen = QUICK_TOOLS, [GPU_TEST], STAGED
    elif rehearsal:
        names = [*REHEARSED_FILES, GPU_TEST]
    backend = "cuda-host" if rehearsal else "cuda"
    running: dict[str, PytestRun] = {}
    for tool in tools:
        if program is None:
            results.data["sanitizers"][tool] = {"state": "missing"}
            results.save()
            continue
        # Only our own kernels; torch's allocator would hide what is beyond a tensor's end.
        wrapper = [program, "--tool", tool, "--target-processes", "all", "--error-exitcode", "99"]
        wrapper += ["--kernel-name", "kns=dropinf"]
        arguments = [*files_of(names).values(), "-x", "-k", chosen]
        running[tool] = PytestRun(rehearsal, backend, arguments, wrapper)
    while running:
        time.sleep(0.05)
        over = deadline.left() <= 0
        for tool in [tool for tool, run in running.items() if over or run.finished()]:
            results.data["sanitizers"][tool] = found_by(*running.pop(tool).end(), chosen)
            results.save()


def found_by(code: int | None, lines: list[dict], printed: str, chosen: str) -> dict:
    """What a tool found in the tests that were chosen."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", printed)
    if code == 99 or any(map(int, found)):
        state = "errors"
    elif code is None:
        state = "time was over"
    elif code == 5 or not lines:
        state = "no test was run"
    else:
        state = "clean" if code == 0 and found else "tests failed"
    return {
        "state": state,
        "exit_code": code,
        "errors": sum(map(int, found)) if found else None,
        "outcomes": dict(Counter(line["outcome"] for line in lines)),
        "cases": chosen,
        "output": printed[-1500:],
    }
