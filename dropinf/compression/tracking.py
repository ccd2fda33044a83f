"""Which parameters of a model are tracked, layer by layer."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

# (layer name, [(parameter name, shape), ...]) of every layer
Layers = list[tuple[str, list[tuple[str, tuple[int, ...]]]]]


def tracked(
    op: str,
    model: nn.Module,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> tuple[Layers, list[str]]:
    """The layers of a model, with what is tracked of them, and their classes; see `Plan.make`.

    Raises:
        ValueError: a name matches nothing, nothing is left to track, or a parameter is complex.
    """
    model = unwrap(op, model)
    owned, seen = [], set()
    for layer, module in model.named_modules():
        for name, p in module.named_parameters(prefix=layer, recurse=False):
            if p.requires_grad and id(p) not in seen:
                seen.add(id(p))
                owned.append((layer, name, tuple(p.shape)))
    names = [name for _, name, _ in owned]
    kept = set(names if include is None else _matching(op, "include", include, names))
    if exclude is not None:
        kept -= set(_matching(op, "exclude", exclude, names))
    for name in names:
        if name in kept and model.get_parameter(name).is_complex():
            raise ValueError(
                f"{op}: {name!r} is complex, and rows are real; keep it as a real parameter and "
                "use torch.view_as_complex of it, or leave it out with exclude="
            )
    layers: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for layer, name, shape in owned:
        if name in kept and math.prod(shape):
            layers.setdefault(layer, []).append((name, shape))
    if not layers:
        raise ValueError(
            f"{op}: {len(names)} trainable parameters, none left to track; set requires_grad or "
            "widen include/exclude"
        )
    return list(layers.items()), [type(model.get_submodule(layer)).__name__ for layer in layers]


def unwrap(op: str, model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel and torch.compile.

    Raises:
        TypeError: it is no module.
        ValueError: a part of it is a DataParallel.
    """
    inside = peeled(op, model)
    refuse_replicas(op, set(map(type, model.modules())))
    return inside


def peeled(op: str, model: nn.Module) -> nn.Module:
    """`unwrap`, without a look inside."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{op}: the model must be a torch.nn.Module, got {type(model).__name__}; give the "
            "module whose parameters are meant, and call what wraps it in loss_fn"
        )
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def refuse_replicas(op: str, kinds: set[type]) -> None:
    """Raise if there is a DataParallel among the classes of a model's modules."""
    if any(issubclass(kind, nn.DataParallel) for kind in kinds):
        raise ValueError(
            f"{op}: nn.DataParallel replicates its parameters on every call, so that nothing can "
            "be captured; give the model inside it (.module), or use DistributedDataParallel"
        )


def _matching(op: str, what: str, patterns: str | Sequence[str], names: Sequence[str]) -> list[str]:
    """The parameter names that a pattern takes, by their own name or a module above them."""
    matched = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = [name for name in names if _takes(pattern, name)]
        if not hits:
            above = {".".join(n.split(".")[:i]) for n in names for i in range(1, n.count(".") + 2)}
            close = difflib.get_close_matches(pattern, sorted(above), n=3) or sorted(above)[:3]
            raise ValueError(
                f"{op}: {what}={pattern!r} matches no trainable parameter; "
                f"names here are like {str(close)[1:-1]}"
            )
        matched += hits
    return matched


def _takes(pattern: str, name: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))
