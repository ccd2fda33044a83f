"""`timed`: contestants that alternate in one process, and the ratios between them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

LOOP_SECONDS = 0.35  # shorter loops of two busy cores quantise to the scheduler's 4 ms
ROUNDS = 7


@pytest.fixture
def timed(benchmark):
    """timed(contestants, ours, to_reach): time each, alternating, and record the ratios.

    `contestants` maps a name to a call without arguments; `ours` is the one to judge. `to_reach`
    maps another contestant to (smallest, largest) allowed of its time over ours; None is open.
    `settle` makes one call before each loop that is not timed, for contestants of one long call.
    """

    def run(
        contestants: dict[str, Callable[[], object]],
        ours: str,
        to_reach: dict[str, tuple[float | None, float | None]],
        loop_seconds: float = LOOP_SECONDS,
        rounds: int = ROUNDS,
        settle: bool = False,
    ) -> None:
        counts = {}
        for name, call in contestants.items():
            call()  # warm up: compile, allocate, fault pages in
            start = time.perf_counter()
            call()
            once = time.perf_counter() - start
            counts[name] = max(1, round(loop_seconds / once))
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(rounds):
            for name, call in contestants.items():
                if settle:  # the heap and the caches are as the contestant before left them
                    call()
                start = time.perf_counter()
                for _ in range(counts[name]):
                    call()
                seconds[name].append((time.perf_counter() - start) / counts[name])
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.extra_info["ours"] = ours
        benchmark.extra_info["contestants"] = {
            name: {
                "ms": _spread([1e3 * s for s in times]),
                "ratio": _spread([a / b for a, b in zip(times, seconds[ours], strict=True)]),
                "to_reach": to_reach.get(name),
            }
            for name, times in seconds.items()
        }
        benchmark.pedantic(contestants[ours], rounds=3, iterations=counts[ours])

    return run


def _spread(values: list[float]) -> list[float]:
    """[median, smallest, largest]."""
    return [statistics.median(values), min(values), max(values)]
