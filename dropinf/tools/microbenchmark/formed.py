"""Setting "formed": gradients [n, d] that are there already -> [n, r]."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dropinf import DropoutProjector
from dropinf.compression import projections
from dropinf.tools.measuring import Call, LeftOut

OURS, FLOOR = "dropinf Dropout", "one read of the gradients"


class Point(NamedTuple):
    """A size to measure."""

    n: int
    r: int
    d: int


class Inputs(NamedTuple):
    """Gradients [n, d] to compress to r numbers each."""

    grads: Tensor
    r: int


def make(point: Point, device: torch.device) -> Inputs:
    """Inputs of a size, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    return Inputs(torch.randn(point.n, point.d, generator=generator).to(device), point.r)


def need(package: str, wanted: str = "dropinf[peers]") -> None:
    """Raise LeftOut if a peer is missing, with what to install."""
    try:
        version(package)
    except PackageNotFoundError:
        way_out = f"pip install '{wanted}'" + (", or make peers" if "peers" in wanted else "")
        raise LeftOut(f"{package} is not installed; {way_out}") from None


def _ours(proj_type: str) -> Callable[[Inputs], Call]:
    def contestant(given: Inputs) -> Call:
        d, device = given.grads.shape[1], given.grads.device
        projector = DropoutProjector(d, given.r, proj_type=proj_type, device=device)
        return lambda: projector.project(given.grads)

    return contestant


def _projection(kind: Callable[..., projections.Projection]) -> Callable[[Inputs], Call]:
    def contestant(given: Inputs) -> Call:
        made = kind(given.grads.shape[1], given.r, seed=0, layer=0)
        return lambda: made.project(given.grads)

    return contestant


def _logra(given: Inputs) -> Call:
    """Of the gradient as a matrix, as square as d has it."""
    d = given.grads.shape[1]
    O = max(o for o in range(1, math.isqrt(d) + 1) if d % o == 0)
    a = max(a for a in range(1, math.isqrt(given.r) + 1) if given.r % a == 0)
    made = projections.Kron(O, d // O, a, given.r // a, seed=0, layer=0)
    return lambda: made.project(given.grads)


def _trak(proj_type: str) -> Callable[[Inputs], Call]:
    """On a GPU CudaProjector, by fast_jl. BasicProjector keeps a matrix of up to 100 columns."""

    def contestant(given: Inputs) -> Call:
        need("traker")
        from trak import projectors

        d, device = given.grads.shape[1], given.grads.device
        if device.type == "cuda":
            need("fast_jl", "traker[fast]")
            # It reads the type's `value`, which a plain string has not.
            kind = projectors.ProjectionType(proj_type)
            made = projectors.CudaProjector(d, given.r, 0, kind, device, max_batch_size=32)
            return lambda: made.project(given.grads, model_id=0)
        made = projectors.BasicProjector(d, given.r, 0, proj_type, device)
        return lambda: made.project(given.grads, model_id=0)

    return contestant


def _dattri(proj_type: str, kept: bool = True) -> Callable[[Inputs], Call]:
    """Made once, its best form; or, if not `kept`, for each batch, as its attributors do."""

    def contestant(given: Inputs) -> Call:
        need("dattri")
        from dattri.func.projection import random_project

        n, device = len(given.grads), str(given.grads.device)

        def make() -> Callable[[Tensor], Tensor]:
            options = {"proj_type": proj_type, "device": device}
            return random_project(given.grads, n, given.r, 32, **options)

        try:
            project = make()
        except (ValueError, ImportError, RuntimeError) as error:
            raise LeftOut(f"dattri says: {' '.join(str(error).split())}") from None
        if kept:
            return lambda: project(given.grads)
        return lambda: make()(given.grads)

    return contestant


CONTESTANTS: dict[str, Callable[[Inputs], Call]] = {
    FLOOR: lambda given: given.grads.sum,
    OURS: _ours("dropout"),
    "dropinf Sketch, s=4": _ours("sketch"),
    "dropinf SJLT": _projection(projections.SJLTProjection),
    "dropinf FJLT": _projection(projections.FJLTProjection),
    "dropinf LoGra": _logra,
    "dropinf Gaussian": _projection(projections.GaussianProjection),
    "dropinf Rademacher": _projection(projections.RademacherProjection),
    "dattri random_mask": _dattri("random_mask"),
    "dattri random_mask, made for each batch": _dattri("random_mask", kept=False),
    "dattri sjlt": _dattri("sjlt"),
    "dattri normal": _dattri("normal"),
    "dattri rademacher": _dattri("rademacher"),
    "TRAK normal": _trak("normal"),
    "TRAK rademacher": _trak("rademacher"),
}


def check(name: str, device: torch.device) -> None:
    """A contestant against its definition, on small inputs.

    Which coordinates are kept shows in a row of 0 .. d - 1. Of projections, whose matrices are
    their own, the squares keep their mean: E ‖out‖² = ‖g‖² (r times that for TRAK's).

    Raises:
        LeftOut: it does not run.
        AssertionError: it computes something else.
    """
    # fast_jl takes multiples of 512 only.
    n, r, d = 65, 512 if name.startswith("TRAK") and device.type == "cuda" else 64, 6000
    grads = make(Point(n, r, d), device).grads
    grads[0] = torch.arange(d)
    grads[3] = grads[1] - grads[2]
    out: Any = CONTESTANTS[name](Inputs(grads, r))()
    grads = grads.double()
    if name == FLOOR:
        assert abs(out.double() - grads.sum()) <= 1e-5 * grads.abs().sum(), name
        return
    assert out.shape == (n, r) and out.isfinite().all(), name
    out = out.double()
    size = float(out[1:3].norm())
    assert float((out[1] - out[2] - out[3]).norm()) <= 1e-4 * size, (name, "is not linear")
    if name == OURS or name.startswith("dattri random_mask"):
        scale = math.sqrt(d / r) if name == OURS else 1.0
        index = (out[0] / scale).round().long()
        assert len(index.unique()) == r and index.max() < d, name
        torch.testing.assert_close(out, grads[:, index] * scale, rtol=1e-5, atol=1e-5)
        return
    size = r if name.startswith("TRAK") else 1
    ratio = float(out[1:].square().sum() / size / grads[1:].square().sum())
    # Variance 2 / r of each row, nearly independent; of LoGra's factors somewhat more.
    assert abs(ratio - 1) < 5 * math.sqrt(4 / (r * (n - 1))), (name, ratio)
