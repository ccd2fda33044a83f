"""λ_l of every layer: relative or absolute, one for all layers or one for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from dropinf.compression import LayerPlan


class Damping:
    """λ_l = damping · trace(F_l) / r_l (arXiv 2509.15651, section 3), or λ_l = damping.

    Args:
        op: who asks, for errors.
        damping: one number from 0 for all layers; or name or shell pattern -> number, of which a
            layer takes the first that matches.
        absolute: `damping` is λ_l itself.
    """

    def __init__(self, op: str, damping: float | Mapping[str, float], absolute: bool) -> None:
        numbers = damping.values() if isinstance(damping, Mapping) else [damping]
        for number in numbers:
            if not isinstance(number, (int, float)) or not 0 <= number < math.inf:
                raise ValueError(f"{op}: damping must be a number from 0, got {number!r}")
        self._op, self._damping, self.absolute = op, damping, absolute

    def of(self, blocks: Sequence[LayerPlan]) -> list[float]:
        """The damping of each layer.

        Raises:
            ValueError: a layer has none, or a pattern takes no layer.
        """
        if not isinstance(self._damping, Mapping):
            return [float(self._damping)] * len(blocks)
        chosen, used = [], set()
        for block in blocks:
            hits = [p for p in self._damping if fnmatchcase(block.name, p)]
            if not hits:
                raise ValueError(
                    f"{self._op}: damping has no entry for layer {block.name!r}; "
                    "add one, or '*' for all the others"
                )
            used.update(hits)
            chosen.append(float(self._damping[hits[0]]))
        for pattern in self._damping:
            if pattern not in used:
                names = [block.name for block in blocks][:3]
                raise ValueError(
                    f"{self._op}: damping[{pattern!r}] matches no layer; names here are like "
                    f"{str(names)[1:-1]}"
                )
        return chosen

    def λ(self, number: float, mean_diagonal: float) -> float:
        """λ_l of a layer with that damping and mean of F_l's diagonal."""
        return number if self.absolute else number * mean_diagonal

    def lambdas(self, blocks: Sequence[LayerPlan], diagonal: Tensor) -> list[float]:
        """λ_l of each layer, from the diagonal of F [R]."""
        return [
            self.λ(number, float(diagonal[block.entries].mean()))
            for number, block in zip(self.of(blocks), blocks, strict=True)
        ]
