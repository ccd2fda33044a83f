"""Energies: the mean squares of gradients, in so few numbers that a plan holds them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dropinf.manifest import field, integers
from dropinf.user_warning import warn_user

STEPS = 8  # levels an octave of energy: a coordinate's is at most 9 percent off
TOP = 255  # the level of the largest row, and column; 0 is no energy at all
_MOST_SHIFT = 1 << 15
_MOST_SIZE, _MOST_DIMS = 1 << 48, 64  # of a parameter in a file; torch sums no more dimensions
_NAMED = 3  # layers in a warning
_WAY_OUT = "measure those of this model, with dropinf.energies"


def sides(shape: Sequence[int]) -> tuple[int, int]:
    """(a, b): the matrix that a parameter is taken for, with the fewest rows + columns.

    A convolution's is output channels x (input channels and taps), that of packed experts
    [E, I, O] is (experts and inputs) x outputs, that of a vector one column.
    """
    if len(shape) < 2:
        return math.prod(shape), 1
    cuts = [(math.prod(shape[:d]), math.prod(shape[d:])) for d in range(1, len(shape))]
    return min(cuts, key=sum)


@dataclass(frozen=True, eq=False)
class ParamEnergy:
    """The energies of one parameter, as integers; coordinate (o, i) of its matrix has

        E g^2 = 2 ^ ((rows[o] + columns[i] - 2 * TOP + shift) / STEPS),

    and none where one of its levels is 0.

    Attributes:
        shape: of the parameter.
        rows, columns: [a], [b] uint8 levels.
        shift: of all coordinates.
    """

    shape: tuple[int, ...]
    rows: np.ndarray
    columns: np.ndarray
    shift: int

    @classmethod
    def of(cls, shape: Sequence[int], rows: np.ndarray, columns: np.ndarray) -> ParamEnergy:
        """Of E g^2 = rows[o] * columns[i], float64 that are finite and not negative."""
        # Of each by itself, as a product may be beyond what a float holds.
        (r, top_r), (c, top_c) = _levels(rows), _levels(columns)
        return cls(tuple(shape), r, c, top_r + top_c)

    @property
    def is_zero(self) -> bool:
        """Whether no coordinate has any."""
        return not (self.rows.any() and self.columns.any())

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows [a] and columns [b], whose products are the E g^2."""
        rows, columns = (
            np.where(levels > 0, 2.0 ** ((levels.astype(np.float64) - TOP) / STEPS), 0)
            for levels in (self.rows, self.columns)
        )
        return rows * 2.0 ** (self.shift / STEPS), columns

    def saved(self) -> dict[str, Any]:
        """As JSON."""
        rows, columns = (
            base64.b64encode(levels.tobytes()).decode() for levels in (self.rows, self.columns)
        )
        return {"shape": list(self.shape), "rows": rows, "columns": columns, "shift": self.shift}

    @classmethod
    def load(cls, saved: Any) -> ParamEnergy:
        """What `saved` gave.

        Raises:
            ValueError: it is anything else.
        """
        if type(saved) is not dict:
            raise ValueError("the energies of a parameter are no JSON object")
        shape = integers(saved, "shape", 1, _MOST_SIZE)
        if len(shape) > _MOST_DIMS:
            raise ValueError(f"'shape' of energies has {len(shape)} dimensions")
        levels = []
        for key, size in zip(("rows", "columns"), sides(shape), strict=True):
            try:
                text = base64.b64decode(field(saved, key, str), validate=True)
            except binascii.Error:
                raise ValueError(f"{key!r} of energies is not base64") from None
            if len(text) != size:
                raise ValueError(f"{key!r} of energies has {len(text)} levels, not {size}")
            levels.append(np.frombuffer(text, dtype=np.uint8))
        return cls(tuple(shape), *levels, field(saved, "shift", int, -_MOST_SHIFT, _MOST_SHIFT))


class Energies:
    """E g^2 of the coordinates of a model's parameters, for draws that follow them.

    Made by `dropinf.energies` or `dropinf.energies_from_adam`. A parameter's are the products of
    rows [a] and columns [b] of the matrix that `sides` takes it for, kept as integer levels, so
    that what is drawn from them is the same on every machine.

        energies = dropinf.energies(model, loader, loss_fn)
        rows, columns = energies["0.weight"]  # [O] and [I]: E g_oi^2 is rows[o] * columns[i]

    Attributes:
        params: by the names of the parameters, in their order in the model.
        size: numbers of all parameters together.
        fingerprint: 16 hexadecimal digits of shapes and levels; names do not count.
    """

    def __init__(self, params: Mapping[str, ParamEnergy]) -> None:
        """By the names of the parameters.

        Raises:
            TypeError: there is something else among them.
        """
        self.params = dict(params)
        for name, param in self.params.items():
            if not isinstance(param, ParamEnergy):
                raise TypeError(
                    f"Energies: {name!r} has a {type(param).__name__}; make them with "
                    "dropinf.energies, or of mean squares with Energies.of"
                )

    @classmethod
    def of(
        cls,
        op: str,
        found: Mapping[str, tuple[Sequence[int], np.ndarray, np.ndarray]],
    ) -> Energies:
        """Of (shape, rows [a], columns [b]) of each parameter, whose products are its E g^2.

        Raises:
            ValueError: some are NaN, infinite or negative, or all are zero; or of other sizes.
        """
        for name, (shape, rows, columns) in found.items():
            if (len(rows), len(columns)) != sides(shape):
                raise ValueError(
                    f"{op}: {name!r} of shape {tuple(shape)} has {len(rows)} rows and "
                    f"{len(columns)} columns of energies, which must be {sides(shape)}; give "
                    "those of its matrix"
                )
            for values in (rows, columns):
                wrong = values[~(np.isfinite(values) & (values >= 0))]
                if len(wrong):
                    raise ValueError(
                        f"{op}: the mean squares of {name!r} must be finite and not negative, got "
                        f"{wrong[0]}; look for losses or gradients that are not finite"
                    )
        if not any(rows.any() and columns.any() for _, rows, columns in found.values()):
            raise ValueError(
                f"{op}: every gradient was zero, so that there is nothing to draw by; measure "
                "where the model has something to learn"
            )
        return cls({name: ParamEnergy.of(*parts) for name, parts in found.items()})

    def of_layers(self, op: str, layers: Sequence[Any]) -> list[list[ParamEnergy]]:
        """Those of (layer name, [(parameter name, shape), ...]).

        Raises:
            ValueError: they are of another model.
        """
        for _, params in layers:
            for name, shape in params:
                if name not in self.params:
                    raise ValueError(
                        f"{op}: the energies have no {name!r}; {_WAY_OUT}, or leave it out of the "
                        "plan with exclude="
                    )
                if self.params[name].shape != tuple(shape):
                    raise ValueError(
                        f"{op}: {name!r} has shape {tuple(shape)}, and the energies are of one of "
                        f"shape {self.params[name].shape}; {_WAY_OUT}"
                    )
        return [[self.params[name] for name, _ in params] for _, params in layers]

    @property
    def size(self) -> int:
        """Numbers of all parameters together."""
        return sum(math.prod(param.shape) for param in self.params.values())

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of shapes and levels; names do not count."""
        digest = hashlib.sha256()
        for param in self.params.values():
            digest.update(json.dumps([param.shape, param.shift]).encode())
            digest.update(param.rows.tobytes() + param.columns.tobytes())
        return digest.hexdigest()[:16]

    def warn_of_zeros(self, op: str, layers: Sequence[Any]) -> None:
        """Warn if layers (name, [(parameter name, shape), ...]) have no energy at all."""
        none = []
        for layer, params in layers:
            known = [self.params[name] for name, _ in params if name in self.params]
            if known and all(param.is_zero for param in known):
                none.append(layer or "(model)")
        if none:
            more = f" and {len(none) - _NAMED} more" if len(none) > _NAMED else ""
            warn_user(
                f"{op}: every gradient of {', '.join(map(repr, none[:_NAMED]))}{more} was zero, so "
                "that draws there are uniform, and allocation='energy' gives a tenth of a share by "
                "size; if they will have gradients (as LoRA's A once B is not 0), measure after "
                "some steps of training, or take another allocation"
            )

    def __getitem__(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Rows [a] and columns [b] of a parameter, float64; their products are its E g^2."""
        return self.params[name].values()

    def __iter__(self) -> Iterator[str]:
        return iter(self.params)

    def __len__(self) -> int:
        return len(self.params)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Energies) and self.saved(self) == other.saved(other)

    def __hash__(self) -> int:
        return hash(tuple(self.params))

    def __repr__(self) -> str:
        return f"<Energies of {len(self)} parameters>"

    def saved(self, names: Any) -> dict[str, Any]:
        """Those of some parameters, as JSON."""
        return {name: self.params[name].saved() for name in names}

    @classmethod
    def load(cls, saved: Any) -> Energies:
        """What `saved` gave.

        Raises:
            ValueError: it is anything else.
        """
        if type(saved) is not dict:
            raise ValueError("'energies' are no JSON object")
        return cls({name: ParamEnergy.load(param) for name, param in saved.items()})


def energy_of(param: ParamEnergy, least: int) -> int:
    """The sum of a parameter's E g^2, in units that are the same for the same `least` shift."""
    energy = table(STEPS)
    steps = param.shift - least
    rows, columns = (
        sum(int(n) * e for n, e in zip(np.bincount(levels, minlength=TOP + 1), energy, strict=True))
        for levels in (param.rows, param.columns)
    )
    return rows * columns * energy[STEPS + steps % STEPS] << steps // STEPS


def _levels(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Levels [n] uint8, and how many steps above 1 the largest is."""
    values = np.asarray(values, dtype=np.float64)
    some = values > 0
    logs = STEPS * np.log2(values, where=some, out=np.zeros_like(values))
    top = round(float(logs[some].max())) if some.any() else 0
    levels = np.where(some, np.clip(TOP + np.rint(logs - top), 0, TOP), 0)
    return levels.astype(np.uint8), top


def table(steps: int) -> list[int]:
    """Of each level: 1024 * 2 ^ (level / steps), rounded down; 0 of level 0. `steps` is 8 or 16.

    In integers, so that no machine's logarithm decides.
    """
    roots = [_root(1024**steps << k, steps) for k in range(steps)]
    return [0, *(roots[level % steps] << level // steps for level in range(1, TOP + 1))]


def _root(value: int, steps: int) -> int:
    """Of degree `steps`, a power of two, rounded down."""
    for _ in range(steps.bit_length() - 1):
        value = math.isqrt(value)
    return value
