"""python -m gpu.run [test|sanitize|bench|model]: what `make gpu` runs, once the kernels are built.

Without a part, all of them in this order; with --quick, the choice for a few minutes on a GPU.
Each part ends within its seconds and replaces what it wrote before; the file is written after
every measurement. --rehearse runs everything on the CPU in tiny sizes, to test this folder itself.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

from gpu import inverse, outer, processes, ratios, report, rest, suite, whole_model
from gpu.results import Deadline, Results, default_path, environment
from gpu.timing import Bench, ceilings

# Seconds of each part. On a borrowed GPU a run has ten minutes, the build and the start included.
SECONDS = {"test": 520.0, "sanitize": 520.0, "bench": 500.0, "model": 500.0}
QUICK_SECONDS = {"test": 170.0, "bench": 220.0, "model": 120.0}
QUICK_SANITIZE = 240.0  # a run of its own
STUCK = 120.0  # seconds in which a worker writes nothing; a contestant has 60, and 60 to be timed
POISONED = 3  # exit code of a worker whose device computes no more
# How the groups of cases share the seconds of their part.
SHARES = {
    "bench": {
        rest.GATHER: 0.08,
        outer.GROUP: 0.44,
        inverse.GROUP: 0.28,
        rest.SCORES: 0.08,
        rest.OTHERS: 0.12,
    },
    "model": {"Pythia-1.4B": 0.4, "Pythia-6.9B": 0.6},
}


def cases_of(part: str, quick: bool) -> tuple[list[ratios.Case], list[ratios.Target]]:
    """All cases, or those of the quick choice, and the targets of all."""
    modules = (whole_model,) if part == "model" else (outer, rest, inverse)
    cases = [case for module in modules for case in module.cases() if case.quick or not quick]
    groups = list(SHARES[part])
    cases.sort(key=lambda case: groups.index(case.group))
    return cases, [target for module in modules for target in module.TARGETS]


def worker(results: Results, part: str, seconds: float, quick: bool) -> int:
    """The cases that are not done, in this process."""
    torch.manual_seed(0)
    bench = Bench(results.data["rehearsal"], quick)
    if bench.rehearsal:
        torch.set_num_threads(1)  # threads that wait for each other on busy cores say nothing
    if part == "bench" and not results.data["ceilings"]:
        results.data["ceilings"] = ceilings(bench)
        bench.forget()
        results.save()
    budgets = {group: share * seconds for group, share in SHARES[part].items()}
    try:
        ratios.run_cases(results, bench, part, *cases_of(part, quick), budgets)
    except ratios.Poisoned as error:
        print(f"the device is lost to this process: {error}", file=sys.stderr)
        return POISONED
    return 0


def supervise(results: Results, part: str, seconds: float, quick: bool) -> None:
    """Workers, one after the other, until every case is done or time is over."""
    if part == "bench":
        results.data["ceilings"] = {}
        results.save()
    deadline = Deadline(seconds)
    rehearsal = results.data["rehearsal"]
    command = [sys.executable, "-m", "gpu.run", part, "--worker", "--out", str(results.path)]
    command += ["--seconds", str(seconds)]
    command += ["--rehearse"] if rehearsal else []
    command += ["--quick"] if quick else []
    while deadline.left() > 0:
        process = processes.start(command, environment(rehearsal))
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
    cases, targets = cases_of(part, quick)
    for case in cases:
        if case.name not in state.get("done", []) and case.name not in left_out:
            results.leave_out(part, case.name, f"the {seconds:.0f} s of the part are spent")
    ratios.judge_the_rest(results, part, targets)


def watched(process: subprocess.Popen, path: Path, deadline: Deadline) -> str | None:
    """Wait for a worker; why it was killed, or None."""
    started, reason = time.time(), None
    while process.poll() is None and reason is None:
        time.sleep(0.1)
        silent = time.time() - max(started, path.stat().st_mtime)
        if deadline.left() <= 0:
            reason = "the part's time was over"
        elif silent >= STUCK:
            reason = f"silent for {silent:.0f} s"
    processes.end(process)
    return reason


def run_part(results: Results, part: str, seconds: float, quick: bool) -> None:
    """Whatever happens in it is recorded, and ends no other part; but Ended ends all."""
    start = time.monotonic()
    results.begin(part, quick)
    try:
        if part == "test":
            suite.run_tests(results, seconds)
        elif part == "sanitize":
            suite.sanitize(results, seconds, quick)
        else:
            supervise(results, part, seconds, quick)
            report.draw(results, part)
    except processes.Ended as ended:
        results.reload()  # a worker may have written since
        results.leave_out(part, part, ended.reason)
        raise
    except Exception as error:
        traceback.print_exc()
        results.reload()
        results.leave_out(part, part, ratios.reason_of(error))
    finally:
        results.end(part, time.monotonic() - start)
        report.print_part(results, part)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu.run", description=__doc__)
    parser.add_argument("part", nargs="?", choices=list(SECONDS), help="if left out, all in order")
    parser.add_argument("--out", type=Path, help="the JSON file, instead of one in bench/results")
    parser.add_argument("--seconds", type=float, help="of the part, or of each where all are run")
    parser.add_argument("--within", type=float, help="seconds of all parts; the last get less")
    parser.add_argument(
        "--quick", action="store_true", help="the cases that say most; no sanitizer unless named"
    )
    parser.add_argument("--commit", help="what is measured, where this is no checkout of git")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rehearse and arguments.out is None:
        parser.error("--rehearse needs --out, so that nobody takes it for results of a GPU")
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --rehearse --out FILE runs it on the CPU in tiny sizes")
    results = Results(arguments.out or default_path(), arguments.rehearse, arguments.commit)
    if arguments.worker:
        return worker(results, arguments.part, arguments.seconds, arguments.quick)
    seconds = SECONDS
    if arguments.quick:
        seconds = QUICK_SECONDS
        if arguments.part == "sanitize":
            seconds = {"sanitize": QUICK_SANITIZE}
    parts = [arguments.part] if arguments.part else list(seconds)
    if arguments.seconds is not None:
        seconds = dict.fromkeys(parts, arguments.seconds)
    # Every part keeps its own time; the limit of all is for one that does not.
    slack = 20.0 * len(parts)
    limit = Deadline(arguments.within or sum(seconds[part] for part in parts) + slack)
    with processes.all_end_within(limit.left()):
        for part in parts:
            left = min(seconds[part], limit.left() - 5.0)  # to write down what was left out
            run_part(results, part, left, arguments.quick)
    print(f"\n{results.path}")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # targets have signs that ASCII lacks
    sys.exit(main())
