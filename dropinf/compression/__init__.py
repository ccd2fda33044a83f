"""Compressions: which coordinates of a layer's gradient are kept, and where they stand in a row."""

from dropinf.compression.adam_energies import energies_from_adam
from dropinf.compression.baselines import FJLT, SJLT, Gaussian, LoGra, Rademacher
from dropinf.compression.coordinates import coordinates_of
from dropinf.compression.dropout import Dropout, Full
from dropinf.compression.energy import Energies
from dropinf.compression.energy_fit import FewOfEach, fit
from dropinf.compression.entry_map import DenseProjection, SignedSums, by_entry
from dropinf.compression.grid import FactoredDropout
from dropinf.compression.parts import draw
from dropinf.compression.plan import (
    Compression,
    LayerPlan,
    ParamPlan,
    Plan,
)
from dropinf.compression.projections import Kron
from dropinf.compression.projector import DropoutProjector
from dropinf.compression.sketch import Sketch
from dropinf.compression.tracking import peeled, refuse_replicas, tracked, unwrap

__all__ = [
    "FJLT",
    "SJLT",
    "Compression",
    "DenseProjection",
    "Dropout",
    "DropoutProjector",
    "Energies",
    "FactoredDropout",
    "FewOfEach",
    "Full",
    "Gaussian",
    "Kron",
    "LayerPlan",
    "LoGra",
    "ParamPlan",
    "Plan",
    "Rademacher",
    "SignedSums",
    "Sketch",
    "by_entry",
    "coordinates_of",
    "draw",
    "energies_from_adam",
    "fit",
    "peeled",
    "refuse_replicas",
    "tracked",
    "unwrap",
]
