"""Peak resident memory of a call, MB (10⁶ bytes), in a process of its own; of Linux's /proc."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def skip_without_proc() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from Linux's /proc")


def peak_in_own_process(file: str, *arguments: str) -> float:
    """The last line that `python file *arguments` prints."""
    # Without these, malloc keeps freed blocks, and the peak says nothing about the step.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, file, *arguments]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return float(run.stdout.splitlines()[-1])


def peak_of(call: Callable[[], object]) -> float:
    """What the second call takes above what the process held before."""
    call()  # libraries allocate their workspaces in the first
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    call()
    return resident("VmHWM") - before


def resident(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024 / 1e6
    raise KeyError(key)
