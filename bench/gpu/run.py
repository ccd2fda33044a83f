"""python -m gpu.run [test|sanitize|bench|model]: what `make gpu` runs, once the kernels are built.

Without a part, all of them in this order. Each ends within 9 minutes and replaces what it wrote
before. --rehearse runs everything on the CPU in tiny sizes, to test this folder itself.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from gpu import inverse, outer, ratios, report, rest, suite, whole_model
from gpu.results import ROOT, Deadline, Results, default_path, environment
from gpu.timing import Bench, ceilings

PARTS = ("test", "sanitize", "bench", "model")
SECONDS = {"test": 520.0, "sanitize": 520.0, "bench": 500.0, "model": 500.0}
STUCK = 120.0  # seconds in which a worker writes nothing; a contestant has 60, and 60 to be timed
POISONED = 3  # exit code of a worker whose device computes no more
# Seconds of the groups of cases. Together less than the part has.
BUDGETS = {
    "bench": {
        outer.GROUP: 220.0,
        rest.GATHER: 45.0,
        inverse.GROUP: 120.0,
        rest.SCORES: 30.0,
        rest.OTHERS: 30.0,
    },
    "model": {"Pythia-1.4B": 180.0, "Pythia-6.9B": 270.0},
}


def cases_of(part: str) -> tuple[list[ratios.Case], list[ratios.Target]]:
    if part == "model":
        return whole_model.cases(), whole_model.TARGETS
    made = [case for module in (outer, rest, inverse) for case in module.cases()]
    return made, [t for module in (outer, rest, inverse) for t in module.TARGETS]


def worker(results: Results, part: str) -> int:
    """The cases that are not done, in this process."""
    torch.manual_seed(0)
    bench = Bench(results.data["rehearsal"])
    if bench.rehearsal:
        torch.set_num_threads(1)  # threads that wait for each other on busy cores say nothing
    if part == "bench" and not results.data["ceilings"]:
        results.data["ceilings"] = ceilings(bench)
        bench.forget()
        results.save()
    try:
        ratios.run_cases(results, bench, part, *cases_of(part), BUDGETS[part])
    except ratios.Poisoned as error:
        print(f"the device is lost to this process: {error}", file=sys.stderr)
        return POISONED
    return 0


def supervise(results: Results, part: str, seconds: float) -> None:
    """Workers, one after the other, until every case is done or time is over."""
    if part == "bench":
        results.data["ceilings"] = {}
        results.save()
    deadline = Deadline(seconds)
    rehearsal = results.data["rehearsal"]
    command = [sys.executable, "-m", "gpu.run", part, "--worker", "--out", str(results.path)]
    command += ["--rehearse"] if rehearsal else []
    while deadline.left() > 0:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(rehearsal), start_new_session=True
        )
        reason = watched(process, results.path, deadline)
        results.reload()
        state = results.data["parts"][part]
        if reason is None and process.returncode == 0:
            break
        if process.returncode == POISONED:
            continue
        current = state.get("current")
        reason = reason or f"its process ended with {process.returncode}"
        results.leave_out(part, current or part, reason)
        if current is None:
            break
        state.setdefault("done", []).append(current)
        results.save()
    state = results.data["parts"][part]
    left_out = {entry["what"] for entry in results.of("left_out", part)}
    for case in cases_of(part)[0]:
        if case.name not in state.get("done", []) and case.name not in left_out:
            results.leave_out(part, case.name, f"the {seconds:.0f} s of the part are spent")
    ratios.judge_the_rest(results, part, cases_of(part)[1])


def watched(process: subprocess.Popen, path: Path, deadline: Deadline) -> str | None:
    """Wait for a worker; why it was killed, or None."""
    started = time.time()
    while True:
        try:
            process.wait(0.2)
            return None
        except subprocess.TimeoutExpired:
            silent = time.time() - max(started, path.stat().st_mtime)
            if deadline.left() > 0 and silent < STUCK:
                continue
        reason = (
            "the part's time was over" if deadline.left() <= 0 else f"silent for {silent:.0f} s"
        )
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return reason


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu.run", description=__doc__)
    parser.add_argument("part", nargs="?", choices=PARTS, help="all of them in order, if left out")
    parser.add_argument("--out", type=Path, help="the JSON file, instead of one in bench/results")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rehearse and arguments.out is None:
        parser.error("--rehearse needs --out, so that nobody takes it for results of a GPU")
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --rehearse --out FILE runs it on the CPU in tiny sizes")
    results = Results(arguments.out or default_path(), arguments.rehearse)
    if arguments.worker:
        return worker(results, arguments.part)
    for part in [arguments.part] if arguments.part else PARTS:
        start = time.monotonic()
        results.begin(part)
        if part == "test":
            suite.run_tests(results, SECONDS[part])
        elif part == "sanitize":
            suite.sanitize(results, SECONDS[part])
        else:
            supervise(results, part, SECONDS[part])
            report.draw(results, part)
        results.end(part, time.monotonic() - start)
        report.print_part(results, part)
    print(f"\n{results.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
