"""Times of contestants that alternate in one process, and the memory of one in its own."""

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


def once(call: Call) -> float:
    """Seconds of one call."""
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def alternate(calls: dict[str, Call], rounds: int, loop_seconds: float) -> dict[str, list[float]]:
    """Seconds of a call in each round, by contestant, once each has been warmed up.

    A round gives each contestant a loop of about `loop_seconds`, or one call.
    """
    counts = {name: max(1, round(loop_seconds / once(call))) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            for _ in range(counts[name]):
                call()
            wait()
            seconds[name].append((time.perf_counter() - start) / counts[name])
    return seconds


def spread(values: list[float]) -> list[float]:
    """[median, smallest, largest]."""
    return [statistics.median(values), min(values), max(values)]


def wait() -> None:
    """For what a GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak(call: Call, device: torch.device) -> float | None:
    """MB (10⁶ bytes) that a call needs above what the process holds; None if it cannot be read."""
    call()  # libraries allocate their workspaces in the first one
    if device.type == "cuda":
        wait()
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
