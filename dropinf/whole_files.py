"""Files and directories that appear whole or not at all, with nobody else's in their way."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dropinf.processes import host, started


@contextlib.contextmanager
def appearing(path: Path, replace: bool = False) -> Iterator[Path]:
    """A place to make a file or directory, which stands at `path` when the context ends.

    The place is in a new directory beside `path`, of a name that nobody has; an error leaves
    nothing. `replace` takes the place of a file.

    Raises:
        FileExistsError: there is something at `path` by now.
    """
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with workplace(path) as beside:
        made = beside / path.name
        yield made
        if made.is_dir():
            for file in sorted(made.rglob("*")):
                if file.is_dir() or file.stat().st_size:  # of an empty file the name is all
                    sync(file)
        sync(made)
        if not replace and os.path.lexists(path):
            raise FileExistsError(f"{path} exists by now")
        os.replace(made, path)
    sync(path.parent)


@contextlib.contextmanager
def workplace(path: Path) -> Iterator[Path]:
    """A new directory beside `path`, whose name says whose it is, and which goes with the context.

    What processes of this host left that were killed in one, for a file of this name, goes too.
    """
    of_host = re.sub(r"[^\w.]", "_", host())[:60]
    whose = f".{path.name[:60]}-{of_host}-"
    for entry in list(os.scandir(path.parent)):
        left = re.fullmatch(re.escape(whose) + r"(\d{1,10})-(-?\d+|None)-\w{8}", entry.name)
        if left and str(started(int(left[1]))) != left[2] and entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
    pid = os.getpid()
    prefix = f"{whose}{pid}-{started(pid)}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as beside:
        yield Path(beside)


def sync(path: Path) -> None:
    """Have a file, or the names in a directory, outlast a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot do it for those
            raise
    finally:
        os.close(descriptor)
