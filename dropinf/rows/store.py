"""RowStore: rows [n, R] in memory or in a directory, with the plan that made them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dropinf.compression import Plan
from dropinf.rows import arrow
from dropinf.rows import ids as id_lists
from dropinf.rows.about import (
    About,
    part_name,
    proof_of,
    read_about,
    write_about,
)
from dropinf.rows.ids import Ids, as_ids
from dropinf.rows.packing import Kept
from dropinf.rows.part import Marks, Part, checked_part, restored
from dropinf.rows.part_writer import write_part
from dropinf.rows.parts import Parts
from dropinf.text_table import Table, printable
from dropinf.user_warning import warn_user
from dropinf.whole_files import appearing

# Chunks: with one, a twelfth of top-k's time went to the starts, with two as much as a third at one
# query (2-core Xeon, 2026-11).
_AT_A_TIME = 4


class RowStore:
    """Rows [n, R] of n examples, made by `collect`, and which of them are valid.

    In memory rows may be on a GPU, which then does the work: solvers are fitted there, and scores
    are there. `collect` keeps them on the CPU, as [n, R] may not fit beside the model; `to("cuda")`
    takes them to the GPU. What belongs to them, `valid`, `ids` and `origin`, is on the CPU always.

    A directory holds plan.json, store.json, and parts, each written by one process in one go: its
    rows (row-major, little-endian), their ids, and a journal of how far they go. All of it is under
    checksums. A store that is still being written can be opened as far as it is flushed.

        store = dropinf.collect(model, loader, loss_fn, plan, "rows")
        store = dropinf.RowStore.load("rows")
        for start, rows in store.chunks():  # [c, R] float32, from the disk
            print(start, rows.shape)

    Attributes:
        plan: the plan that made the rows.
        path: the directory, or None for a store in memory.
        valid: [n] bool; an invalid row (a loss or gradient that was not finite) is zeros.
        weights: fingerprint of the weights that made the rows, None if that is not known.
        finished: whether all that was to be collected is there.
        proof: on how many examples, over which layers, `collect` compared rows with plain autograd.
        begins: of a stretch of another store, the position there of its first row; else 0.
    """

    begins = 0

    def __init__(
        self,
        rows: Tensor,
        plan: Plan,
        valid: Tensor | None = None,
        origin: Tensor | None = None,
        ids: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A store in memory around `rows`.

        Args:
            rows: [n, R] floating point; they stay on the device that they are on.
            plan: that made them.
            valid: [n] bool, None if all are.
            origin: [n, 2], see `origin`.
            ids: n integers or strings; None if a row is known by its position.
            dtype: in which to keep them, see `collect`; None is the rows' own.

        Raises:
            ValueError: the rows do not have the plan's width, a valid one is not finite, or rows
                are not kept in that dtype.
        """
        ids = None if ids is None else as_ids("RowStore", ids)
        part = checked_part("RowStore", plan, rows, valid, origin, ids, dtype)
        self._take(plan, Parts([part]), About())

    def _take(self, plan: Plan, parts: Parts, about: About, path: Path | None = None) -> None:
        self.plan, self.path, self.about, self._parts = plan, path, about, parts
        self.valid = parts.valid
        self.proof = proof_of([part.extent.state for part in parts.parts])

    @classmethod
    def load(cls, path: str | os.PathLike) -> RowStore:
        """Open a directory; rows are read, and their checksums compared, as they are used.

        A store that is not finished is opened as far as it goes, and that is said.

        Raises:
            FileNotFoundError: there is no store at `path`.
            ValueError: the store is damaged or truncated.
        """
        path = Path(path)
        width, fingerprint, about = read_about(path)
        parts = Parts.open(path, width)
        # By now rows of this width are there, so that the plan is not larger than it should be.
        plan = Plan.load(path, width)
        if fingerprint != plan.fingerprint:
            raise ValueError(
                f"RowStore.load: {path}/store.json and plan.json do not belong together"
            )
        store = cls.of(plan, parts.lay_out(plan), about, path)
        if not store.finished:
            how = ", and collect(..., path=, resume=True) goes on behind them"
            warn_user(
                f"RowStore.load: {path} is not finished; these are its first {len(store)} rows"
                + ("" if about.weights is None else how)
            )
        return store

    @classmethod
    def of(cls, plan: Plan, parts: Parts, about: About, path: Path | None = None) -> RowStore:
        """A store of parts that are there."""
        store = cls.__new__(cls)
        store._take(plan, parts, about, path)
        return store

    @classmethod
    def join(cls, stores: Sequence[RowStore]) -> RowStore:
        """The rows of one store after the other; nothing is copied.

        Raises:
            ValueError: they are of different plans, weights, updates, dtypes or devices, or share
                an id.
        """
        if not stores:
            raise ValueError("RowStore.join: no stores were given")
        first, parts = stores[0], []
        for number, store in enumerate(stores):
            for what, mine, theirs in (
                ("plan", first.plan.fingerprint, store.plan.fingerprint),
                ("weights", first.weights, store.weights),
                ("updates", first.updates, store.updates),
                ("dtype", first.dtype, store.dtype),
                ("device", str(first.device), str(store.device)),
                ("ids", first._parts.kind, store._parts.kind),
                ("origin", first._parts.has_origin, store._parts.has_origin),
            ):
                if mine != theirs:
                    raise ValueError(
                        f"RowStore.join: store {number} has other {what} than the first one "
                        f"({theirs!r}, not {mine!r}); join stores that were made alike"
                    )
            parts += store._parts.parts
        about = About(first.weights, first.about.passing, first.about.options)
        joint = cls.of(first.plan, Parts(parts), about)
        joint.valid = torch.cat([store.valid for store in stores])
        own = [id_lists.distinct(store._parts.ids) for store in stores]
        twice = None if own[0] is None else id_lists.first_twice(id_lists.joined(own))
        if twice is not None:
            raise ValueError(
                f"RowStore.join: id {twice!r} is in two of the stores; collect them with ids= that "
                "tell their examples apart"
            )
        return joint

    def append(
        self, rows: Tensor, ids: Any = None, valid: Tensor | None = None, origin: Any = None
    ) -> None:
        """Add rows as a part of their own, on the disk too if the store is a directory.

        Args:
            rows: [k, R] under the same plan and weights, in the dtype in which the store reads, on
                any device.
            ids: k integers or strings, which must not be here yet; needed if the store has ids.
            valid: [k] bool, None if all are.
            origin: [k, 2] integers, needed if the store has them.

        Raises:
            ValueError: they do not belong here.
            LockedError: another process writes this store.
        """
        given = None if ids is None else as_ids("RowStore.append", ids)
        rows = rows.to(self.device)
        part = checked_part("RowStore.append", self.plan, rows, valid, origin, given, self.dtype)
        self._parts.check_new(part, rows.dtype)
        if self.path is not None:
            part = self._parts.written(part, self.path)
        self._parts.parts.append(part)
        self.valid = torch.cat([self.valid, part.valid])

    def to(self, device: str | torch.device) -> RowStore:
        """A store in memory whose rows are on a device, such as "cuda", kept in the same dtype.

        It is this store itself if they are there already.

        Raises:
            ValueError: a chunk on disk does not have its checksum.
        """
        device = torch.empty(0, device=device).device  # "cuda" is the current one
        if self.path is None and device == self.device:
            return self
        packed = self._parts.moved(device)
        part = Part(packed, self._parts.packing, self.valid.clone(), self._parts.ids, self.origin)
        part.finished = self.finished
        store = RowStore.of(self.plan, Parts([part]), self.about)
        store.proof = self.proof
        return store

    def save(self, path: str | os.PathLike) -> None:
        """Write the rows to a new directory, which appears whole or not at all.

        Raises:
            FileExistsError: there is something at `path`.
        """
        path = Path(path)
        if os.path.lexists(path):
            raise FileExistsError(f"RowStore.save: {path} exists; remove it, or give another path")
        with appearing(path) as new:
            new.mkdir()
            write_about(new, self.plan, self.about)
            done = [part.extent for part in self._parts.parts]
            examples, batches = (sum(getattr(e, w) for e in done) for w in ("examples", "batches"))
            part = new / part_name(0)
            write_part(part, self._parts.packing, self._pieces(), self.proof, examples, batches)

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor, Ids | None, Tensor | None]]:
        ids, origin = self._parts.ids, self.origin
        for start, chunk in self._parts.chunks():
            at = slice(start, start + len(chunk))
            own = None if ids is None else ids[at]
            yield chunk, self.valid[at], own, None if origin is None else origin[at]

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, ids: Any) -> RowStore:
        """The rows of some ids, one or many, in memory; of tokens all those of an example.

        Raises:
            KeyError: an id is not here.
        """
        wanted = as_ids("RowStore", ids)
        at = id_lists.positions_of(self._parts.ids, len(self), wanted)
        own = id_lists.picked(self.ids, at)
        origin = None if self.origin is None else self.origin[at]
        part = Part(self._parts.at(at), self._parts.packing, self.valid[at], own, origin)
        about = About(self.weights, self.about.passing, self.about.options)
        return RowStore.of(self.plan, Parts([part]), about)

    def __reduce__(self) -> Any:
        if self.path is None:
            return restored, (RowStore, self.__dict__)
        invalid = (~self.valid).nonzero().flatten()
        marks = [part.marks for part in sorted(self._parts.parts, key=lambda part: part.path)]
        return _opened, (self.path.absolute(), marks, invalid)

    @property
    def weights(self) -> str | None:
        """Fingerprint of the weights that made the rows, None if that is not known."""
        return self.about.weights

    @property
    def updates(self) -> str | None:
        """Of rows that are steps of an optimizer, which, and a digest of its state; None if not."""
        return self.about.options.get("updates")

    @property
    def parts(self) -> list[Part]:
        """What processes wrote, in order."""
        return self._parts.parts

    @property
    def finished(self) -> bool:
        """Whether all that was to be collected is there."""
        return self._parts.finished

    @property
    def device(self) -> torch.device:
        """Where the rows are; of a directory the CPU."""
        return self._parts.device

    @property
    def dtype(self) -> torch.dtype:
        """In which the rows are kept."""
        return self._parts.packing.dtype

    @property
    def read_dtype(self) -> torch.dtype:
        """In which the rows are read."""
        return self._parts.packing.read_dtype

    @property
    def ids(self) -> Ids:
        """Of each row: [n] int64, or n strings.

        Of a loader that tells what it draws, positions in the data set; what `ids=` gave; or else
        positions in the order in which examples came.
        """
        ids = self._parts.ids
        return torch.arange(len(self)) if ids is None else ids

    @property
    def origin(self) -> Tensor | None:
        """[n, 2] int64, or None if every row is an example in order.

        Of rows per token or segment the example (in the loader's order) and the token or segment;
        of rows that a callback took during training, the step and the example's position in the
        data set.
        """
        return self._parts.origin

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows."""
        return self._parts.num_bytes

    @property
    def rows(self) -> Tensor:
        """[n, R] all rows, verified; of one part on disk a memory map.

        Writing to that changes neither the file nor later passes.

        Of several parts, or of rows kept in fewer bytes, a copy in memory; `chunks` and `at` make
        none of all.
        """
        for _ in self._parts.chunks():
            pass
        rows = [part.packing.unpack(part.packed) for part in self._parts.parts]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def chunks(
        self, columns: Sequence[slice] = (slice(None),), most: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """The rows in order, as (position of the first, [c, R]) of about 16 MiB each.

        Args:
            columns: to read, which then stand side by side.
            most: rows at a time; None is all of such a chunk.

        Raises:
            ValueError: a chunk on disk does not have its checksum.
        """
        for start, packed in self._parts.chunks():
            step = len(packed) if most is None else most
            for first in range(0, len(packed), step):
                rows = self._parts.packing.unpack(packed[first : first + step], columns)
                yield start + first, rows

    def kept(self) -> Iterator[tuple[int, Kept]]:
        """Some chunks at a time as they are kept, for kernels that read them so."""
        for start, packed in self._parts.chunks(_AT_A_TIME):
            yield start, self._parts.packing.views(packed)
            del packed

    @property
    def bounds(self) -> tuple[int, ...]:
        """[L + 1] column bounds of the layers, each of which has a scale in `kept`."""
        return self._parts.packing.bounds

    def at(self, positions: Tensor | Sequence[int]) -> Tensor:
        """[k, R] the rows at these positions, verified; a copy.

        Raises:
            IndexError: there is no such position.
            ValueError: a chunk on disk does not have its checksum.
        """
        return self._parts.packing.unpack(self._parts.at(positions))

    def to_arrow(self) -> Any:
        """The rows as a pyarrow.Table (extra "arrow") over the memory or the map that they are in.

        Rows are verified, not copied: but for a part in memory that is not contiguous. The table
        keeps that memory, so nobody may write to it.

            table = RowStore.load("rows").to_arrow()
            datasets.Dataset(table).with_format("torch")[:8]["row"]  # [8, R]

        Returns:
            n rows, a chunk for each part, with columns "id" (int64 or string), "row" (a list of R
            float32 or float64), "valid" (bool) and, where there are origins, "origin" (a list of 2
            int64). The schema's metadata has JSON under "dropinf": the fingerprints "plan",
            "weights" and "updates", the "compression", and for each of "layers" its name, its first
            entry in a row, and r.

        Raises:
            ValueError: the rows are on a GPU, or are kept in a dtype that Arrow has no type for
                (bfloat16; float16 and int8 with their scales); or a chunk on disk does not have its
                checksum.
            ImportError: pyarrow is not installed.
        """
        return arrow.table_of(self)

    def verify(self) -> None:
        """Read everything and compare its checksums anew.

        Raises:
            ValueError: something is damaged.
        """
        if self.path is not None:
            Plan.load(self.path, read_about(self.path)[0])
        self._parts.verify()

    def describe(self) -> Table:
        """What is in here, and how it was made, as a table to print."""
        invalid = int((~self.valid).sum())
        ids = "strings" if isinstance(self.ids, list) else "integers"
        updates = [("updates of", self.updates)] if self.updates else []
        rows = [
            ("rows", f"{len(self):,}" + ("" if self.finished else ", not finished")),
            ("invalid", f"{invalid:,}"),
            ("ids", ids),
            ("width", f"{self.plan.width:,}"),
            ("kept in", str(self.dtype).removeprefix("torch.")),
            ("bytes", f"{self.num_bytes:,}"),
            ("path", self._where if self.path is None else str(self.path)),
            ("compression", repr(self.plan.compression)),
            ("plan", self.plan.fingerprint),
            ("weights", self.weights or "not known"),
            *updates,
            ("proof", str(self.proof)),
        ]
        return Table(("what", "is"), rows)

    @property
    def _where(self) -> str:
        """Of a store in memory, in which."""
        return "in memory" if self.device.type == "cpu" else f"on {self.device}"

    def __repr__(self) -> str:
        where = self._where if self.path is None else f"in {printable(str(self.path))}"
        kept = (
            "" if self.dtype == torch.float32 else f" in {str(self.dtype).removeprefix('torch.')}"
        )
        size = f"{len(self)} rows of width {self.plan.width}{kept}"
        so_far = "" if self.finished else " so far"
        return f"RowStore({size} {where}{so_far}, plan {self.plan.fingerprint}, {self.proof})"


def _opened(path: Path, marks: Sequence[Marks], invalid: Tensor) -> RowStore:
    """A store that was pickled as its path: the rows that it had then."""
    width, _, about = read_about(path)
    plan = Plan.load(path, width)
    store = RowStore.of(plan, Parts.open(path, width, marks).lay_out(plan), about, path)
    store.valid[:] = True
    store.valid[invalid] = False
    return store
