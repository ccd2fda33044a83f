"""Plan: every layer's kept coordinates and its place in a row."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from dropinf.compression.allocation import LayerEnergies, entries_of
from dropinf.compression.baselines import FJLT, SJLT, Gaussian, LoGra, Rademacher
from dropinf.compression.dropout import Dropout, Full
from dropinf.compression.energy import Energies
from dropinf.compression.entry_map import EntryMap
from dropinf.compression.grid import FactoredDropout
from dropinf.compression.parts import Part
from dropinf.compression.sketch import Sketch
from dropinf.compression.tracking import Layers, tracked
from dropinf.manifest import MOST_BYTES, field, read_manifest, reason, sealed
from dropinf.text_table import Table
from dropinf.whole_files import appearing

Compression = (
    Dropout | Sketch | FactoredDropout | Full | Gaussian | Rademacher | SJLT | FJLT | LoGra
)
_COMPRESSIONS = {c.__name__: c for c in get_args(Compression)}
_FORMAT = "dropinf plan 2"
_REMEDY = "make the plan again, with Plan.make"
MOST_ENTRIES = 1 << 27  # of a plan in a file: their positions take 1 GiB
_MOST = 1 << 48  # parameters of a layer
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, IndexError)


@dataclass(frozen=True)
class ParamPlan:
    """One parameter of a block: where its entries stand in a row, and which they are."""

    name: str  # full name in the model, as in named_parameters()
    shape: tuple[int, ...]
    offset: int  # of its first entry in the row
    index: Tensor  # [n] int64, sorted positions in the flattened parameter
    scale: float | Tensor  # factor of the values there; [n] float64, or one for all
    entry_map: EntryMap | None = None  # makes entries of the values there; None takes each as one

    @cached_property
    def grid(self) -> tuple[Tensor, Tensor] | None:
        """(rows [a], columns [b]) of the parameter [O, ...] whose product `index` is, or None.

        One row or column alone is no grid.
        """
        I = math.prod(self.shape[1:])
        if len(self.shape) < 2 or not len(self.index):
            return None
        rows, columns = self.index // I, self.index % I
        b = int((rows == rows[0]).sum())
        a = len(self.index) // b
        if a < 2 or b < 2 or a * b != len(self.index):
            return None
        same = (rows.view(a, b) == rows[::b, None]).all() and (
            columns.view(a, b) == columns[:b]
        ).all()
        return (rows[::b].clone(), columns[:b].clone()) if same else None

    @property
    def is_scaled(self) -> bool:
        """Whether its values have a factor."""
        return isinstance(self.scale, Tensor) or self.scale != 1

    def scaled(self, values: Tensor, which: Tensor | slice | None = None) -> Tensor:
        """The values [..., k] at the coordinates numbered `which` [k], times their factor."""
        if not isinstance(self.scale, Tensor):
            return values * self.scale
        return values * (self.scale if which is None else self.scale[which]).to(values)

    @property
    def r(self) -> int:
        """Entries that it has a part in."""
        return len(self.index) if self.entry_map is None else self.entry_map.r

    @property
    def entries(self) -> slice:
        """Where its entries stand in a row; with an entry map, others' may be the same."""
        return slice(self.offset, self.offset + self.r)


@dataclass(frozen=True)
class LayerPlan:
    """One layer: a module with parameters of its own, which share one set of coordinates.

    The coordinates 0 .. P - 1 count through the flattened parameters, one after the other.
    """

    name: str
    slots: tuple[ParamPlan, ...]
    P: int
    r: int
    offset: int  # of its first entry in the row
    type: str = ""  # class of the module

    @property
    def entries(self) -> slice:
        """Where its entries stand in a row."""
        return slice(self.offset, self.offset + self.r)


class Plan:
    """The coordinates that every row keeps; a pure function of layer shapes and compression.

        plan = dropinf.Plan.make(model, dropinf.Dropout(r=1024), exclude="2.bias")
        print(plan.describe())
        plan.save("plan.json")

    Attributes:
        compression: what chose the coordinates.
        blocks: one `LayerPlan` a layer, in the order of the model's modules.
        width: R, entries in a row.
        has_entry_maps: whether entries are made of several coordinates, so that parameters
            share some.
        fingerprint: 16 hexadecimal digits; two plans with equal ones make comparable rows.
        paths: parameter name -> how its entries were computed so far, see `describe`.
        prepared: what captures made of the coordinates for their devices, kept for the next one;
            neither saved nor pickled.
    """

    def __init__(
        self,
        layers: Sequence[tuple[str, Sequence[tuple[str, tuple[int, ...]]]]],
        compression: Compression,
        types: Sequence[str] | None = None,
    ) -> None:
        """From (layer name, [(parameter name, shape), ...]) of every layer; see `make`.

        `types` are the classes of the layers, for people to read.
        """
        self.compression = compression
        self._layers = [(name, [(n, tuple(s)) for n, s in params]) for name, params in layers]
        sizes = [sum(math.prod(shape) for _, shape in params) for _, params in self._layers]
        blocks, offset = [], 0
        self._types = [""] * len(sizes) if types is None else list(types)
        bare = [(name, [s for _, s in params]) for name, params in self._layers]
        energies = _energies(compression, self._layers)
        kept = compression.keep(bare, *energies)
        for (name, params), P, parts, kind in zip(
            self._layers, sizes, kept, self._types, strict=True
        ):
            slots = _slots(params, parts, offset)
            r = max(slot.entries.stop for slot in slots) - offset
            blocks.append(LayerPlan(name, slots, P, r, offset, kind))
            offset += r
        self.blocks = tuple(blocks)
        self.width = offset
        self.has_entry_maps = any(
            s.entry_map is not None for block in self.blocks for s in block.slots
        )
        self.paths: dict[str, str] = {}
        self.prepared: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Its keys hold addresses, which mean nothing in another process.
        return {**self.__dict__, "prepared": {}}

    @classmethod
    def make(
        cls,
        model: nn.Module,
        compression: Compression,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
    ) -> Plan:
        """A plan for the trainable parameters of `model`.

        Args:
            model: its parameters with requires_grad are tracked; a tied parameter belongs to the
                first module that owns it.
            compression: which coordinates a layer keeps.
            include: names of layers or parameters to track, None for all. A name takes everything
                below it; `*`, `?` and `[...]` match as in a shell.
            exclude: names to leave out of those.

        Raises:
            ValueError: a name matches nothing, nothing is left to track, or a parameter is complex.
        """
        if not isinstance(compression, tuple(_COMPRESSIONS.values())):
            known = ", ".join(_COMPRESSIONS)
            raise ValueError(f"Plan.make: compression must be one of {known}, got {compression!r}")
        layers, types = tracked("Plan.make", model, include, exclude)
        return cls(layers, compression, types)

    @cached_property
    def slots(self) -> tuple[ParamPlan, ...]:
        """The parameters of all blocks, in row order."""
        return tuple(slot for block in self.blocks for slot in block.slots)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the shapes and coordinates; names of layers do not count."""
        digest = hashlib.sha256(_FORMAT.encode())
        for block in self.blocks:
            shapes = [slot.shape for slot in block.slots]
            digest.update(json.dumps([shapes, block.r]).encode())
            for slot in block.slots:
                digest.update(slot.index.numpy().astype("<i8").tobytes())
                if isinstance(slot.scale, Tensor):
                    digest.update(slot.scale.numpy().astype("<f8").tobytes())
                if slot.entry_map is not None:
                    digest.update(slot.entry_map.digest())
        return digest.hexdigest()[:16]

    def describe(self) -> Table:
        """A table, to print, of the layers: what is kept of each, and how it is computed.

        The path is what captures under this plan have taken so far: "closed form" samples the
        coordinates from the layer's input and output gradient; "pulled back" does so for what is
        made of the parameter, for one example after the other; "gradient formed" projects gradients
        that are formed a few examples at a time; "a pass for each loss" is slow, and says at which
        function examples were not known apart; ".grad" reads gradient buffers.
        """
        rows, notes = [], []
        for block in self.blocks:
            paths = {self.paths.get(slot.name, "not run yet") for slot in block.slots}
            rows.append(
                (
                    block.name or "(model)",
                    block.type,
                    f"{block.P:,}",
                    " + ".join(sorted(paths)),
                    f"{block.r:,}",
                    f"{4 * block.r:,}",
                )
            )
        P = sum(block.P for block in self.blocks)
        rows.append(("total", "", f"{P:,}", "", f"{self.width:,}", f"{4 * self.width:,}"))
        if not isinstance(self.compression, Full):
            layers = [(name, [s for _, s in params]) for name, params in self._layers]
            wanted = sum(
                entries_of(self.compression, layers, *_energies(self.compression, self._layers))
            )
            if wanted > self.width:
                notes.append(
                    f"{wanted:,} entries were asked for: grids of a x b have no more than "
                    f"{self.width:,} of them"
                )
        columns = ("layer", "type", "parameters", "path", "entries", "bytes a row")
        return Table(columns, rows, right=(2, 4, 5), notes=notes)

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as one small JSON file; an existing file is replaced at once or not."""
        with appearing(Path(path), replace=True) as new:
            new.write_bytes(self.saved())

    def saved(self) -> bytes:
        """What `save` writes.

        Raises:
            ValueError: it is more than `load` reads.
        """
        content = {
            "format": _FORMAT,
            "compression": self._saved_compression(),
            "layers": self._layers,
            "types": self._types,
            "width": self.width,
            "fingerprint": self.fingerprint,
        }
        text = sealed(content, indent=1)
        if len(text) > MOST_BYTES:
            raise ValueError(
                f"Plan.save: {len(self.slots):,} parameters with their energies take "
                f"{len(text):,} bytes, more than the {MOST_BYTES:,} of a plan; leave some out "
                "with include= or exclude="
            )
        return text

    def _saved_compression(self) -> dict[str, Any]:
        chosen = self.compression
        saved = {"kind": type(chosen).__name__}
        saved |= {f.name: getattr(chosen, f.name) for f in fields(chosen)}
        energies = saved.pop("energies", None)
        if energies is not None:
            saved["energies"] = energies.saved(slot.name for slot in self.slots)
        return saved

    @classmethod
    def load(cls, path: str | os.PathLike, width: int | None = None) -> Plan:
        """Read a plan from its file, or from the directory of a `RowStore`.

        Args:
            path: of the file or directory.
            width: R that it must have; None takes any.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or not a plan, or its rows have another width.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "plan.json"
        if not os.path.lexists(file):
            raise FileNotFoundError(f"Plan.load: there is no {file}")
        saved = read_manifest("Plan.load", file, _REMEDY)
        try:
            if field(saved, "format", str) != _FORMAT:
                raise ValueError(f"'format' is not {_FORMAT!r}")
            told = field(saved, "width", int, 1, MOST_ENTRIES)
            if width not in (None, told):
                raise ValueError(f"rows under it have width {told}, not {width}")
            layers = _layers(field(saved, "layers", list))
            compression = dict(field(saved, "compression", dict))
            kind = _COMPRESSIONS[compression.pop("kind")]
            if "energies" in compression:
                compression["energies"] = Energies.load(compression["energies"])
            chosen = kind(**compression)
            _refuse_large(chosen, layers, told)
            types = field(saved, "types", list)
            if len(types) != len(layers) or not all(isinstance(kind, str) for kind in types):
                raise ValueError("'types' must be a name for each layer")
            plan = cls(layers, chosen, types)
            if field(saved, "fingerprint", str) != plan.fingerprint or plan.width != told:
                raise ValueError("its coordinates do not have its fingerprint")
        except _DAMAGE as error:
            raise ValueError(
                f"Plan.load: {file} is damaged or not a plan: {reason(error)}; {_REMEDY}"
            ) from None
        return plan

    def __repr__(self) -> str:
        return (
            f"Plan({self.compression}, {len(self.blocks)} layers, width {self.width}, "
            f"fingerprint {self.fingerprint})"
        )


def _layers(saved: list[Any]) -> Layers:
    """The layers in a file.

    Raises:
        ValueError: they are none.
    """
    layers = []
    for name, params in saved:
        shapes = [(p, tuple(shape)) for p, shape in params]
        for p, shape in shapes:
            whole = all(type(size) is int and 0 < size <= _MOST for size in shape)
            if not isinstance(p, str) or not whole or math.prod(shape) > _MOST:
                raise ValueError("a parameter has no name, or no size")
        if not isinstance(name, str) or not shapes:
            raise ValueError("a layer has no name, or no parameters")
        layers.append((name, shapes))
    return layers


def _energies(compression: Compression, layers: Sequence[Any]) -> tuple[LayerEnergies, ...]:
    """What `keep` and `entries_of` take besides the layers: their energies, if it goes by some."""
    energies = getattr(compression, "energies", None)
    return () if energies is None else (energies.of_layers("Plan", layers),)


def _refuse_large(compression: Compression, layers: Sequence[Any], width: int) -> None:
    """Raise before a plan is made that has more entries than its file says."""
    bare = [(name, [shape for _, shape in params]) for name, params in layers]
    sizes = [sum(map(math.prod, shapes)) for _, shapes in bare]
    entries = sum(sizes)
    if not isinstance(compression, Full):
        entries = sum(entries_of(compression, bare, *_energies(compression, layers)))
    positions = entries if isinstance(compression, Dropout | FactoredDropout) else sum(sizes)
    if isinstance(compression, Sketch):
        positions = min(positions, entries * compression.s)
    grids = isinstance(compression, FactoredDropout | LoGra)  # which may have fewer than asked for
    if (entries != width and not grids) or positions > MOST_ENTRIES:
        raise ValueError(f"{entries} entries were asked for, where rows have {width}")


def _slots(
    params: Sequence[tuple[str, tuple[int, ...]]], parts: Sequence[Part], offset: int
) -> tuple[ParamPlan, ...]:
    return tuple(
        ParamPlan(
            name,
            shape,
            offset + part.first,
            torch.from_numpy(part.index),
            torch.from_numpy(part.scale) if isinstance(part.scale, np.ndarray) else part.scale,
            part.entry_map,
        )
        for (name, shape), part in zip(params, parts, strict=True)
    )
