"""The contestants of quality.py: compressions, and dtypes in which Dropout's rows are kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import dropinf

# Of r over all layers and the seed.
COMPRESSIONS: dict[str, Callable[[int, int], Any]] = {
    "Dropout": lambda r, seed: dropinf.Dropout(total=r, seed=seed),
    "Sketch": lambda r, seed: dropinf.Sketch(total=r, s=4, seed=seed),
    "FactoredDropout": lambda r, seed: dropinf.FactoredDropout(total=r, seed=seed),
    "LoGra": lambda r, seed: dropinf.LoGra(total=r, seed=seed),
    "Gaussian": lambda r, seed: dropinf.Gaussian(total=r, seed=seed),
    "Rademacher": lambda r, seed: dropinf.Rademacher(total=r, seed=seed),
    "SJLT": lambda r, seed: dropinf.SJLT(total=r, seed=seed),
    "FJLT": lambda r, seed: dropinf.FJLT(total=r, seed=seed),
}
# And of the task's energies: coordinates drawn by them, and the layers' shares of r too.
BY_ENERGY: dict[str, Callable[[int, int, Any], Any]] = {
    "Dropout by energy": lambda r, seed, energies: dropinf.Dropout(
        total=r, seed=seed, energies=energies
    ),
    "Dropout and shares by energy": lambda r, seed, energies: dropinf.Dropout(
        total=r, seed=seed, energies=energies, allocation="energy"
    ),
}
# Rows of Dropout with the same coordinates, kept in fewer bytes.
KEPT = {f"Dropout in {dtype}": dtype for dtype in ("bfloat16", "float16", "int8")}

CONTESTANTS = (*COMPRESSIONS, *BY_ENERGY, *KEPT)
FULL = "Full"
DOT = "gradient dot product"


def plan_of(
    model: nn.Module, contestant: str, r: int, seed: int | None, energies: Callable[[], Any]
) -> dropinf.Plan:
    """What it keeps; `energies` is called if it goes by them."""
    if contestant in (FULL, DOT):
        return dropinf.Plan.make(model, dropinf.Full())
    if contestant in BY_ENERGY:
        return dropinf.Plan.make(model, BY_ENERGY[contestant](r, seed, energies()))
    name = "Dropout" if contestant in KEPT else contestant
    return dropinf.Plan.make(model, COMPRESSIONS[name](r, seed))


def kept_in(contestant: str) -> torch.dtype | None:
    """The dtype of its rows; None is that in which they are computed."""
    return getattr(torch, KEPT[contestant]) if contestant in KEPT else None
