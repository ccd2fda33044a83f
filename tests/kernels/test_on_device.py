"""OpsOn: what tests give on the CPU arrives as it is, and what is written comes back."""

import torch
from on_device import Moved, OpsOn

from dropinf import ops


def test_views_keep_strides_guards_and_what_they_share():
    moved = Moved("cpu")  # copies all the same
    base = torch.arange(40.0).reshape(4, 10)
    view, part, column = base[1:3, 2:7].T, base[2], base[:1, :1].expand(3, 5)
    there, other, (wide,) = moved.there((view, part, [column]))
    assert there.data_ptr() != view.data_ptr()
    assert (there.stride(), there.storage_offset()) == (view.stride(), view.storage_offset())
    assert wide.stride() == (0, 0) and torch.equal(wide, column)
    there.fill_(-1)
    assert torch.equal(other, torch.tensor([20.0, 21, -1, -1, -1, -1, -1, 27, 28, 29]))
    assert base[1, 2] == 12  # nothing has come back
    assert moved.back(there) is view
    assert base[1, 2] == -1 and base[1, 1] == 11 and (part[2:7] == -1).all()
    again = moved.back({"a": there[0], "b": None})
    assert again["a"].data_ptr() == view[0].data_ptr() and again["b"] is None


def test_what_has_no_place_there_stays():
    moved = Moved("cpu")
    meta, sparse = torch.zeros(3, device="meta"), torch.zeros(3).to_sparse()
    assert moved.there(meta) is meta and moved.there(sparse).layout == torch.sparse_coo
    nothing = torch.zeros(0, 3)
    assert moved.back(moved.there(nothing)) is nothing


def test_ops():
    moving = OpsOn("cpu")
    rows, out = torch.randn(5, 7), torch.full((25 + 4,), torch.nan)
    assert moving.gram(rows, (0, 5, 7), out=out) is out
    assert torch.equal(out, ops.gram(rows, (0, 5, 7)))
    damped = moving.damped_cholesky(out, (0, 5, 7), 1.0, rows=rows, out=out)
    assert damped.factors is out and isinstance(damped, ops.DampedCholesky)
    assert torch.equal(moving.cholesky_solve(out, (0, 5, 7), rows), damped.solved)
