"""Compressions: which coordinates of a layer's gradient are kept, and where they stand in a row."""

from dropinf.compression.baselines import FJLT, SJLT, Gaussian, LoGra, Rademacher
from dropinf.compression.dropout import Dropout, Full
from dropinf.compression.entry_map import DenseProjection, SignedSums, by_entry
from dropinf.compression.grid import FactoredDropout
from dropinf.compression.plan import (
    Compression,
    LayerPlan,
    ParamPlan,
    Plan,
    peeled,
    refuse_replicas,
    unwrap,
)
from dropinf.compression.projections import Kron
from dropinf.compression.projector import DropoutProjector
from dropinf.compression.sketch import Sketch

__all__ = [
    "FJLT",
    "SJLT",
    "Compression",
    "DenseProjection",
    "Dropout",
    "DropoutProjector",
    "FactoredDropout",
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
    "peeled",
    "refuse_replicas",
    "unwrap",
]
