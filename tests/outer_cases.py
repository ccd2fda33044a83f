"""A call of `sampled_outer` that every backend takes; layers, and coordinates drawn in two ways."""

from typing import NamedTuple

import numpy as np
import torch

from dropinf.compression.energy import ParamEnergy
from dropinf.compression.energy_draw import draw_by_energy

good = {
    "x": torch.zeros(2, 3, 4),
    "dy": torch.zeros(2, 3, 5),
    "o_idx": torch.zeros(6, dtype=torch.int32),
    "i_idx": torch.zeros(6, dtype=torch.int32),
}


class Layer(NamedTuple):
    I: int
    O: int
    r: int
    element_size: int = 2
    bias: bool = False


def coordinates(layer, seed=0):
    """r distinct sorted coordinates (o, i) of a layer; [r] int32 each."""
    width = layer.I + layer.bias
    at = np.random.default_rng(seed).choice(layer.O * width, layer.r, replace=False)
    at = torch.from_numpy(np.sort(at))
    return (at // width).int(), (at % width).int()


def heavy(n, generator):
    """E g^2 of rows or columns over eight orders of magnitude, with three far above."""
    energies = np.exp(2 * generator.normal(size=n))
    energies[:3] *= 1e4
    return energies


def drawn_by_energy(layer, seed=0):
    """Likewise, which crowd in few rows and columns; none of the bias."""
    generator = np.random.default_rng(seed)
    energies = (heavy(n, generator) for n in (layer.O, layer.I))
    param = ParamEnergy.of((layer.O, layer.I), *energies)
    at = torch.from_numpy(draw_by_energy([param], layer.r, 0, 0)[0])
    return (at // layer.I).int(), (at % layer.I).int()
