"""A lock that says who holds it: host, pid, and when that process started."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dropinf import processes
from dropinf.manifest import field, read_regular
from dropinf.text_table import printable
from dropinf.user_warning import warn_user
from dropinf.whole_files import workplace

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


class LockedError(RuntimeError):
    """Another process writes here.

    `collect` and `RowStore.append` raise it.

        try:
            store = dropinf.collect(model, loader, loss_fn, plan, "rows", resume=True)
        except dropinf.LockedError as error:
            print(error)  # which process writes there
    """


class Lock:
    """The file `lock` in a directory, from `acquire` to `release`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._token = secrets.token_hex(8)  # tells it from others of this process

    def acquire(self, op: str) -> None:
        """Take it, from a process that is gone if need be, which is said.

        Whatever ends this, an interrupt too, `release` is to be called.

        Raises:
            LockedError: another process holds it, or may hold it.
        """
        while not self._made():
            with _alone(self.directory):
                holder = self._holder()
                if holder is None:
                    continue
                host, pid = holder["host"], holder["pid"]
                if host != processes.host():
                    raise LockedError(
                        f"{op}: {self.directory} is being written by process {pid} on host "
                        f"{printable(host)}; if that process is gone, remove {self._file}"
                    )
                if processes.started(pid) == holder["start"]:
                    raise LockedError(
                        f"{op}: {self.directory} is being written by process {pid} on this host "
                        f"({printable(host)}); wait for it, or give another path"
                    )
                self._file.unlink()
            warn_user(
                f"{op}: process {pid} on this host, which wrote {self.directory}, is gone; its "
                "lock is taken over"
            )

    def release(self) -> None:
        """Leave it to others, if it is this one's."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, LockedError):
            found = self._holder()
            if found is not None and found["token"] == self._token:
                self._file.unlink()

    def holder(self) -> str | None:
        """Who holds it, for people; None if nobody does."""
        found = self._holder()
        if found is None:
            return None
        return f"process {found['pid']} on host {printable(found['host'])}"

    @property
    def _file(self) -> Path:
        return self.directory / "lock"

    def _made(self) -> bool:
        """Make the file whole, by a link; False if there is one."""
        pid = os.getpid()
        own = {
            "host": processes.host(),
            "pid": pid,
            "start": processes.started(pid),
            "token": self._token,
        }
        with workplace(self._file) as beside:
            new = beside / "lock"
            new.write_text(json.dumps(own))
            try:
                os.link(new, self._file)
            except FileExistsError:
                return False
            except OSError:  # of a file system without links
                try:
                    with self._file.open("x") as file:
                        file.write(new.read_text())
                except FileExistsError:
                    return False
        return True

    def _holder(self) -> dict[str, Any] | None:
        """Who holds it; None if it was released by now."""
        try:
            found = json.loads(read_regular(self._file, 4096))
            if not isinstance(found, dict):
                raise ValueError("it holds no JSON object")
            start = found.get("start")
            if start is not None and type(start) is not int:
                raise ValueError("'start' is no integer")
            host = field(found, "host", str)
            pid = field(found, "pid", int, 1, 2**31 - 1)
            return {"host": host, "pid": pid, "start": start, "token": found.get("token")}
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise LockedError(
                f"{self._file} does not say who holds it ({error}); if nobody does, remove it"
            ) from None


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """No other process of this host takes a stale lock over meanwhile."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a network's file system may not have it
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
