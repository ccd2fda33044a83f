"""DropoutProjector: the interface of TRAK's and dattri's projectors, without their matrix."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dropinf.compression.energy import Energies, ParamEnergy
from dropinf.compression.parts import draw_layer

Grads = Tensor | Mapping[str, Tensor] | Sequence[Tensor]

_TYPES = ("dropout", "sketch")


class _Mask(NamedTuple):
    """What one model's projection keeps."""

    index: Tensor  # [n] int64, sorted coordinates
    group: Tensor | None  # [r, s] which of them each entry sums, or None if entry k is number k
    sign: Tensor | None  # [r, s] +1, -1, times 1 / sqrt(pi); 0 where an entry has fewer than s
    scale: float | Tensor  # factor of the entries; [r], or one for all
    # Sizes of the parts -> for each that has some: its number, where they go, positions in it.
    places: dict[tuple[int, ...], list[tuple[int, slice, Tensor]]]


class DropoutProjector:
    """Keeps sampled coordinates of per-example gradients, the same for every example.

    proj_type "dropout": entry k is coordinate i_k, drawn uniformly without replacement (arXiv
    2509.15651, section 3.1), times sqrt(D / r). "sketch": entry k is the sum of s coordinates with
    random signs, r s of all D drawn without replacement (all D once r s ≥ D), times
    sqrt(D / (r s)). By energy, coordinate j is drawn with a probability pi_j in proportion to
    sqrt(E g_j^2), as in `dropinf.Dropout`, and its factor is 1 / sqrt(pi_j). So a product of two
    projections is unbiased for that of the gradients, whatever the energies. The coordinates depend
    on (grad_dim, proj_dim, seed, model_id, energies) alone: any device, batch size and dtype has
    the same.

    Time is O(B r) and memory O(r), beside O(B r) for the result, and the energies. Gradients are
    read where they are: a dictionary or list of parameters is neither flattened, joined nor cast.

        projector = dropinf.DropoutProjector(grad_dim=1539, proj_dim=256, seed=0)
        features = projector.project(torch.randn(8, 1539), model_id=0)  # [8, 256]

    Args:
        grad_dim: D, numbers in an example's gradient; may exceed 2^31.
        proj_dim: r, 1 to D.
        seed: of the draw, 0 to 2^64 - 1.
        proj_type: "dropout" or "sketch".
        device: of the gradients and the result.
        dtype: of the result, floating point.
        s: coordinates of an entry of a sketch.
        energies: those of `dropinf.energies` or `dropinf.energies_from_adam`, of the parameters
            whose gradients are projected, in their order in the model; or E g^2 as a tensor [D],
            such as the mean square of some gradients, which takes O(D) memory and O(D log D) time
            when a model_id is first met. None draws uniformly.

    Raises:
        ValueError: an argument is out of range; or the energies are of another size, not finite,
            negative, or all zero.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int = 0,
        proj_type: str = "dropout",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        s: int = 4,
        energies: Energies | Tensor | None = None,
    ) -> None:
        name = "DropoutProjector"
        if grad_dim < 1 or not 1 <= proj_dim <= grad_dim:
            raise ValueError(
                f"{name}: proj_dim must be 1 to grad_dim={grad_dim}, got {proj_dim}; "
                "coordinates are drawn without replacement"
            )
        if not 0 <= seed < 2**64:
            raise ValueError(f"{name}: seed must be in 0 .. 2^64 - 1, got {seed}")
        if proj_type not in _TYPES:
            raise ValueError(f"{name}: proj_type must be one of {_TYPES}, got {proj_type!r}")
        if s < 1:
            raise ValueError(f"{name}: s must be at least 1, got {s}")
        if not dtype.is_floating_point:
            raise ValueError(f"{name}: dtype must be floating point, got {dtype}")
        self.grad_dim, self.proj_dim, self.seed = int(grad_dim), int(proj_dim), int(seed)
        self.proj_type, self.s, self.dtype = proj_type, int(s), dtype
        self.device = torch.device(device)
        self._is_sketch = proj_type == "sketch"
        self._masks: dict[int, _Mask] = {}
        # Of the gradients in a dictionary, in order, and where they are from.
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._shapes_of = "the first call"
        self._energies: list[ParamEnergy] | None = None
        if energies is not None:
            checked = _checked(name, energies, self.grad_dim)
            self._energies = list(checked.params.values())
            if checked is energies:
                self._shapes = {n: param.shape for n, param in checked.params.items()}
                self._shapes_of = "the energies"
            # TRAK compares it with that of the results in its save_dir.
            self.proj_type += f" by energy {checked.fingerprint}"

    @torch.no_grad()
    def project(
        self, grads: Grads, model_id: int | None = None, *, ensemble_id: int | None = None
    ) -> Tensor:
        """The projections of a batch of gradients.

        Args:
            grads: [B, D]; or the gradients of all parameters, [B, *shape] each, in a list, or in a
                dictionary, whose order in the first call counts from then on; or that of energies
                with names.
            model_id: whose coordinates to take; another number, other coordinates. None is 0.
            ensemble_id: dattri's name for it.

        Returns:
            [B, r] on the device and in the dtype of the projector.

        Raises:
            ValueError: sizes, names, dtypes or devices disagree.
        """
        if model_id is not None and ensemble_id is not None and model_id != ensemble_id:
            raise ValueError(
                f"project: model_id and ensemble_id are one thing, got {model_id} and {ensemble_id}"
            )
        parts = self._parts(grads)
        mask = self._mask(next((i for i in (model_id, ensemble_id) if i is not None), 0))
        gathered = self._gather(parts, mask)
        if mask.group is None:
            return gathered.mul_(mask.scale)
        # One term after the other: the order of `sum` is not the same on every device.
        wide = torch.promote_types(self.dtype, torch.float32)
        out = torch.zeros(len(gathered), self.proj_dim, dtype=wide, device=self.device)
        for group, sign in zip(mask.group.T, mask.sign.T, strict=True):
            out += gathered[:, group] * sign
        return out.mul_(mask.scale).to(self.dtype)

    def free_memory(self) -> None:
        """Forget the coordinates; they are drawn again when they are needed."""
        self._masks.clear()

    def __repr__(self) -> str:
        return (
            f"DropoutProjector(grad_dim={self.grad_dim}, proj_dim={self.proj_dim}, "
            f"seed={self.seed}, proj_type={self.proj_type!r})"
        )

    def _gather(self, parts: Sequence[Tensor], mask: _Mask) -> Tensor:
        """[B, n] the coordinates of all parts, one behind the other."""
        sizes = tuple(math.prod(part.shape[1:]) for part in parts)
        if sizes not in mask.places:
            mask.places[sizes] = list(_places(sizes, mask.index))
        out = torch.empty(len(parts[0]), len(mask.index), dtype=self.dtype, device=self.device)
        for l, columns, index in mask.places[sizes]:
            out[:, columns] = _columns(parts[l], index)
        return out

    def _mask(self, model_id: int) -> _Mask:
        if model_id not in self._masks:
            if not 0 <= model_id < 2**63:
                raise ValueError(f"project: model_id must be in 0 .. 2^63 - 1, got {model_id}")
            self._masks[model_id] = self._drawn(model_id)
        return self._masks[model_id]

    def _drawn(self, model_id: int) -> _Mask:
        D, r = self.grad_dim, self.proj_dim
        n = min(D, r * self.s) if self._is_sketch else r
        # As of one layer with one parameter.
        ((drawn, _, scale),) = draw_layer([(D,)], n, self.seed, model_id, self._energies)
        index = torch.from_numpy(drawn).to(self.device)
        if isinstance(scale, np.ndarray):
            wide = torch.promote_types(self.dtype, torch.float32)
            scale = torch.from_numpy(scale).to(self.device, wide)
        if not self._is_sketch:
            return _Mask(index, None, None, scale, {})
        # Integers of a counter-based stream, apart from the draw's by the top bit of the key.
        key = np.array([self.seed, model_id + 2**63], dtype=np.uint64)
        raw = np.random.Philox(key=key).random_raw(2 * n)
        s = -(-n // r)
        group = np.zeros(r * s, dtype=np.int64)
        sign = np.zeros(r * s, dtype=np.int8)
        group[:n] = np.argsort(raw[:n], kind="stable")
        sign[:n] = 2 * (raw[n:] >> np.uint64(63)).astype(np.int8) - 1
        # Entry k has numbers k, k + r, ...: where n is no multiple of r, sizes differ by one.
        group, sign = (
            torch.from_numpy(a.reshape(s, r).T.copy()).to(self.device) for a in (group, sign)
        )
        if isinstance(scale, Tensor):
            sign, scale = sign * scale[group], 1.0
        return _Mask(index, group, sign, scale, {})

    def _parts(self, grads: Grads) -> list[Tensor]:
        """The gradients [B, *shape] of all parameters, checked."""
        if isinstance(grads, Tensor):
            parts = [grads]
            if grads.dim() != 2 or grads.shape[1] != self.grad_dim:
                raise ValueError(
                    f"project: grads must be [B, grad_dim={self.grad_dim}], got "
                    f"{tuple(grads.shape)}"
                )
        elif isinstance(grads, Mapping):
            parts = self._in_order(grads)
        else:
            parts = list(grads)
        if not parts or any(p.dim() < 1 or len(p) != len(parts[0]) for p in parts):
            shapes = [tuple(p.shape) for p in parts[:5]]
            raise ValueError(f"project: gradients must be [B, *shape] of one B, got {shapes}")
        for what in ("dtype", "device"):
            different = {getattr(p, what) for p in parts}
            if len(different) > 1:
                raise ValueError(
                    f"project: all gradients must have one {what}, got "
                    f"{', '.join(sorted(map(str, different)))}"
                )
        first = parts[0]
        if first.device.type != self.device.type or not first.is_floating_point():
            raise ValueError(
                f"project: gradients must be floating point on {self.device}, got {first.dtype} on "
                f"{first.device}"
            )
        total = sum(math.prod(p.shape[1:]) for p in parts)
        if total != self.grad_dim:
            raise ValueError(
                f"project: the gradients have {total} numbers an example, "
                f"grad_dim is {self.grad_dim}"
            )
        return parts

    def _in_order(self, grads: Mapping[str, Tensor]) -> list[Tensor]:
        shapes = {name: g.shape[1:] for name, g in grads.items()}
        if self._shapes is None:
            if sum(map(math.prod, shapes.values())) == self.grad_dim:
                self._shapes = shapes
            return list(grads.values())
        if shapes != self._shapes:
            missing, extra = self._shapes.keys() - shapes, shapes.keys() - self._shapes
            other = [n for n in self._shapes if n in shapes and shapes[n] != self._shapes[n]]
            said = (
                f"{what} {sorted(names)[:5]}"
                for what, names in (
                    ("missing", missing),
                    ("unknown", extra),
                    ("of another shape", other),
                )
                if names
            )
            raise ValueError(
                f"project: the names and shapes must be those of {self._shapes_of}: "
                f"{'; '.join(said)}"
            )
        return [grads[name] for name in self._shapes]


def _checked(op: str, energies: Energies | Tensor, grad_dim: int) -> Energies:
    """Energies of grad_dim numbers; those of a tensor are of one vector."""
    if isinstance(energies, Tensor):
        if energies.shape != (grad_dim,) or energies.is_complex():
            raise ValueError(
                f"{op}: energies must be real numbers [grad_dim={grad_dim}], got {energies.dtype} "
                f"{tuple(energies.shape)}; such as the mean of the squares of some gradients"
            )
        values = energies.detach().double().cpu().numpy()
        return Energies.of(op, {"energies": ((grad_dim,), values, np.ones(1))})
    if not isinstance(energies, Energies):
        raise ValueError(
            f"{op}: energies must be what dropinf.energies returns, or a tensor [grad_dim], got "
            f"{type(energies).__name__}"
        )
    if energies.size != grad_dim:
        raise ValueError(
            f"{op}: the energies are of {energies.size} numbers, grad_dim is {grad_dim}; measure "
            "those of the parameters whose gradients are projected, with "
            "dropinf.energies(..., include=)"
        )
    return energies


def _places(sizes: Sequence[int], index: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    bounds = [0, *itertools.accumulate(sizes)]
    cuts = torch.searchsorted(index, torch.tensor(bounds, device=index.device)).tolist()
    for l, (a, b) in enumerate(itertools.pairwise(cuts)):
        if a < b:
            yield l, slice(a, b), index[a:b] - bounds[l]


def _columns(part: Tensor, index: Tensor) -> Tensor:
    """[B, n] of the flattened part [B, *shape], which is not copied."""
    shape = part.shape[1:]
    try:
        rows = part.view(len(part), -1)
    except RuntimeError:  # its strides are not those of a flat row
        return part[(slice(None), *torch.unravel_index(index, shape))]
    # index_select would copy rows that lie apart; gather is as fast, and faster on long rows.
    return rows.gather(1, index.expand(len(part), -1))
