"""The compression step alone: formed gradients of a whole model -> r numbers an example.

The gradients come from memory, as they do behind a backward pass: each call takes the next of many
views that overlap in all but the cache lines of the coordinates.

A dense projection makes its matrix [D, r] anew in every call, since 96 GB cannot be kept, block by
block of columns, and its time is proportional to their number. Of 2048 columns, 8 are made here, so
that the ratios of these contestants are lower bounds of those of the whole.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from embed_case import Call, Case, joined, only_if
from models import ResNet18
from torch import Tensor

from dropinf import DropoutProjector
from dropinf.tools.measuring import LeftOut

R, FEW, BLOCK = 2048, 8, 100  # BLOCK is the default of both packages
NUM_EXAMPLES = 8
NUM_VIEWS, LINE = 128, 16  # 128 MB of cache lines of 16 floats, more than a last-level cache
OURS, SKETCH = "DropoutProjector, dropout", "DropoutProjector, sketch"
HALF = "DropoutProjector, dropout, of bfloat16 gradients"
FLAT, READ = "cat + index", "one read of the gradients"
MASK = "dattri random_project, random_mask"
TRAK = "TRAK BasicProjector, {}, " + f"{FEW} of its {R} columns"
DENSE = "dattri random_project, {}, " + f"{FEW} of its {R} columns"
ROWS = NUM_EXAMPLES * R * 4 / 1e6


def dictionaries() -> list[dict[str, Tensor]]:
    """Gradients [B, *shape] by name."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in ResNet18().named_parameters()}
    torch.manual_seed(0)
    rings = {name: ring((NUM_EXAMPLES, *shape)) for name, shape in shapes.items()}
    return [{name: views[k] for name, views in rings.items()} for k in range(NUM_VIEWS)]


def matrices() -> list[Tensor]:
    """Gradients [B, D]."""
    with torch.device("meta"):
        D = sum(p.numel() for p in ResNet18().parameters())
    torch.manual_seed(0)
    return ring((NUM_EXAMPLES, D))


def ring(shape: tuple[int, ...]) -> list[Tensor]:
    numel = math.prod(shape)
    data = torch.randn(numel + NUM_VIEWS * LINE)
    return [data[k * LINE :][:numel].view(shape) for k in range(NUM_VIEWS)]


def turning(project_of: Callable[[int], Callable]) -> Callable[[list], Call]:
    """A contestant: D -> (gradients -> their projections)."""

    def contestant(inputs: list[Any]) -> Call:
        project, turn = project_of(width(inputs)), itertools.cycle(inputs)
        return lambda: project(next(turn))

    return contestant


def width(inputs: list[Any]) -> int:
    first = inputs[0]
    parts = first.values() if isinstance(first, dict) else [first]
    return sum(part[0].numel() for part in parts)


def ours(proj_type: str) -> Callable[[list], Call]:
    return turning(lambda D: DropoutProjector(D, R, proj_type=proj_type).project)


def ours_of_half(inputs: list[Any]) -> Call:
    def half(grads):
        if isinstance(grads, dict):
            return {name: half(g) for name, g in grads.items()}
        return grads.bfloat16()

    halved = half(inputs[0])
    project = DropoutProjector(width(inputs), R).project
    return lambda: project(halved)


def cat_index(D: int) -> Callable:
    index = torch.randperm(D, generator=torch.Generator().manual_seed(0))[:R].sort().values

    def project(grads):
        flat = joined(grads) if isinstance(grads, dict) else grads
        return flat[:, index] * (D / R) ** 0.5

    return project


def read(grads: Any) -> list[Tensor]:
    return [g.sum() for g in (grads.values() if isinstance(grads, dict) else [grads])]


def trak(proj_type: str) -> Callable[[list], Call]:
    """One block; another model in each call, so that it is made in each, into one buffer."""

    def project_of(D: int) -> Callable:
        from trak.projectors import BasicProjector

        projector = BasicProjector(D, FEW, 0, proj_type, "cpu")
        models = itertools.count(1)
        return lambda grads: projector.project(grads, model_id=next(models))

    return only_if("traker", turning(project_of))


def dattri_dense(proj_type: str) -> Callable[[list], Call]:
    """The same."""

    def contestant(inputs: list[Any]) -> Call:
        from dattri.func.projection import random_project

        project = random_project(inputs[0], NUM_EXAMPLES, FEW, 32, proj_type=proj_type)
        models = itertools.count(1)
        return turning(lambda D: lambda grads: project(grads, ensemble_id=next(models)))(inputs)

    return only_if("dattri", contestant)


def trak_block(inputs: list[Any]) -> Call:
    """What a projector of TRAK holds and takes, made in the call; dattri's is the same code."""
    from trak.projectors import BasicProjector

    D = width(inputs)
    return lambda: BasicProjector(D, BLOCK, 0, "normal", "cpu").project(inputs[0], model_id=0)


def dattri(proj_type: str, proj_dim: int, kept: bool = False) -> Callable[[list], Call]:
    """Made in each call, as dattri's attributors do, or once."""

    def contestant(inputs: list[Any]) -> Call:
        from dattri.func.projection import random_project

        def made(grads):
            return random_project(grads, NUM_EXAMPLES, proj_dim, 32, proj_type=proj_type)

        try:
            project = made(inputs[0]) if kept else None
        except ValueError as error:
            raise LeftOut(" ".join(str(error).split())) from None
        return turning(lambda D: project or (lambda grads: made(grads)(grads)))(inputs)

    return only_if("dattri", contestant)


def coordinates(project: Callable[[Tensor], Tensor], D: int, scale: float) -> Tensor:
    """[r] which coordinate each number is, seen from outside."""
    numbers = project(torch.arange(D, dtype=torch.float64)[None])[0]
    index = (numbers / scale).round().long()
    assert (index.diff() > 0).all() and index[0] >= 0 and index[-1] < D
    return index


def check(inputs: list[Any], calls: dict[str, Call]) -> None:
    """Each against its definition, on the first gradients."""
    D, first = width(inputs), inputs[0]
    flat = joined(first) if isinstance(first, dict) else first
    scale = math.sqrt(D / R)
    index = coordinates(DropoutProjector(D, R, dtype=torch.float64).project, D, scale)
    torch.testing.assert_close(calls[OURS](), flat[:, index] * scale)
    torch.testing.assert_close(calls[HALF](), flat[:, index].bfloat16().float() * scale)
    # Four numbers of variance D / (4 r) an entry, the same of the matrix as of its parts.
    sketch = calls[SKETCH]()
    assert torch.equal(sketch, DropoutProjector(D, R, proj_type="sketch").project(flat))
    assert 0.9 < sketch.square().mean() / scale**2 < 1.1
    signs = DropoutProjector(D, R, proj_type="sketch").project(torch.ones(1, D)) * 2 / scale
    assert set(signs.round().unique().tolist()) == {-4, -2, 0, 2, 4}
    assert (signs - signs.round()).abs().max() < 1e-3
    assert calls[FLAT]().shape == (NUM_EXAMPLES, R)
    torch.testing.assert_close(sum(calls[READ]()), flat.sum(), rtol=1e-3, atol=10)
    for name in calls:
        if name.startswith(MASK):
            from dattri.func.projection import random_project

            like = torch.empty(1, D, dtype=torch.float64)
            own = random_project(like, 1, R, 32, proj_type="random_mask")
            assert torch.equal(calls[name](), flat[:, coordinates(own, D, 1.0)]), name
        elif "columns" in name:  # products with D normal or random signs, dattri's over √r
            spread = calls[name]() / flat.norm(dim=1)[:, None]
            size = spread.square().mean() * (FEW if "dattri" in name else 1)
            assert spread.shape == (NUM_EXAMPLES, FEW) and 0.5 < size < 2, name


CHEAP = {
    OURS: ours("dropout"),
    SKETCH: ours("sketch"),
    HALF: ours_of_half,
    READ: turning(lambda D: read),
    FLAT: turning(cat_index),
    MASK: dattri("random_mask", R, kept=True),
    f"{MASK}, made in each call as in its TRAKAttributor": dattri("random_mask", R),
    "dattri random_project, sjlt": dattri("sjlt", R, kept=True),
    "dattri random_project, grass": dattri("grass", R, kept=True),
}
CONTESTANTS = {
    **CHEAP,
    TRAK.format("normal"): trak("normal"),
    TRAK.format("rademacher"): trak("rademacher"),
    DENSE.format("normal"): dattri_dense("normal"),
    DENSE.format("rademacher"): dattri_dense("rademacher"),
}
HELD = {**CHEAP, f"TRAK BasicProjector, normal, a block of {BLOCK}": only_if("traker", trak_block)}
TO_REACH = {
    TRAK.format("normal"): (20, None),
    TRAK.format("rademacher"): (20, None),
    MASK: (2, None),
    READ: (1, None),
}
# The result, and once more as much where gradients have another type; a sketch also holds its s=4
# numbers an entry, those with their signs, and the list of where they are. And 1 MB of pages.
AT_MOST = {OURS: 2 * ROWS + 1, HALF: 3 * ROWS + 1, SKETCH: 12 * ROWS + 1}


def case(make: Callable[[], list[Any]]) -> Case:
    return Case(make, CONTESTANTS, OURS, TO_REACH, check, ROWS, AT_MOST, held=HELD)


TITLE = f"compression of formed gradients of ResNet-18 (11.7 M), r={R}, B={NUM_EXAMPLES}, "
CASES = {TITLE + "by parameter": case(dictionaries), TITLE + "one matrix": case(matrices)}
