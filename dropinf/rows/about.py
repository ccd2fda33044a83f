"""What a store says of all its rows: store.json, and the names of its parts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dropinf import manifest
from dropinf.capturing import Proof
from dropinf.compression import Plan

_FORMAT = "dropinf rows 2"
_REMEDY = "collect it again"


@dataclass
class About:
    """What store.json says of all rows.

    Attributes:
        weights: their fingerprint, None where it is not known, as of weights that changed.
        passing: the buffers that each pass changes, which are no part of it.
        options: of `collect` that shape rows.
        first: of the first batch, how many examples it has, and a checksum of what is in it.
    """

    weights: str | None = None
    passing: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    first: dict[str, int] | None = None


def part_name(number: int) -> str:
    """The directory of a part."""
    return f"part-{number:06d}"


def part_paths(path: Path) -> list[Path]:
    """The parts of a store, in order.

    Raises:
        ValueError: one is missing.
    """
    names = [entry.name for entry in os.scandir(path) if re.fullmatch(r"part-\d{6}", entry.name)]
    for number, name in enumerate(sorted(names)):
        if name != part_name(number):
            raise ValueError(f"RowStore: {path / part_name(number)} is missing; {_REMEDY}")
    return [path / name for name in sorted(names)]


def write_about(path: Path, plan: Plan, about: About) -> None:
    """Write plan.json and store.json into a new directory, which its maker syncs."""
    (path / "plan.json").write_bytes(plan.saved())
    content = {
        "format": _FORMAT,
        "width": plan.width,
        "fingerprint": plan.fingerprint,
        "weights": about.weights,
        "passing": about.passing,
        "options": about.options,
        "first": about.first,
    }
    (path / "store.json").write_bytes(manifest.sealed(content, indent=1))


def read_about(path: Path) -> tuple[int, str, About]:
    """The width, the plan's fingerprint, and what else store.json says.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    file = path / "store.json"
    if not os.path.lexists(file):
        raise FileNotFoundError(f"RowStore.load: {path} holds no store (no store.json in it)")
    _refuse_old(file)
    saved = manifest.read_manifest("RowStore.load", file, _REMEDY)
    try:
        if manifest.field(saved, "format", str) != _FORMAT:
            raise ValueError(f"'format' is not {_FORMAT!r}")
        width = manifest.field(saved, "width", int, 1, 1 << 48)
        fingerprint = manifest.field(saved, "fingerprint", str)
        weights = saved.get("weights")
        if weights is not None:
            weights = manifest.field(saved, "weights", str)
        passing = manifest.field(saved, "passing", list)
        if not all(type(name) is str for name in passing):
            raise ValueError("'passing' holds something else than names")
        options = manifest.field(saved, "options", dict)
        first = saved.get("first")
        if first is not None:
            first = manifest.field(saved, "first", dict)
            for key in ("examples", "crc32"):
                manifest.field(first, key, int, 0, 1 << 48)
    except ValueError as error:
        raise ValueError(f"RowStore.load: {file} is damaged: {error}; {_REMEDY}") from None
    return width, fingerprint, About(weights, passing, options, first)


def _load_proof(saved: Any) -> Proof:
    """A proof as a journal has it.

    Raises:
        ValueError: it is none.
    """
    try:
        return Proof.load(saved)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"RowStore: the proof in the journal is damaged ({type(error).__name__}); {_REMEDY}"
        ) from None


def proof_of(states: Iterable[dict[str, Any]]) -> Proof:
    """What was compared in all parts, by what their journals say of the collection."""
    proof = Proof()
    for state in states:
        if "proof" in state:
            own = _load_proof(state["proof"])
            proof.examples += own.examples
            proof.layers |= own.layers
            proof.largest = max(proof.largest, own.largest)
    return proof


def _refuse_old(file: Path) -> None:
    try:
        text = manifest.read_regular(file)
    except (FileNotFoundError, ValueError):
        return  # which is said later
    if b'"dropinf rows 1"' in text:
        raise ValueError(
            f"RowStore.load: {file.parent} is of an older dropinf, without parts; {_REMEDY}"
        )
