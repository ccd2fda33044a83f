"""A fitted Cholesky in a directory: plan.json, solver.json, and factors.bin with its checksum."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dropinf.compression import LayerPlan, Plan
from dropinf.rows import RowStore
from dropinf.solvers.damping import Damping
from dropinf.solvers.dual import Dual
from dropinf.solvers.factor_file import FileTensor, crc_of, write
from dropinf.solvers.group import Group, Layer, Setting
from dropinf.solvers.primal import Primal
from dropinf.text_table import printable

_FORMAT = "dropinf cholesky 1"
_FORMS = {form.form: form for form in (Primal, Dual)}
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def save_solver(
    kind: str,
    path: str | os.PathLike,
    plan: Plan,
    options: dict[str, Any],
    blocks: Sequence[LayerPlan],
    groups: Sequence[Group],
) -> None:
    """Write a directory, which appears whole or not at all."""
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{kind}.save: {path} exists; remove it, or give another path")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
    order = {block: l for l, block in enumerate(blocks)}
    setting = groups[0].setting
    try:
        crc = 0
        with (partial / "factors.bin").open("wb") as file:
            for group in groups:
                crc = write(file, group.read(), crc)
        plan.save(partial / "plan.json")
        text = json.dumps(
            {
                "format": _FORMAT,
                "kind": kind,
                "fingerprint": plan.fingerprint,
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
                "crc32": crc,
            },
            indent=1,
        )
        (partial / "solver.json").write_text(text)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class Saved:
    """What `load_solver` found, checked."""

    plan: Plan
    options: dict[str, Any]
    setting: Setting
    file: Path
    parts: list[tuple[type[Group], torch.dtype, list[int], list[Layer]]]

    def groups(self, blocks: Sequence[LayerPlan], in_memory: int | None) -> list[Group]:
        """The groups, with their factors in memory if they are of at most `in_memory` bytes."""
        groups, start = [], 0
        for form, dtype, members, layers in self.parts:
            group = form([blocks[l] for l in members], replace(self.setting, dtype=dtype))
            group.layers = layers
            size, dtype = group.size()
            group.factors = FileTensor(self.file, start, size, dtype)
            start += size * dtype.itemsize
            groups.append(group)
        if in_memory is None or start <= in_memory:
            for group in groups:
                group.factors = group.read()
        return groups


def load_solver(kind: str, path: str | os.PathLike, store: RowStore | None) -> Saved:
    """Read and check a directory.

    Raises:
        FileNotFoundError: there is no solver at `path`.
        ValueError: it is damaged, of another class, or the store is not the one it needs.
    """
    path = Path(path)
    if not (path / "solver.json").is_file():
        raise FileNotFoundError(f"{kind}.load: {path} holds no solver (no solver.json in it)")
    plan = Plan.load(path)
    try:
        saved = json.loads((path / "solver.json").read_text())
        options = saved["options"]
        known = saved["format"] == _FORMAT and saved["fingerprint"] == plan.fingerprint
        damping = Damping(kind, **options)
        dtype = _DTYPES[saved["dtype"]]
        setting = Setting(kind, damping, dtype, int(saved["n"]), int(saved["part_bytes"]))
        parts = [
            (_FORMS[g["form"]], _DTYPES[g["dtype"]], g["blocks"], _layers(g["layers"]))
            for g in saved["groups"]
        ]
        crc, of_kind = saved["crc32"], saved["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{kind}.load: {path}/solver.json is damaged: {error!r}") from error
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
    return Saved(plan, options, setting, file, parts)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _layers(saved: list[dict[str, Any]]) -> list[Layer]:
    return [Layer(**{**layer, "failed_pivots": tuple(layer["failed_pivots"])}) for layer in saved]
