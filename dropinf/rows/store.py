"""RowStore: rows [n, R] in memory or in a directory, with the plan that made them."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from dropinf.capturing import Proof
from dropinf.compression import Plan

_FORMAT = "dropinf rows 1"
_CHUNK_BYTES = 1 << 24  # of one checksum, and of one step over the store


class RowStore:
    """Rows [n, R] of n examples, made by `collect`, and which of them are valid.

    A directory holds plan.json, rows.bin (the rows, row-major, little-endian) and store.json
    (their number, dtype, invalid positions, and a CRC-32 for each chunk of rows).

    Attributes:
        plan: the plan that made the rows.
        path: the directory, or None for a store in memory.
        valid: [n] bool; an invalid row (a loss or gradient that was not finite) is zeros.
        origin: [n, 2] int64, of rows per token or segment the example (in the loader's order) and
            the token or segment; of rows that a callback took during training, the step and the
            example's position in the data set; None if every row is an example in order.
        proof: on how many examples, over which layers, `collect` compared rows with plain autograd.
    """

    def __init__(
        self,
        rows: Tensor,
        plan: Plan,
        valid: Tensor | None = None,
        origin: Tensor | None = None,
    ) -> None:
        """A store in memory around `rows`, float32 or float64.

        Raises:
            ValueError: the rows do not have the plan's width, or a valid one is not finite.
        """
        if rows.dim() != 2 or rows.shape[1] != plan.width or not rows.is_floating_point():
            raise ValueError(
                f"RowStore: rows must be floating point [n, {plan.width}] under this plan, "
                f"got {rows.dtype} {tuple(rows.shape)}"
            )
        self.plan = plan
        self.path: Path | None = None
        self.valid = torch.ones(len(rows), dtype=torch.bool) if valid is None else valid
        self.origin = origin
        self.proof = Proof()
        self._rows = rows
        self._checksums: list[int] = []  # of chunks not verified yet
        for start, chunk in self.chunks():
            bad = ~finite_rows(chunk) & self.valid[start : start + len(chunk)]
            if bad.any():
                raise ValueError(f"RowStore: row {start + int(bad.nonzero()[0])} is not finite")

    @classmethod
    def load(cls, path: str | os.PathLike) -> RowStore:
        """Open a directory; rows are read, and their checksums compared, as they are used.

        Raises:
            FileNotFoundError: there is no store at `path`.
            ValueError: the store is damaged or truncated.
        """
        path = Path(path)
        if not (path / "store.json").is_file():
            raise FileNotFoundError(f"RowStore.load: {path} holds no store (no store.json in it)")
        plan = Plan.load(path)
        try:
            saved = json.loads((path / "store.json").read_text())
            n, dtype = int(saved["n"]), np.dtype(saved["dtype"])
            checksums = list(saved["crc32"])
            valid = torch.ones(n, dtype=torch.bool)
            valid[saved["invalid"]] = False
            if len(checksums) != -(-n // _rows_per_chunk(plan.width, dtype.itemsize)):
                raise ValueError("the number of checksums is wrong")
            proof = Proof.load(saved["proof"]) if "proof" in saved else Proof()
            known = saved["format"] == _FORMAT and saved["fingerprint"] == plan.fingerprint
        except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
            raise ValueError(f"RowStore.load: {path}/store.json is damaged: {error!r}") from error
        if not known:
            raise ValueError(
                f"RowStore.load: {path}/store.json and plan.json do not belong together"
            )
        origin = None
        if (path / "origin.npy").is_file():
            origin = torch.from_numpy(np.load(path / "origin.npy"))
            if origin.shape != (n, 2) or zlib.crc32(origin.numpy()) != saved.get("origin_crc32"):
                raise ValueError(f"RowStore.load: {path}/origin.npy is damaged")
        elif "origin_crc32" in saved:
            raise ValueError(f"RowStore.load: {path}/origin.npy is missing")
        file = path / "rows.bin"
        wanted = n * plan.width * dtype.itemsize
        there = file.stat().st_size if file.is_file() else 0
        if there != wanted:
            raise ValueError(
                f"RowStore.load: {file} is truncated or damaged: {there} bytes instead of {wanted}"
            )
        store = cls.__new__(cls)
        store.plan, store.path, store.origin = plan, path, origin
        store.proof = proof
        # Copy on write: torch warns about tensors on read-only memory.
        rows = np.memmap(file, dtype, "c", shape=(n, plan.width))
        store._rows = torch.from_numpy(rows)
        store._checksums = checksums
        store.valid = valid
        return store

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows."""
        return self._rows.numel() * self._rows.element_size()

    @property
    def rows(self) -> Tensor:
        """[n, R] all rows, verified; of a directory, memory-mapped: writing changes no file."""
        for _ in self.chunks():
            pass
        return self._rows

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """The rows in order, as (position of the first, [c, R]) of about 16 MiB each.

        Raises:
            ValueError: a chunk on disk does not have its checksum.
        """
        step = _rows_per_chunk(self.plan.width, self._rows.element_size())
        for number, start in enumerate(range(0, len(self), step)):
            chunk = self._rows[start : start + step]
            if self._checksums and self._checksums[number] is not None:
                if zlib.crc32(chunk.numpy()) != self._checksums[number]:
                    raise ValueError(
                        f"RowStore: {self.path}/rows.bin is damaged in rows {start} to "
                        f"{start + len(chunk) - 1}; collect it again"
                    )
                self._checksums[number] = None
            yield start, chunk

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else f"in {self.path}"
        size = f"{len(self)} rows of width {self.plan.width}"
        return f"RowStore({size} {where}, plan {self.plan.fingerprint}, {self.proof})"


class RowWriter:
    """Appends rows and makes the store: a directory appears whole, or not at all.

    Inside the `with`, a directory is written beside its place, as PATH.partial; `finish` moves it
    there, and leaving without `finish` removes it.
    """

    def __init__(self, plan: Plan, path: str | os.PathLike | None, expected: int = 0) -> None:
        """`expected` rows are allocated at once in memory; more may come, or fewer.

        Raises:
            FileExistsError: there is something at `path`.
        """
        self._plan = plan
        self._path = None if path is None else Path(path)
        self._expected = expected
        self._rows: Tensor | None = None  # in memory, with room to grow
        self._valid: list[Tensor] = []
        self._origin: list[Tensor] = []
        self._checksums: list[int] = []
        self._unsummed = b""
        self._dtype: torch.dtype | None = None
        self._file = None
        self.num_rows = 0
        if self._path is not None:
            if self._path.exists():
                raise FileExistsError(
                    f"collect: {self._path} exists; load it with RowStore.load, remove it, or "
                    "give another path"
                )
            self._partial = self._path.with_name(self._path.name + ".partial")

    def __enter__(self) -> RowWriter:
        if self._path is not None:
            shutil.rmtree(self._partial, ignore_errors=True)  # of a process that was killed
            self._partial.mkdir(parents=True)
            self._file = (self._partial / "rows.bin").open("wb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
            shutil.rmtree(self._partial, ignore_errors=True)

    def append(self, rows: Tensor, valid: Tensor, origin: Tensor | None = None) -> None:
        """Add rows [B, R], which of them are valid [B] bool, and their origin [B, 2]."""
        if origin is not None:
            self._origin.append(origin.cpu())
        rows, first, last = rows.detach().cpu(), self.num_rows, self.num_rows + len(rows)
        self._valid.append(valid.cpu())
        self._dtype = rows.dtype
        if self._file is not None:
            data = np.ascontiguousarray(rows.numpy(), rows.numpy().dtype.newbyteorder("<"))
            self._file.write(data.tobytes())
            self._add_checksums(data.tobytes())
        else:
            if self._rows is None:
                self._rows = rows.new_empty(max(self._expected, len(rows)), rows.shape[1])
            if last > len(self._rows):
                grown = self._rows.new_empty(max(last, 2 * len(self._rows)), rows.shape[1])
                grown[:first] = self._rows[:first]
                self._rows = grown
            self._rows[first:last] = rows
        self.num_rows = last

    def finish(self, proof: Proof | None = None) -> RowStore:
        """The store of all rows; a directory is in its place now."""
        proof = Proof() if proof is None else proof
        valid = torch.cat(self._valid)
        origin = torch.cat(self._origin) if self._origin else None
        if self._file is None:
            store = RowStore(self._rows[: self.num_rows], self._plan, valid, origin)
            store.proof = proof
            return store
        if self._unsummed:
            self._checksums.append(zlib.crc32(self._unsummed))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._plan.save(self._partial / "plan.json")
        known = {}
        if origin is not None:
            np.save(self._partial / "origin.npy", origin.numpy())
            known["origin_crc32"] = zlib.crc32(origin.numpy())
        (self._partial / "store.json").write_text(
            json.dumps(
                {
                    **known,
                    "format": _FORMAT,
                    "n": self.num_rows,
                    "dtype": f"<f{self._dtype.itemsize}",
                    "fingerprint": self._plan.fingerprint,
                    "invalid": (~valid).nonzero().flatten().tolist(),
                    "crc32": self._checksums,
                    "proof": proof.saved(),
                }
            )
        )
        self._partial.rename(self._path)
        return RowStore.load(self._path)

    def _add_checksums(self, data: bytes) -> None:
        chunk = _rows_per_chunk(self._plan.width, self._dtype.itemsize)
        chunk *= self._plan.width * self._dtype.itemsize
        self._unsummed += data
        while len(self._unsummed) >= chunk:
            self._checksums.append(zlib.crc32(self._unsummed[:chunk]))
            self._unsummed = self._unsummed[chunk:]


def finite_rows(rows: Tensor) -> Tensor:
    """[n] whether all entries of a row are finite.

    The terms of a finite sum are, and a sum is one read of the rows where isfinite makes copies.
    """
    sums = rows.sum(1).isfinite()
    return sums if sums.all() else rows.isfinite().all(1)


def _rows_per_chunk(width: int, itemsize: int) -> int:
    return max(1, _CHUNK_BYTES // (width * itemsize))
