"""Factors between fit and solve, in a file where they do not fit into memory."""

from __future__ import annotations

import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

_STEP = 1 << 26  # bytes read at a time for a checksum


@dataclass(frozen=True)
class FileTensor:
    """A flat tensor in a file, little-endian as all machines are that torch runs on."""

    file: Path
    start: int  # in bytes
    size: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.size * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, in memory."""
        numbers = torch.empty(self.size, dtype=self.dtype)
        with self.file.open("rb") as file:
            file.seek(self.start)
            if file.readinto(numbers.numpy()) != self.num_bytes:
                raise ValueError(f"{self.file} is truncated; fit the solver again")
        return numbers


class Spill:
    """A file of a temporary directory, which is removed with this object."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="dropinf-")
        self._file = Path(self._directory.name) / "factors.bin"
        self._file.touch()

    def append(self, numbers: Tensor) -> FileTensor:
        """Write a flat tensor behind the others."""
        start = self._file.stat().st_size
        with self._file.open("ab") as file:
            write(file, numbers)
        return FileTensor(self._file, start, numbers.numel(), numbers.dtype)


def write(file: BinaryIO, numbers: Tensor, crc: int = 0) -> int:
    """Append a flat tensor to an open file; return the CRC-32 of everything so far."""
    data = numbers.cpu().numpy()
    file.write(data)
    return zlib.crc32(data, crc)


def crc_of(path: Path) -> int:
    """The CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while data := file.read(_STEP):
            crc = zlib.crc32(data, crc)
    return crc
