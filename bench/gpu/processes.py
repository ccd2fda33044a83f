"""The processes that a run starts: each leads a process group, and none outlives the run."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO

from gpu.results import ROOT

_running: set[subprocess.Popen] = set()
_libc = ctypes.CDLL(None)  # loaded before any fork
_PR_SET_PDEATHSIG = 1


class Ended(SystemExit):
    """A signal ended the run, or its time was over; the exit code is 128 + the signal."""

    @property
    def reason(self) -> str:
        number = signal.Signals(self.code - 128)
        return "its time was over" if number == signal.SIGALRM else f"ended by {number.name}"


def start(
    command: Sequence[str], environment: dict[str, str], output: IO | None = None
) -> subprocess.Popen:
    """A child in the root of the checkout; `output` gets what it prints and its errors."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        preexec_fn=_lead_a_group,
    )
    _running.add(process)
    return process


def _lead_a_group() -> None:
    """A group of this session, so that what ends the session ends it too."""
    os.setpgrp()
    if sys.platform == "linux":  # also where the run is killed and can do nothing
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end(process: subprocess.Popen) -> None:
    """Kill it with all that it started; nothing where none of them is left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _running.discard(process)


@contextmanager
def all_end_within(seconds: float) -> Iterator[None]:
    """Raise Ended in the body, without its processes, on a signal or when the time is over."""

    def ring(number: int, _: object) -> None:
        for process in list(_running):
            end(process)
        raise Ended(128 + number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM)
    before = {number: signal.signal(number, ring) for number in numbers}
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
