"""What is taken for a loader of batches, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

_FORMATTED = "select_columns([...]).with_format('torch')"


def refuse_dataset(op: str, loader: Any) -> None:
    """Refuse a data set, of torch or of `datasets`, which would give an example for a batch; and a
    batch, which would give its tensors.

    And a DataLoader of a `datasets.Dataset` that gives lists: torch's own collate_fn makes of B
    lists of k numbers k tensors [B].
    """
    if _is_a_batch(loader):
        raise TypeError(
            f"{op}: a {type(loader).__name__} of tensors is one batch; give a list of batches, "
            "[batch], or a DataLoader"
        )
    kind = _of_datasets(loader)
    if kind in ("Dataset", "IterableDataset"):
        raise TypeError(
            f"{op}: a datasets.{kind} gives examples, not batches; give "
            f"torch.utils.data.DataLoader(dataset.{_FORMATTED}, batch_size=...)"
        )
    if kind is not None:
        raise TypeError(
            f"{op}: a datasets.{kind} holds several data sets; give a DataLoader of one of "
            f"them, .{_FORMATTED}"
        )
    if isinstance(loader, Dataset) and hasattr(loader, "__getitem__"):
        raise TypeError(
            f"{op}: a Dataset gives examples, not batches; give "
            "torch.utils.data.DataLoader(dataset, batch_size=...)"
        )
    data: Any = loader.dataset if isinstance(loader, DataLoader) else None
    kind = _of_datasets(data)
    if kind not in ("Dataset", "IterableDataset") or loader.collate_fn is not default_collate:
        return
    package = sys.modules["datasets"]
    single = (package.Value, package.ClassLabel)
    features = data.features or {}  # a stream may not know them
    others = [name for name, kind in features.items() if not isinstance(kind, single)]
    if others and not _has_format(data):
        raise TypeError(
            f"{op}: column {others[0]!r} of this datasets.{kind} gives lists or objects of "
            f"Python; give the DataLoader dataset.{_FORMATTED}, or a collate_fn"
        )


def _is_a_batch(given: Any) -> bool:
    """Whether it is what a loader gives: a tensor, a mapping, or tensors that differ in kind.

    Tensors of one kind may be batches that are one tensor each.
    """
    if isinstance(given, Tensor) or (isinstance(given, Mapping) and _of_datasets(given) is None):
        return True
    if not isinstance(given, tuple | list) or not all(isinstance(one, Tensor) for one in given):
        return False
    return len({(one.dtype, one.dim()) for one in given}) > 1


def _of_datasets(given: Any) -> str | None:
    """Which class of the package `datasets` it is of, which is not imported for that."""
    package = sys.modules.get("datasets")
    for name in ("Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict"):
        kind = getattr(package, name, None)
        if isinstance(kind, type) and isinstance(given, kind):
            return name
    return None


def _has_format(data: Any) -> bool:
    """Whether it gives arrays; a stream says that in no public way."""
    if hasattr(data, "format"):
        return data.format["type"] is not None
    return getattr(data, "_formatting", True) is not None


def refuse_shuffling(op: str, name: str, loader: Any) -> None:
    """Refuse a DataLoader whose sampler draws at random: whose score is whose, nobody would know.

    What does not tell its order (a list of batches, an iterator, an IterableDataset, a sampler of
    the user's own) is taken at its word.
    """
    if not isinstance(loader, DataLoader):
        return
    samplers = [loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
    for one in samplers:
        if isinstance(one, RandomSampler | SubsetRandomSampler | WeightedRandomSampler) or (
            isinstance(one, DistributedSampler) and one.shuffle
        ):
            raise ValueError(
                f"{op}: {name} shuffles ({type(one).__name__}), and scores are in the order in "
                "which it gives its examples; make it with shuffle=False"
            )
