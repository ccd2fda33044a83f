"""`timed`: contestants that alternate in one process, and the ratios between them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dropinf.tools.measuring import alternate, loop_of, spread

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
        loops = {}
        for name, call in contestants.items():
            call()  # warm up: compile, allocate, fault pages in
            loop = loop_of(lambda _, call=call: call(), loop_seconds)
            loops[name] = settled(call, loop) if settle else loop
        seconds = alternate(loops, rounds)
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.extra_info["ours"] = ours
        benchmark.extra_info["contestants"] = {
            name: {
                "ms": spread([1e3 * s for s in times]),
                "ratio": spread([a / b for a, b in zip(times, seconds[ours], strict=True)]),
                "to_reach": to_reach.get(name),
            }
            for name, times in seconds.items()
        }
        iterations = max(1, round(loop_seconds / min(seconds[ours])))
        benchmark.pedantic(contestants[ours], rounds=3, iterations=iterations)

    return run


def settled(call: Callable[[], object], loop: Callable[[], float]) -> Callable[[], float]:
    """The loop after a call, since the contestant before left the heap and the caches its way."""

    def run() -> float:
        call()
        return loop()

    return run
