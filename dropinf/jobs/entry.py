"""A job whose model, data and loss are given by a function of the user's."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from dropinf.jobs.examples import Examples

_NAMES = ("model", "train", "queries", "loss_fn", "texts", "query_texts", "ids")


def given_by(entry: str) -> tuple[nn.Module, Callable, Examples, Examples | None]:
    """Model, loss, training examples and queries of "module:function".

    The function takes no arguments and gives (model, train_loader, loss_fn), or (model,
    train_loader, query_loader, loss_fn), or a mapping of

        model, loss_fn: the module, as it is to be used; (model, batch) -> [B].
        train, queries: re-iterable loaders; `queries` may be left out.
        texts, query_texts: optional, what people read of the examples: a sequence by their
            positions, or where ids are given a mapping by these.
        ids: optional, as of `dropinf.collect`.

    The working directory is where its module is looked for first.

    Raises:
        ValueError: there is no such function, it fails, or gives something else.
    """
    found = _called(entry)
    if isinstance(found, tuple) and len(found) in (3, 4):
        names = ("model", "train", "loss_fn") if len(found) == 3 else _NAMES[:4]
        found = dict(zip(names, found, strict=True))
    if not isinstance(found, Mapping):
        raise ValueError(
            f"entry {entry} must give (model, train_loader, loss_fn), (model, train_loader, "
            f"query_loader, loss_fn) or a mapping of these, got {type(found).__name__}"
        )
    unknown = [name for name in found if name not in _NAMES]
    missing = [name for name in ("model", "train", "loss_fn") if found.get(name) is None]
    if unknown or missing:
        what = f"gives no {missing[0]!r}" if missing else f"gives {unknown[0]!r}"
        raise ValueError(f"entry {entry} {what}; it may give {', '.join(_NAMES)}")
    _refuse_types(entry, found)
    ids = found.get("ids")
    train = _examples(entry, "texts", found["train"], found.get("texts"), ids)
    queries = None
    if found.get("queries") is not None:
        queries = _examples(entry, "query_texts", found["queries"], found.get("query_texts"), ids)
    return found["model"], found["loss_fn"], train, queries


def _called(entry: str) -> Any:
    module, colon, function = entry.partition(":")
    if not (module and colon and function):
        raise ValueError(f"entry must be module:function, got {entry!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # for good, since the function may import later
    try:
        found: Any = importlib.import_module(module)
        for name in function.split("."):
            found = getattr(found, name)
    except Exception as error:
        raise ValueError(f"entry {entry} cannot be imported: {_said(error)}") from error
    if not callable(found):
        raise ValueError(f"entry {entry} is no function but {type(found).__name__}")
    try:
        return found()
    except Exception as error:
        raise ValueError(f"entry {entry} failed: {_said(error)}") from error


def _refuse_types(entry: str, found: Mapping[str, Any]) -> None:
    if not isinstance(found["model"], nn.Module):
        kind = type(found["model"]).__name__
        raise ValueError(f"entry {entry}: the model must be a torch.nn.Module, got {kind}")
    if not callable(found["loss_fn"]):
        kind = type(found["loss_fn"]).__name__
        raise ValueError(f"entry {entry}: loss_fn must be a function, got {kind}")
    for name in ("train", "queries"):
        loader = found.get(name)
        if loader is not None and (
            not isinstance(loader, Iterable) or isinstance(loader, Iterator)
        ):
            raise ValueError(
                f"entry {entry}: {name} must be a loader that can be gone through again, such as a "
                f"DataLoader or a list of batches, got {type(loader).__name__}"
            )


def _examples(entry: str, name: str, loader: Iterable, texts: Any, ids: Any) -> Examples:
    names = None
    if isinstance(texts, Mapping):
        names, texts = list(texts), list(texts.values())
    if texts is not None and not isinstance(texts, Sequence):
        raise ValueError(
            f"entry {entry}: {name} must be a sequence or a mapping by ids, got "
            f"{type(texts).__name__}"
        )
    if texts is not None and (names is None) != (ids is None):
        raise ValueError(
            f"entry {entry}: {name} must be a mapping by ids where ids are given, and a sequence "
            "where they are not"
        )
    return Examples(loader, ids, texts, names=names)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
