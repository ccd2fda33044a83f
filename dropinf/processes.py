"""Which process of which host something is of, and whether that one is there."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def host() -> str:
    """The name of this one."""
    return socket.gethostname()


def started(pid: int) -> int | None:
    """When a process of this host started, in ticks of its clock; -1 if there is none.

    None where that cannot be known, though there is one.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return -1
    except PermissionError:
        pass
    try:
        # Behind the name, which may hold anything: the state, and start time as the 20th.
        after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if after[0] in "ZX" else int(after[19])
