"""`make gpu`, rehearsed on the CPU: what it writes and merges, and that failures end nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu import outer, processes, ratios, report, rest, run, suite
from gpu.ratios import Case, Contestant, Setup, Target
from gpu.results import Deadline, Results, default_path, environment
from gpu.timing import Bench, ceilings
from places import ROOT

import dropinf

pytestmark = pytest.mark.more


def make_gpu(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "gpu.run", *arguments],
        capture_output=True,
        text=True,
        env=environment(rehearsal=True),
    )


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The JSON after bench and model, and what they printed."""
    path = tmp_path_factory.mktemp("gpu") / "rehearsal.json"
    printed = ""
    for part in ("bench", "model"):
        done = make_gpu(part, "--rehearse", "--out", str(path))
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    return json.loads(path.read_text()), printed, path


def test_nobody_takes_a_rehearsal_for_results(rehearsed):
    data, printed, _ = rehearsed
    assert data["rehearsal"] is True and data["device"]["type"] == "cpu"
    assert printed.count("a rehearsal on the CPU") == 2
    assert "needs --out" in make_gpu("bench", "--rehearse").stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = make_gpu("bench")
    assert done.returncode == 2 and "torch finds no GPU" in done.stderr


def test_structure(rehearsed):
    data = rehearsed[0]
    assert set(data["versions"]) == {"python", "cuda", "torch", "triton", "numpy"}
    assert data["versions"]["torch"] == torch.__version__
    assert set(data["backends"]) == set(dropinf.backends())
    for part in ("bench", "model"):
        entry = data["parts"][part]
        assert entry["start"] <= entry["end"] and entry["commit"] and entry["seconds"] > 0
        names = [case.name for case in run.cases_of(part, quick=False)[0]]
        assert len(set(names)) == len(names) and entry["done"] == names
    assert all(data["ceilings"][k] > 0 for k in ("copy_gb_per_s", "bf16_matmul_tflop_per_s"))
    timed = [row for row in data["rows"] if row["mode"]]
    assert not [row for row in data["rows"] if row.get("reason")]
    for row in timed:
        assert 0 < row["us"]["min"] <= row["us"]["median"] <= row["us"]["max"]
        if "num_bytes" in row:
            rate = row["num_bytes"] / row["us"]["median"] / 1e3
            assert row["gb_per_s"] == pytest.approx(rate)
            assert row["share_of_copy"] == pytest.approx(rate / data["ceilings"]["copy_gb_per_s"])
    ours = {row["case"] for row in timed if row["ours"]}
    here = {row["case"] for row in timed}
    assert here - ours <= {rest.TOPK, *rest.MERGES, rest.NORM}  # which have no kernel for the CPU
    assert all(row["tokens_per_s"] > 0 for row in timed if row["part"] == "model")


# (start of the target's name, its limit): the column for the H200 of the speeds to reach.
TO_REACH = [
    ("sampled_outer, r=64", 0.5),
    ("sampled_outer, r=1024", 1.25),
    ("sampled_outer, r=8192", 1.25),
    ("sampled_outer, r=65536: ≤", 2.2),
    ("sampled_outer, r=65536: ≥", 5),
    ("sampled_outer, scratch", 0.5),
    *[
        (f"{model}, r={r}: {sense}", limit)
        for model in ("Pythia-1.4B", "Pythia-6.9B")
        for r in (64, 1024, 8192)
        for sense, limit in (("≤", 1.05), ("≥", 1.3))
    ],
    ("gather_grads, r=1024: one launch", 1),
    ("gather_grads, r=1024: ≤ 12 µs", 12),
    ("gather_grads, r=1024: ≥", 50),
    *[
        (f"cholesky{solve}, r={r}: ≥", limit)
        for solve in ("", " and solve")
        for r, limit in ((64, 5), (128, 4), (256, 3), (512, 2), (1024, 1.3))
    ],
    ("cholesky, ragged", 10),
    ("cholesky and solve, ragged", 10),
    *[(f"cholesky, r={r}: residual", 2) for r in (64, 128, 256, 512, 1024)],
    ("scores", 0.9),
]


def test_every_target_has_a_row(rehearsed):
    rows = rehearsed[0]["targets"]
    for name, limit in TO_REACH:
        found = [row for row in rows if row["target"].startswith(name)]
        assert len(found) == 1, name
        (row,) = found
        assert (row["at_most"] if row["at_least"] is None else row["at_least"]) == limit
        assert (row["measured"] is None) == (row["met"] is None) == bool(row.get("reason"))
        if row["measured"]:
            median = row["measured"]["median"]
            assert row["met"] == (median <= limit if row["at_least"] is None else median >= limit)
    assert len(rows) == len(TO_REACH)


def test_figure(rehearsed):
    pytest.importorskip("matplotlib")
    path = rehearsed[2]
    for part in ("bench", "model"):
        drawn = path.with_name(f"rehearsal-{part}.svg").read_text()
        assert drawn.startswith("<?xml") and "REHEARSAL" in drawn


def test_no_figure_without_matplotlib(rehearsed, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.draw(Results(rehearsed[2], True), "bench") is None
    assert "matplotlib is not installed" in capsys.readouterr().out


def test_parts_merge(tmp_path):
    path = tmp_path / "new" / "r.json"
    results = Results(path, True)
    for part in ("bench", "model"):
        results.begin(part)
        results.add("rows", part, case="a", contestant="b", mode=None, reason="c")
        results.leave_out(part, "d", "e")
        results.end(part, 1.0)
    again = Results(path, True)
    again.begin("bench")
    assert [row["part"] for row in again.data["rows"]] == ["model"]
    assert [entry["part"] for entry in again.data["left_out"]] == ["model"]
    assert again.data["parts"]["bench"]["end"] is None
    assert again.data["parts"]["model"]["end"] and json.loads(path.read_text()) == again.data
    again.data["device"] = {"type": "cuda", "name": "another"}
    again.save()
    with pytest.raises(SystemExit, match="another"):
        Results(path, True)


def started(path, part="bench"):
    results = Results(path, True)
    results.begin(part)
    results.data["ceilings"] = {"copy_gb_per_s": 10.0}
    return results


TARGET = Target("ours: ≤ 1e9x slow", "odd", ("slow",), at_most=1e9)
MISSED = Target("ours: ≥ 1e9x gone", "odd", ("out of memory",), at_least=1e9)


def odd_contestants(bench):
    """A good one of ours among others that fail, each in its own way."""
    x = torch.ones(100)

    def out_of_memory(i):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def hangs(i):
        time.sleep(30)

    return Setup(
        {
            "good": Contestant(lambda i: x + 1, lambda out: 0.0, ours=True, num_bytes=800),
            "out of memory": Contestant(out_of_memory),
            "wrong": Contestant(lambda i: x, lambda out: 0.5),
            "NaN": Contestant(lambda i: x, lambda out: float("nan")),
            "hangs": Contestant(hangs),
            "raises": Contestant(lambda i: 1 / 0),
            "slow": Contestant(lambda i: [x + j for j in range(30)]),
        }
    )


def broken_inputs(bench):
    raise ValueError("no such inputs")


ODD = [Case("broken", broken_inputs, "g"), Case("odd", odd_contestants, "g")]


def test_failures_are_recorded_and_end_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ratios, "LIMIT", 0.3)
    results = started(tmp_path / "r.json")
    ratios.run_cases(results, Bench(True), "bench", ODD, [TARGET, MISSED], {"g": 60.0})
    ratios.judge_the_rest(results, "bench", [TARGET, MISSED, Target("x", "nowhere", at_most=1)])
    data = json.loads((tmp_path / "r.json").read_text())
    rows = {row["contestant"]: row for row in data["rows"]}
    assert rows["good"]["mode"] == rows["slow"]["mode"] == "eager"
    assert rows["slow"]["over_ours"]["median"] > 1
    assert "no CUDA graphs" in rows["good"]["no_graph"]
    for name, reason in {
        "out of memory": "out of memory",
        "wrong": "relative error 0.5",
        "NaN": "relative error nan",
        "hangs": "TimeoutError: took more than 0 s",
        "raises": "ZeroDivisionError",
    }.items():
        assert rows[name]["mode"] is None and reason in rows[name]["reason"]
    assert [(e["what"], e["reason"]) for e in data["left_out"]] == [
        ("broken", "ValueError: no such inputs")
    ]
    met, missed, nowhere = data["targets"]
    assert met["met"] is True and met["measured"]["median"] < 1
    assert missed["met"] is None and "did not run" in missed["reason"]
    assert nowhere["reason"] == "its case was not run"
    assert data["parts"]["bench"]["done"] == ["broken", "odd"]


def test_a_lost_device_is_left_to_the_next_process(tmp_path, monkeypatch):
    monkeypatch.setattr(ratios, "LIMIT", 0.3)
    results = started(tmp_path / "r.json")
    bench = Bench(True)
    bench.healthy, bench.graph = lambda: False, bench.eager
    with pytest.raises(ratios.Poisoned, match="out of memory"):
        ratios.run_cases(results, bench, "bench", ODD[1:], [], {"g": 60.0})
    again = Results(tmp_path / "r.json", True)
    assert [row["contestant"] for row in again.data["rows"]] == ["out of memory"]
    ratios.run_cases(again, Bench(True), "bench", ODD[1:], [], {"g": 60.0})
    names = [row["contestant"] for row in again.data["rows"]]
    assert names.count("out of memory") == 1 and names.count("good") == 1


def test_file_of_a_gpu(tmp_path, monkeypatch):
    properties = SimpleNamespace(
        name="NVIDIA H200", total_memory=150, multi_processor_count=132, L2_cache_size=50
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 (a test)")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    today = time.strftime("%Y-%m-%d")
    assert default_path() == ROOT / f"bench/results/nvidia-h200-a-test-{today}.json"
    data = Results(tmp_path / "r.json", rehearsal=False).data
    assert data["rehearsal"] is False
    assert data["device"]["type"] == "cuda" and data["device"]["capability"] == [9, 0]


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, last):
        return 1e3 * (last.at - self.at)


class Graph:
    replays = 0

    def replay(self):
        Graph.replays += 1


@contextmanager
def captured(graph):
    yield


def test_lines_for_a_gpu(tmp_path, monkeypatch):
    """With stubs for CUDA's events, graphs and memory, so that the lines that use them run."""
    cuda = torch.cuda
    numbers = iter(range(10**9))
    stubs = {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": captured,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: next(numbers),
        "max_memory_allocated": lambda: next(numbers),
        "get_device_properties": lambda index: SimpleNamespace(L2_cache_size=1 << 16),
    }
    for name, stub in stubs.items():
        assert hasattr(cuda, name)
        monkeypatch.setattr(cuda, name, stub)
    results, bench = started(tmp_path / "r.json"), Bench(True)
    bench.cuda = True
    assert set(ceilings(bench)) == {
        "copy_gb_per_s",
        "bf16_matmul_tflop_per_s",
        "launch_us",
        "launch_in_graph_us",
    }
    cases, targets = run.cases_of("bench", quick=False)
    chosen = [
        case for case in cases if case.name in ("gram, r=64", "sampled_outer, bfloat16, r=8192")
    ]
    budgets = dict.fromkeys(run.SHARES["bench"], 100.0)
    ratios.run_cases(results, bench, "bench", chosen, targets, budgets)
    timed = [row for row in results.data["rows"] if row["mode"]]
    assert not [e for e in results.data["left_out"] if "ordered" not in e["what"]]
    assert {row["mode"] for row in timed} == {"eager", "graph"} and Graph.replays
    assert all(row["peak_bytes"] == 1 for row in timed)
    modes = {t["target"]: t["mode"] for t in results.data["targets"] if t["measured"]}
    assert len(modes) == 2 and None in modes.values()  # the scratch has no mode


def test_budget_of_a_group(tmp_path):
    results = started(tmp_path / "r.json")
    ratios.run_cases(results, Bench(True), "bench", ODD, [], {"g": 0.0})
    assert [e["what"] for e in results.data["left_out"]] == ["broken", "odd"]
    assert "0 s of g are spent" in results.data["left_out"][0]["reason"]


WORKER = """
import json, os, signal, sys
path = sys.argv[1]
data = json.load(open(path))
done = data["parts"]["bench"].setdefault("done", [])
data["parts"]["bench"]["current"] = None if "first" in done else "first"
json.dump(data, open(path, "w"))
if "first" not in done:
    os.kill(os.getpid(), signal.SIGSEGV)
"""


def test_a_worker_that_dies_is_replaced(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    results = started(path)
    start, commands = processes.start, []

    def stub(command, environment):
        commands.append(command)
        return start([sys.executable, "-c", WORKER, str(path)], environment)

    monkeypatch.setattr(processes, "start", stub)
    run.supervise(results, "bench", 60.0, quick=False)
    assert len(commands) == 2
    assert commands[0][-5:] == ["--out", str(path), "--seconds", "60.0", "--rehearse"]
    left_out = {e["what"]: e["reason"] for e in results.data["left_out"]}
    assert left_out["first"] == f"its process ended with {-signal.SIGSEGV}"
    assert {case.name for case in run.cases_of("bench", quick=False)[0]} <= set(left_out)
    assert all(t["reason"] for t in results.data["targets"])


def test_a_worker_that_hangs_is_killed(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    started(path)
    for deadline, stuck, reason in ((0.3, 60.0, "time was over"), (60.0, 0.3, "silent for")):
        monkeypatch.setattr(run, "STUCK", stuck)
        process = processes.start(["sleep", "60"], dict(os.environ))
        assert reason in run.watched(process, path, Deadline(deadline))
        assert process.returncode == -signal.SIGKILL


def test_part_test(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "REHEARSED_FILES", ["test_gather_grads"])
    results = started(tmp_path / "r.json", "test")
    suite.run_tests(results, 200.0)
    verified = results.data["verified"]
    of_ops = ["cuda-host/gather_grads", "reference/gather_grads", "reference/sampled_outer"]
    for of in (*of_ops, "default/gpu_capturing", "default/gpu_rows", "default/gpu_tools"):
        counts = verified[of]
        assert counts["passed"] > 0 and counts["failed"] == 0 and counts["complete"], of
    assert not any(of.startswith("cpu") for of in verified)
    report.print_part(results, "test")


def test_what_has_not_run_is_not_complete(tmp_path):
    results = started(tmp_path / "r.json", "test")
    lines = [{"of": of, "outcome": "passed"} for of in ("cuda/gram", "triton/gram", "gpu")]

    def complete(*missing):
        suite.record(results, lines, set(missing))
        return {of for of, counts in results.data["verified"].items() if counts["complete"]}

    assert complete() == {"cuda/gram", "triton/gram", "gpu"}
    assert complete(("test_gram", "cuda")) == {"triton/gram", "gpu"}
    assert complete(("test_gpu", "triton")) == {"cuda/gram"}
    assert complete(("test_sampled_outer", "cuda")) == {"cuda/gram", "triton/gram", "gpu"}


def test_part_test_out_of_time(tmp_path, monkeypatch):
    """What was running and what never started is named, and nothing of it counts as complete."""
    monkeypatch.setattr(suite, "at_once", lambda: 2)
    results = started(tmp_path / "r.json", "test")
    suite.run_tests(results, 1.0)
    reasons = [entry["reason"] for entry in results.of("left_out", "test")]
    assert len(reasons) == 9
    assert sum("its time was over" in r for r in reasons) == 2
    assert sum("the 1 s are spent" in r for r in reasons) == 7
    assert not processes._running


FAKE = """#!/bin/sh
while [ "$1" != "{python}" ]; do shift; done
{command}
"""


@pytest.mark.parametrize("found", [0, 3])
def test_part_sanitize(tmp_path, monkeypatch, found):
    """With a program that runs what it is given, or finds errors."""
    monkeypatch.setattr(suite, "TOOLS", ["memcheck"])
    monkeypatch.setattr(suite, "REHEARSED_FILES", ["test_gather_grads"])
    command = "echo '========= ERROR SUMMARY: 3 errors'; exit 99"
    if not found:
        command = '"$@"; code=$?; echo "========= ERROR SUMMARY: 0 errors"; exit $code'
    program = tmp_path / "compute-sanitizer"
    program.write_text(FAKE.format(python=sys.executable, command=command))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    results = started(tmp_path / "r.json", "sanitize")
    suite.sanitize(results, 200.0, quick=False)
    entry = results.data["sanitizers"]["memcheck"]
    assert entry["errors"] == found, entry["output"]
    if found:
        assert entry["state"] == "errors" and entry["exit_code"] == 99
    else:
        assert entry["state"] == "clean" and entry["outcomes"].get("passed"), entry


def test_sanitizer_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    results = started(tmp_path / "r.json", "sanitize")
    suite.sanitize(results, 10.0, quick=False)
    assert {s["state"] for s in results.data["sanitizers"].values()} == {"missing"}
    assert set(results.data["sanitizers"]) == {"memcheck", "racecheck", "synccheck", "initcheck"}


QUICK = {
    "bench": {
        *(f"gather_grads, {L} layers, r=1024" for L in (200, 24)),
        *(f"sampled_outer, bfloat16, r={r}" for r in (64, 1024, 8192, 65536)),
        *(f"sampled_outer, bfloat16, r=8192, I={I}, O={O}" for I, O in outer.WIDE),
        *(f"damped_cholesky, r={r}" for r in (64, 128, 256, 512, 1024, "8 to 512")),
        *(f"damped_cholesky, r={r}, and solve" for r in (64, 128, 256, 512, 1024, "8 to 512")),
        *(f"gram, r={r}" for r in (64, 256, 1024)),
        rest.TOPK,
        *rest.MERGES,
        "sampled_embedding, V=50304, O=4096, r=8192",
        rest.NORM,
        "sampled_conv, 128 to 128 channels of 28 x 28, 3 x 3, r=1024",
    },
    "model": {"Pythia-1.4B, r=1024", "Pythia-6.9B, r=8192"},
}


@pytest.mark.parametrize("part", QUICK)
def test_quick_choice(part):
    assert {case.name for case in run.cases_of(part, quick=True)[0]} == QUICK[part]
    assert sum(run.SHARES[part].values()) == pytest.approx(1)


def test_quick_contestants():
    """No `reference`, and torch.compile only where it can win."""
    compiled = set()
    for case in run.cases_of("bench", quick=True)[0]:
        setup = case.make(Bench(True, quick=True))
        compiled |= {case.name for name in setup.contestants if "compile" in name}
    assert compiled == {f"sampled_outer, bfloat16, r={r}" for r in (1024, 8192)}


def test_a_part_that_fails_loses_no_other(tmp_path, monkeypatch):
    """What it raises is recorded as why it was left out; the next part runs."""
    path = tmp_path / "r.json"

    def fails(*arguments):
        raise OSError("no space")

    monkeypatch.setattr(suite, "run_tests", fails)

    def works(results, part, seconds, quick):
        results.add("rows", part, case="x", mode=None)

    monkeypatch.setattr(run, "supervise", works)
    monkeypatch.setattr(sys, "argv", ["run", "--quick", "--rehearse", "--out", str(path)])
    assert run.main() == 0
    data = json.loads(path.read_text())
    assert [(e["part"], e["reason"]) for e in data["left_out"]] == [("test", "OSError: no space")]
    assert [row["part"] for row in data["rows"]] == ["bench", "model"]
    assert all(data["parts"][part]["quick"] for part in ("test", "bench", "model"))
    assert "sanitize" not in data["parts"]


def processes_with(text):
    """Command lines of running processes that have `text` in them."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if text in line:
                found.append(line)
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_no_process(tmp_path, number):
    """And the file has what was measured until then, and why there is no more."""
    path = tmp_path / "r.json"
    command = [sys.executable, "-m", "gpu.run", "bench", "--rehearse", "--out", str(path)]
    process = subprocess.Popen(command, env=environment(True), stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (path.exists() and json.loads(path.read_text())["rows"]):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    assert len(processes_with(str(path))) == 2
    process.send_signal(number)
    process.wait(20)
    until = time.monotonic() + 10  # which a loaded machine takes to end what was killed
    while processes_with(str(path)):
        assert time.monotonic() < until
        time.sleep(0.05)
    data = json.loads(path.read_text())
    assert data["rows"]
    if number == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert {"part": "bench", "what": "bench", "reason": "ended by SIGTERM"} in data["left_out"]
        assert data["parts"]["bench"]["end"]


def test_a_run_has_a_limit_of_its_own():
    started = time.monotonic()
    with pytest.raises(processes.Ended) as ended, processes.all_end_within(0.3):
        child = processes.start(["sh", "-c", "sleep 60.5 & sleep 60.5"], dict(os.environ))
        time.sleep(30)
    assert ended.value.reason == "its time was over" and time.monotonic() - started < 10
    assert child.returncode == -signal.SIGKILL
    until = time.monotonic() + 10  # which a loaded machine takes to end what was killed
    while processes_with("60.5"):
        assert time.monotonic() < until
        time.sleep(0.05)
