"""Times of contestants that alternate in one process, and the memory that a call takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

Call = Callable[[], object]

# Environment of a process whose peak is read: malloc would keep freed blocks, and the peak would
# say nothing about the call.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


class LeftOut(Exception):
    """Why a contestant does not run."""


def seconds_of(call: Call, cuda: bool = False) -> float:
    """One call, with all that it launches on a GPU if `cuda`."""
    if not cuda:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def loop_of(
    call: Callable[[int], object], seconds: float, cuda: bool = False, least: int = 1
) -> Callable[[], float]:
    """call(0), call(1), ... for about `seconds`, at least so many; it gives the seconds of one."""
    once = seconds_of(lambda: call(0), cuda)
    count = max(least, round(seconds / max(once, 1e-7)))

    def loop() -> None:
        for i in range(count):
            call(i)

    return lambda: seconds_of(loop, cuda) / count


def alternate(
    loops: dict[str, Callable[[], float]], rounds: int, goes_on: Callable[[], bool] = lambda: True
) -> dict[str, list[float]]:
    """What each loop gives in every round; fewer rounds where it does not go on, but one."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for done in range(rounds):
        if done and not goes_on():
            break
        for name, loop in loops.items():
            seconds[name].append(loop())
    return seconds


def spread(values: list[float]) -> list[float]:
    """[median, smallest, largest]."""
    return [statistics.median(values), min(values), max(values)]


def peak(call: Call, device: torch.device) -> float | None:
    """MB (10⁶ bytes) that a call needs above what the process holds; None if it cannot be read."""
    call()  # libraries allocate their workspaces in the first one
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - held) / 1e6
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    held = _resident("VmRSS")
    clear.write_text("5")  # resets the peak
    call()
    return _resident("VmHWM") - held


def _resident(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024 / 1e6
    raise KeyError(key)
