"""Cases with contestants, what they must reach, and the rows that come of them."""

from __future__ import annotations

import signal
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dropinf.ops import dispatch
from gpu.results import Deadline, Results
from gpu.timing import Bench, Loop, spread

LIMIT = 60  # seconds for a contestant to be made, checked and warmed up; compilers take the most


class Poisoned(Exception):
    """The device computes no more in this process; another one goes on."""


@dataclass
class Contestant:
    """A call to time."""

    call: Loop
    error: Callable[[Any], float] | None = None  # of what call(0) gives, from the definition
    tolerance: float = 1e-4  # float32 sums; 2e-2 for sums or products rounded to bfloat16
    ours: bool = False
    num_bytes: int | None = None  # the fewest it must move
    tokens: int | None = None  # that it works through
    graph: bool = True  # whether to try a CUDA graph


@dataclass
class Setup:
    """What a case times, and other figures of it: name -> the figure, None where there is none."""

    contestants: dict[str, Contestant]
    facts: dict[str, Callable[[], float | None]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # contestant -> why


@dataclass(frozen=True)
class Case:
    """`make` allocates the inputs, which go when the case ends."""

    name: str
    make: Callable[[Bench], Setup]
    group: str
    quick: bool = True  # whether the quick choice has it


@dataclass(frozen=True)
class Target:
    """One line of the table of speeds to reach.

    The fastest of ours over the fastest of `over` is `at_most`, or the other way round `at_least`;
    without `over` the limit is on our microseconds; with `fact`, on that figure of the case.
    """

    name: str
    case: str
    over: tuple[str, ...] = ()
    at_most: float | None = None
    at_least: float | None = None
    fact: str | None = None

    def met(self, measured: float) -> bool:
        return measured <= self.at_most if self.at_least is None else measured >= self.at_least

    def limit(self) -> dict[str, float | None]:
        return {"at_most": self.at_most, "at_least": self.at_least}


def backends_of(op: str, device: str) -> list[str]:
    """The backends that take the op on this device."""
    states, takes = dispatch.backends(), dispatch._DEVICES
    kernels = dispatch.KERNELS.get(op, {})
    return [b for b in kernels if states[b] == "available" and takes.get(b, device) == device]


def run_cases(
    results: Results,
    bench: Bench,
    part: str,
    cases: list[Case],
    targets: list[Target],
    budgets: dict[str, float],
) -> None:
    """Every case that is not done; each group within its seconds.

    Raises:
        Poisoned: a contestant broke the device; it is recorded, and the next run goes on after it.
    """
    state = results.data["parts"][part]
    done, spent = state.setdefault("done", []), state.setdefault("group_seconds", {})
    for case in cases:
        if case.name in done:
            continue
        deadline = Deadline(budgets[case.group] - spent.get(case.group, 0.0))
        left = deadline.left()
        state["current"] = case.name
        results.save()
        try:
            if left <= 0:
                raise TimeoutError(f"the {budgets[case.group]:.0f} s of {case.group} are spent")
            run_case(results, bench, part, case, [t for t in targets if t.case == case.name], left)
        except Poisoned:
            raise
        except Exception as error:
            results.leave_out(part, case.name, reason_of(error))
            if not bench.healthy():
                done.append(case.name)
                raise Poisoned(case.name) from error
        finally:
            spent[case.group] = spent.get(case.group, 0.0) + left - deadline.left()
            results.save()
        done.append(case.name)
        state["current"] = None
        bench.forget()
        results.save()


def judge_the_rest(results: Results, part: str, targets: list[Target]) -> None:
    """A row for each target that no case came to, with the reason."""
    reasons = {entry["what"]: entry["reason"] for entry in results.of("left_out", part)}
    judged = {entry["target"] for entry in results.of("targets", part)}
    for target in targets:
        if target.name not in judged:
            done = target.case in results.data["parts"][part].get("done", [])
            why = "ours or what it is held against did not run" if done else "its case was not run"
            reason = reasons.get(target.case, why)
            add_target(results, part, target, reason=reason)


def run_case(
    results: Results, bench: Bench, part: str, case: Case, targets: list[Target], seconds: float
) -> None:
    """Check, warm up and time the contestants of one case, and judge."""
    deadline = Deadline(seconds)
    with at_most(min(LIMIT, seconds)):
        setup = case.make(bench)
    if bench.quick:
        setup.contestants.pop("reference", None)
    failed = {r["contestant"] for r in results.of("rows", part) if r["case"] == case.name}
    for name, reason in setup.left_out.items():
        if name not in failed:
            results.leave_out(part, f"{case.name}: {name}", reason)

    def fails(name: str, reason: str) -> None:
        results.add("rows", part, case=case.name, contestant=name, mode=None, reason=reason)
        bench.forget()
        if not bench.healthy():
            raise Poisoned(f"{case.name}: {name}: {reason}")

    loops: dict[str, dict[str, Callable[[], float]]] = {"eager": {}, "graph": {}}
    known: dict[str, dict[str, Any]] = {}
    no_graph: dict[str, str] = {}
    for name, contestant in setup.contestants.items():
        results.save()  # a sign of life
        if name in failed:
            continue
        if deadline.left() < 0:
            results.leave_out(part, f"{case.name}: {name}", "no time was left to warm it up")
            continue
        try:
            with at_most(LIMIT):
                known[name] = checked(bench, contestant)
                loops["eager"][name] = bench.eager(contestant.call)
        except Exception as error:
            fails(name, reason_of(error))
            continue
        if not contestant.graph:
            continue
        try:
            with at_most(LIMIT):
                loops["graph"][name] = bench.graph(contestant.call)
        except Exception as error:
            no_graph[name] = reason_of(error)
            if not bench.healthy():
                fails(name, f"its capture in a CUDA graph ends the process: {reason_of(error)}")
    for mode, calls in loops.items():
        times = bench.alternate(calls, deadline.left)
        ours = [name for name in times if setup.contestants[name].ours]
        best = min(ours, key=lambda name: statistics.median(times[name]), default=None)
        for name, seconds_of in times.items():
            row = {"contestant": name, "mode": mode, "ours": setup.contestants[name].ours}
            row |= timed(results, setup.contestants[name], seconds_of) | known[name]
            if best is not None:
                row["over_ours"] = spread(
                    [a / b for a, b in zip(seconds_of, times[best], strict=True)]
                )
            if mode == "eager" and name in no_graph:
                row["no_graph"] = no_graph[name]
            results.add("rows", part, case=case.name, **row)
        for target in targets:
            if target.fact is None and best is not None and calls:
                judge(results, part, target, mode, best, times)
    judge_facts(results, part, setup, targets)


def checked(bench: Bench, contestant: Contestant) -> dict[str, Any]:
    """Its error and the memory of its first call after a warm one."""
    out = contestant.call(0)
    bench.synchronize()
    found: dict[str, Any] = {}
    if contestant.error is not None:
        found["relative_error"] = contestant.error(out)
        if not found["relative_error"] <= contestant.tolerance:
            raise ArithmeticError(
                f"wrong: relative error {found['relative_error']:.2g}, "
                f"allowed {contestant.tolerance:.2g}"
            )
    del out
    peak: list[int] = []
    with bench.peak_bytes(peak):
        contestant.call(1)
    if peak:
        found["peak_bytes"] = peak[0]
    return found


def timed(results: Results, contestant: Contestant, seconds: list[float]) -> dict[str, Any]:
    """The figures of one contestant."""
    us = spread([s * 1e6 for s in seconds])
    row: dict[str, Any] = {"us": us, "rounds": len(seconds)}
    if contestant.num_bytes is not None:
        rate = contestant.num_bytes / us["median"] / 1e3
        row |= {"num_bytes": contestant.num_bytes, "gb_per_s": rate}
        ceiling = results.data["ceilings"].get("copy_gb_per_s")
        row["share_of_copy"] = rate / ceiling if ceiling else None
    if contestant.tokens is not None:
        row["tokens_per_s"] = contestant.tokens / us["median"] * 1e6
    return row


def judge(
    results: Results,
    part: str,
    target: Target,
    mode: str,
    ours: str,
    times: dict[str, list[float]],
) -> None:
    """One target in one mode."""
    if not target.over:
        values = [s * 1e6 for s in times[ours]]
        against = "µs"
    else:
        others = [name for name in target.over if name in times]
        if not others:
            return
        against = min(others, key=lambda name: statistics.median(times[name]))
        pairs = zip(times[ours], times[against], strict=True)
        values = [a / b if target.at_least is None else b / a for a, b in pairs]
    measured = spread(values)
    add_target(
        results,
        part,
        target,
        mode=mode,
        contestant=ours,
        against=against,
        measured=measured,
        met=target.met(measured["median"]),
    )


def judge_facts(results: Results, part: str, setup: Setup, targets: list[Target]) -> None:
    for target in targets:
        if target.fact is None:
            continue
        try:
            value = setup.facts[target.fact]()
        except Exception as error:
            add_target(results, part, target, reason=reason_of(error))
            continue
        if value is None:
            add_target(results, part, target, reason="not to be measured on this device")
            continue
        measured = {"median": value, "min": value, "max": value}
        add_target(
            results, part, target, against=target.fact, measured=measured, met=target.met(value)
        )


def add_target(results: Results, part: str, target: Target, **found: Any) -> None:
    row = {"mode": None, "contestant": None, "against": None, "measured": None, "met": None}
    limits = {"target": target.name, "case": target.case, **target.limit()}
    results.add("targets", part, **limits, **row | found)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the body when the seconds are over."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def reason_of(error: BaseException) -> str:
    """One line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
