"""Peak resident memory of a call, MB (10⁶ bytes), in a process of its own; of Linux's /proc."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dropinf.tools.measuring import MALLOC, peak


def skip_without_proc() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from Linux's /proc")


def peak_in_own_process(file: str, *arguments: str) -> float:
    """The last line that `python file *arguments` prints."""
    command, environment = [sys.executable, file, *arguments], {**os.environ, **MALLOC}
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return float(run.stdout.splitlines()[-1])


def peak_of(call: Callable[[], object]) -> float:
    """What the second call takes above what the process held before."""
    return peak(call, torch.device("cpu"))
