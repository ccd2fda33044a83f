"""Whose each row is: integers or strings, in memory and in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

Ids = Tensor | list[str]  # [n] int64, or n strings
GivenIds = str | Callable[[Any], Any]  # a key of the batch, or a function of it


def as_ids(op: str, given: Any) -> Ids:
    """What somebody gave for ids.

    Raises:
        ValueError: they are not all integers, or all strings.
    """
    if isinstance(given, Tensor | np.ndarray):
        values = torch.as_tensor(given) if not isinstance(given, np.ndarray) else None
        if values is None and given.dtype.kind in "iu":
            values = torch.from_numpy(given.astype(np.int64))
        whole = values is not None and not values.dtype.is_floating_point
        if whole and values.dtype != torch.bool and not values.is_complex() and values.dim() == 1:
            return values.detach().to("cpu", torch.int64)
        given = given.tolist()
    given = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if all(isinstance(one, str) for one in given) and given:
        return [str(one) for one in given]
    if all(isinstance(one, Integral) and not isinstance(one, bool) for one in given):
        numbers = [int(one) for one in given]
        if all(-(2**63) <= number < 2**63 for number in numbers):
            return torch.tensor(numbers, dtype=torch.int64)
    by = "; for rows by position take store.rows" if isinstance(given[0], slice) else ""
    raise ValueError(f"{op}: ids must be integers of 64 bits, or strings, got {given[:3]!r}{by}")


def ids_of_batch(ids: GivenIds, batch: Any, num_examples: int) -> Ids:
    """The ids of a batch's examples, by `ids=` of `collect`.

    Raises:
        ValueError: there is not one for each example, or the batch has no such key.
    """
    try:
        given = batch[ids] if isinstance(ids, str) else None
    except (KeyError, TypeError, IndexError):
        keys = getattr(batch, "keys", None)
        has = f"is a {type(batch).__name__}" if keys is None else f"has {sorted(map(str, keys()))}"
        raise ValueError(
            f"collect: ids= must be a key of the batch, or a function of it, got {ids!r}; the "
            f"batch {has}"
        ) from None
    found = as_ids("collect", given if isinstance(ids, str) else ids(batch))
    if num_examples >= 0 and len(found) != num_examples:
        raise ValueError(
            f"collect: ids= must give one id for each of {num_examples} examples, got {len(found)}"
        )
    return found


def same(first: Ids, other: Ids) -> bool:
    """Whether both are the same ones in the same order."""
    if isinstance(first, Tensor) != isinstance(other, Tensor):
        return False
    return torch.equal(first, other) if isinstance(first, Tensor) else first == other


def digest_of_ids(ids: Ids) -> bytes:
    """What tells these, in this order, from others, without keeping them."""
    return hashlib.sha256(kind_of(ids).encode() + encoded(ids)).digest()


def in_order(ids: Ids) -> Tensor:
    """[n] positions, by which ids come in order; of tokens of an example those stay as they are."""
    if isinstance(ids, Tensor):
        return ids.argsort(stable=True)
    return torch.tensor(sorted(range(len(ids)), key=ids.__getitem__), dtype=torch.int64)


def kind_of(ids: Ids | None) -> str:
    """ "integers", "strings", or "" for none."""
    return "" if ids is None else "integers" if isinstance(ids, Tensor) else "strings"


def picked(ids: Ids, positions: Tensor) -> Ids:
    """The ids at these positions."""
    return ids[positions] if isinstance(ids, Tensor) else [ids[i] for i in positions.tolist()]


def listed(ids: Ids) -> list[Any]:
    """As a list."""
    return ids.tolist() if isinstance(ids, Tensor) else ids


def joined(parts: Sequence[Ids | None]) -> Ids | None:
    """Those of one part after the other, all of one kind."""
    if not parts or parts[0] is None:
        return None
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return [one for part in parts for one in part]


def encoded(ids: Ids) -> bytes:
    """As the file has them: 8 bytes each, or a line of JSON."""
    if isinstance(ids, Tensor):
        return ids.numpy().astype("<i8", copy=False).tobytes()
    return "".join(json.dumps(one) + "\n" for one in ids).encode()


def decoded(data: bytes, kind: str, n: int) -> Ids:
    """The ids of n rows.

    Raises:
        ValueError: the data have something else.
    """
    if kind == "integers":
        if len(data) != 8 * n:
            raise ValueError("the number of ids is wrong")
        return torch.from_numpy(np.frombuffer(data, "<i8").astype(np.int64))
    try:
        ids = json.loads(b"[" + b",".join(data.splitlines()) + b"]")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"they are no JSON ({type(error).__name__})") from None
    if len(ids) != n or not all(type(one) is str for one in ids):
        raise ValueError("the number or the type of ids is wrong")
    return ids


def distinct(ids: Ids | None) -> Ids | None:
    """Each once."""
    if ids is None:
        return None
    return ids.unique() if isinstance(ids, Tensor) else list(dict.fromkeys(ids))


def first_twice(ids: Ids) -> Any:
    """An id that is there twice, or None."""
    seen = set()
    for one in listed(ids):
        if one in seen:
            return one
        seen.add(one)
    return None


def positions_of(ids: Ids | None, n: int, wanted: Ids) -> Tensor:
    """Where the rows of the wanted ids are, in the order asked for; of tokens all of each example.

    Raises:
        KeyError: an id is not there.
    """
    if ids is None:
        ids = torch.arange(n)
    asked = listed(wanted)
    places: dict[Any, list[int]] = {one: [] for one in asked}
    if isinstance(ids, Tensor) and isinstance(wanted, Tensor):
        for position in torch.isin(ids, wanted).nonzero().flatten().tolist():
            places[int(ids[position])].append(position)
    else:
        for position, one in enumerate(listed(ids)):
            if one in places:
                places[one].append(position)
    for one in asked:
        if not places[one]:
            raise KeyError(f"RowStore: no row has the id {one!r}")
    return torch.tensor([i for one in asked for i in places[one]], dtype=torch.int64)
