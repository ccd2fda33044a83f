"""A fitted Cholesky in a directory: plan.json, solver.json, and factors.bin with its checksum."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from dropinf.compression import LayerPlan, Plan
from dropinf.manifest import field, integers, read_manifest, reason, sealed
from dropinf.rows import RowStore
from dropinf.solvers.damping import Damping
from dropinf.solvers.dual import Dual
from dropinf.solvers.factor_file import FileTensor, crc_of, write
from dropinf.solvers.group import Group, Layer, Setting
from dropinf.solvers.primal import Primal
from dropinf.text_table import printable
from dropinf.whole_files import appearing

_FORMAT = "dropinf cholesky 2"
_REMEDY = "fit and save it again"
_LAMBDA = fields(Layer)[3].name  # which is no ASCII
_FORMS = {form.form: form for form in (Primal, Dual)}
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def save_solver(
    kind: str,
    path: str | os.PathLike,
    plan: Plan,
    weights: str | None,
    updates: str | None,
    options: dict[str, Any],
    blocks: Sequence[LayerPlan],
    groups: Sequence[Group],
) -> None:
    """Write a directory, which appears whole or not at all."""
    path = Path(path)
    if os.path.lexists(path):
        raise FileExistsError(f"{kind}.save: {path} exists; remove it, or give another path")
    order = {block: l for l, block in enumerate(blocks)}
    setting = groups[0].setting
    with appearing(path) as new:
        new.mkdir()
        crc = 0
        with (new / "factors.bin").open("wb") as file:
            for group in groups:
                crc = write(file, group.read(), crc)
        (new / "plan.json").write_bytes(plan.saved())
        content = {
            "format": _FORMAT,
            "kind": kind,
            "fingerprint": plan.fingerprint,
            "weights": weights,
            "updates": updates,
            "options": options,
            "n": setting.n,
            "dtype": _name(setting.dtype),
            "part_bytes": setting.part_bytes,
            "groups": [
                {
                    "form": group.form,
                    "dtype": _name(group.setting.dtype),
                    "blocks": [order[block] for block in group.blocks],
                    "layers": [asdict(layer) for layer in group.layers],
                }
                for group in groups
            ],
            "factors_crc32": crc,
        }
        (new / "solver.json").write_bytes(sealed(content, indent=1))


@dataclass(frozen=True)
class Saved:
    """What `load_solver` found, checked."""

    plan: Plan
    weights: str | None
    updates: str | None
    options: dict[str, Any]
    setting: Setting
    file: Path
    parts: list[tuple[type[Group], torch.dtype, list[int], list[Layer]]]

    def groups(self, blocks: Sequence[LayerPlan], in_memory: int | None) -> list[Group]:
        """The groups; factors of more than `in_memory` bytes are left in the file, and their
        groups cut into some of at most so many bytes, or of one layer."""
        damaged = ValueError(
            f"{self.setting.op}.load: {self.file.parent}/solver.json is damaged: its layers are "
            f"not those of plan.json; {_REMEDY}"
        )
        if {l for *_, members, _ in self.parts for l in members} != set(range(len(blocks))):
            raise damaged
        groups, start, num_bytes = [], 0, self.file.stat().st_size
        whole = in_memory is None or num_bytes <= in_memory
        for form, dtype, members, layers in self.parts:
            setting = replace(self.setting, dtype=dtype)
            if [layer.r for layer in layers] != [blocks[l].r for l in members]:
                raise damaged
            sizes = [form.num_bytes(blocks[l], setting) for l in members]
            for some in [slice(None)] if whole else _runs(sizes, in_memory):
                group = form([blocks[l] for l in members[some]], setting)
                group.layers = layers[some]
                group.factors = FileTensor(self.file, start, *group.size())
                start += group.factors.num_bytes
                groups.append(group)
        if start != num_bytes:
            raise damaged
        if whole:
            for group in groups:
                group.factors = group.read()
        return groups


def _runs(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """What follows each other, of at most so many bytes together, or one."""
    first, total = 0, 0
    for at, size in enumerate(sizes):
        if at > first and total + size > most:
            yield slice(first, at)
            first, total = at, 0
        total += size
    yield slice(first, len(sizes))


def load_solver(kind: str, path: str | os.PathLike, store: RowStore | None) -> Saved:
    """Read and check a directory.

    Raises:
        FileNotFoundError: there is no solver at `path`.
        ValueError: it is damaged, of another class, or the store is not the one it needs.
    """
    path = Path(path)
    if not os.path.lexists(path / "solver.json"):
        raise FileNotFoundError(f"{kind}.load: {path} holds no solver (no solver.json in it)")
    saved = read_manifest(f"{kind}.load", path / "solver.json", _REMEDY)
    plan = Plan.load(path)
    try:
        if field(saved, "format", str) != _FORMAT:
            raise ValueError(f"'format' is not {_FORMAT!r}")
        known = field(saved, "fingerprint", str) == plan.fingerprint
        weights, updates = (
            None if saved.get(key) is None else field(saved, key, str)
            for key in ("weights", "updates")
        )
        options = field(saved, "options", dict)
        damping = Damping(kind, **options)
        dtype = _DTYPES[field(saved, "dtype", str)]
        n, part_bytes = (field(saved, key, int, 1, 1 << 62) for key in ("n", "part_bytes"))
        setting = Setting(kind, damping, dtype, n, part_bytes)
        parts = [
            (
                _FORMS[field(group, "form", str)],
                _DTYPES[field(group, "dtype", str)],
                integers(group, "blocks", 0, 1 << 31),
                _layers(field(group, "layers", list)),
            )
            for group in field(saved, "groups", list)
        ]
        crc, of_kind = field(saved, "factors_crc32", int), field(saved, "kind", str)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{kind}.load: {path}/solver.json is damaged: {reason(error)}; {_REMEDY}"
        ) from None
    if not known:
        raise ValueError(f"{kind}.load: {path}/solver.json and plan.json do not belong together")
    if of_kind != kind:
        saved_as = printable(str(of_kind))
        raise ValueError(f"{kind}.load: {path} holds a {saved_as}; use {saved_as}.load")
    file = path / "factors.bin"
    if not file.is_file() or crc_of(file) != crc:
        raise ValueError(f"{kind}.load: {file} is missing or damaged; fit and save it again")
    if store is None and any(layer.form == Dual.form for *_, layers in parts for layer in layers):
        raise ValueError(f"{kind}.load: layers in the n x n form need the rows again; give store=")
    if store is not None:
        found = store.plan.fingerprint, int(store.valid.sum())
        if found != (plan.fingerprint, setting.n):
            raise ValueError(
                f"{kind}.load: the solver was fitted on {setting.n} valid rows under plan "
                f"{plan.fingerprint}, the store has {found[1]} under {found[0]}"
            )
        if None not in (store.weights, weights) and store.weights != weights:
            raise ValueError(
                f"{kind}.load: the solver was fitted on rows of weights {weights}, the store has "
                f"rows of {store.weights}; give the store that it was fitted on"
            )
    return Saved(plan, weights, updates, options, setting, file, parts)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _layers(saved: list[Any]) -> list[Layer]:
    layers = []
    for layer in saved:
        field(layer, "r", int, 1, 1 << 48)
        field(layer, "exponent", int, -(1 << 20), 1 << 20)
        if not 0 <= field(layer, _LAMBDA, float) < math.inf or len(layer) != len(fields(Layer)):
            raise ValueError("a layer has no damping")
        layers.append(
            Layer(
                field(layer, "name", str),
                layer["r"],
                field(layer, "form", str),
                layer[_LAMBDA],
                tuple(integers(layer, "failed_pivots", 0, 1 << 48)),
                layer["exponent"],
            )
        )
        if layer["form"] not in (*_FORMS, "zero"):
            raise ValueError("a layer has an unknown form")
    return layers
