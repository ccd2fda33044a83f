"""Small JSON files under their own checksum, and how their contents are looked at."""

from __future__ import annotations

import json
import os
import stat
import zlib
from pathlib import Path
from typing import Any, TypeVar

from dropinf.text_table import printable

T = TypeVar("T")

# Of a manifest. A plan of ten thousand layers has two million, and one with the energies of a dense
# model of 70 billion parameters 18 million.
MOST_BYTES = 1 << 26
_SEAL = b', "crc32": '


def sealed(content: dict[str, Any], indent: int | None = None) -> bytes:
    """`content` as JSON whose last key is the CRC-32 of all bytes before it."""
    head = json.dumps(content, indent=indent, default=int)[:-1].rstrip().encode()
    return head + _SEAL + b"%d}" % zlib.crc32(head)


def unsealed(text: bytes) -> dict[str, Any]:
    """The content of what `sealed` gave.

    Raises:
        ValueError: it is anything else, to the bit.
    """
    head, comma, tail = text.rpartition(_SEAL)
    if not comma or tail != b"%d}" % zlib.crc32(head):
        raise ValueError("its checksum is missing or wrong")
    try:
        content = json.loads(head + b"}")
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"it is no JSON ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def read_regular(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a file, which must be a regular one: a pipe would wait, a device never end.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else, or of more than `most` bytes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is no regular file")
        if found.st_size > most:
            raise ValueError(f"it has {found.st_size} bytes, more than {most}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(found.st_size)
    finally:
        os.close(descriptor)


def read_manifest(op: str, path: Path, remedy: str) -> dict[str, Any]:
    """A sealed file.

    Raises:
        ValueError: it is missing or damaged; `remedy` is the way out.
    """
    try:
        return unsealed(read_regular(path))
    except FileNotFoundError:
        raise ValueError(f"{op}: {path} is missing; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{op}: {path} is damaged: {error}; {remedy}") from None


def reason(error: Exception) -> str:
    """Why something was refused, on one line and short, whatever it holds."""
    text = printable(str(error)) if isinstance(error, ValueError) else type(error).__name__
    return text if len(text) < 300 else text[:300] + "..."


def field(
    content: dict[str, Any],
    key: str,
    kind: type[T],
    least: int | None = None,
    most: int | None = None,
) -> T:
    """content[key], of just this type, and in this range.

    Raises:
        ValueError: it is missing, or something else.
    """
    if key not in content:
        raise ValueError(f"it has no {key!r}")
    value = content[key]
    if type(value) is not kind:  # True is no int
        raise ValueError(f"{key!r} is {type(value).__name__}, not {kind.__name__}")
    if (least is not None and value < least) or (most is not None and value > most):
        raise ValueError(f"{key!r} is out of range")
    return value


def integers(content: dict[str, Any], key: str, least: int, most: int) -> list[int]:
    """content[key], a list of integers in this range.

    Raises:
        ValueError: it is something else.
    """
    values = field(content, key, list)
    if not all(type(value) is int and least <= value <= most for value in values):
        raise ValueError(f"{key!r} holds something else than integers of {least} to {most}")
    return values
