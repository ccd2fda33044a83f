"""Rows for Arrow: a table over the memory that they are in."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dropinf.extras import optional
from dropinf.rows.ids import Ids, kind_of

if TYPE_CHECKING:
    from dropinf.rows.store import RowStore


def table_of(store: RowStore) -> Any:
    """See `RowStore.to_arrow`."""
    pyarrow = optional("pyarrow", "arrow", "RowStore.to_arrow")
    if store.device.type != "cpu":
        raise ValueError(
            f"RowStore.to_arrow: the rows are on {store.device}, and Arrow reads memory of the "
            "CPU; take store.to('cpu')"
        )
    if store.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"RowStore.to_arrow: Arrow has no type for rows that are kept in {store.dtype}; "
            "`dropinf export` writes them as float32, and RowStore(store.rows, store.plan, "
            "store.valid, store.origin, store.ids) has them so in memory"
        )
    for _ in store.chunks():  # compares checksums
        pass
    number = pyarrow.from_numpy_dtype(str(store.dtype).removeprefix("torch."))
    ids, origin = store.ids, store.origin
    strings = kind_of(ids) == "strings"
    types = {
        "id": pyarrow.string() if strings else pyarrow.int64(),
        "row": pyarrow.list_(number, store.plan.width),
        "valid": pyarrow.bool_(),
    }
    if origin is not None:
        types["origin"] = pyarrow.list_(pyarrow.int64(), 2)
    schema = pyarrow.schema(list(types.items()), metadata={"dropinf": json.dumps(_about(store))})
    batches, first = [], 0
    for part in store.parts:
        at = slice(first, first + len(part))
        columns = [
            _ids(pyarrow, ids[at]),
            _lists(pyarrow, types["row"], part.packed),
            pyarrow.array(store.valid[at].numpy()),
        ]
        if origin is not None:
            columns.append(_lists(pyarrow, types["origin"], part.origin))
        batches.append(pyarrow.record_batch(columns, schema=schema))
        first = at.stop
    return pyarrow.Table.from_batches(batches, schema)


def _lists(pyarrow: Any, kind: Any, rows: Tensor) -> Any:
    """[n, w] as an array of lists of w: the same memory, if the rows are contiguous."""
    flat = rows.contiguous().numpy().reshape(-1)
    values = pyarrow.Array.from_buffers(kind.value_type, len(flat), [None, pyarrow.py_buffer(flat)])
    return pyarrow.Array.from_buffers(kind, len(rows), [None], children=[values])


def _ids(pyarrow: Any, ids: Ids) -> Any:
    if isinstance(ids, Tensor):
        return pyarrow.array(ids.numpy())
    return pyarrow.array(ids, pyarrow.string())


def _about(store: RowStore) -> dict[str, Any]:
    return {
        "plan": store.plan.fingerprint,
        "weights": store.weights,
        "updates": store.updates,
        "compression": repr(store.plan.compression),
        "layers": [
            {"name": block.name, "first": block.offset, "r": block.r} for block in store.plan.blocks
        ],
    }
