"""Files and directories that appear whole or not at all, with nobody else's in their way."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


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
    with tempfile.TemporaryDirectory(prefix=f".{path.name[:100]}-", dir=path.parent) as beside:
        made = Path(beside) / path.name
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
