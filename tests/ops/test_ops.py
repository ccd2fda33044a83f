"""What all ops share: arguments are checked alike for every backend, before it is looked up."""

import pytest
import torch

import dropinf
from dropinf import ops
from dropinf.ops import dispatch

x, dy, index = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(6).int()
image, conv = torch.zeros(2, 4, 5, 5), dict.fromkeys(("stride", "dilation"), (1, 1))
conv |= {"kernel_size": (3, 3), "padding": (1, 1)}
kept = torch.full((2, 5), -torch.inf), torch.full((2, 5), -1)
packed, offsets, rows = torch.zeros(13), (0, 3, 5), torch.zeros(2, 5)

CALLS = {  # op: arguments, one of them wrong, and what is said of it
    "sampled_outer": ((x, dy.half(), index, index), {}, "dy must be torch.float32"),
    "factored_outer": ((x, dy.half(), None, None), {}, "dy must be torch.float32"),
    "sampled_embedding": ((x[..., 0], dy, index, index), {}, r"ids must be \[B, T\] int64"),
    "sampled_conv": ((image, image, index, index), conv | {"groups": 3}, "groups must divide"),
    "sampled_norm": ((x, dy, index), {"eps": 0.0}, r"x and dy must both be \[B, T, I\]"),
    "gather_grads": (([x], [index]), {}, r"indices\[0\] must be torch.int64"),
    "gram": ((rows, offsets), {"accumulate": True}, "accumulate=True adds to out"),
    "damped_cholesky": ((packed[1:], offsets), {}, r"matrices must be contiguous \[13\]"),
    "cholesky_solve": ((packed, offsets, rows[:, 1:]), {}, r"rows must be \[m, R=5\]"),
    "row_products": ((rows, rows.half()), {"scales": rows}, "scales need offsets"),
    "score_topk": ((x[0], x[1], *kept), {"first": -1}, "values and indices must both be"),
}


def test_every_op_is_called_here():
    assert set(CALLS) == set(dispatch.KERNELS)


@pytest.mark.parametrize("op", CALLS)
def test_bad_input_is_refused_before_a_backend_is_looked_up(op):
    arguments, options, message = CALLS[op]
    for backend in (None, "reference", "nonsense"):
        with pytest.raises(ValueError, match=f"^{op}: {message}"):
            getattr(ops, op)(*arguments, **options, backend=backend)


def test_an_unknown_backend_is_refused():
    with pytest.raises(
        dropinf.BackendError, match=r"^gram: backend 'nonsense' is unknown\. Here: "
    ):
        ops.gram(rows, offsets, backend="nonsense")


@pytest.mark.ops("gram")
@pytest.mark.backends("cpu")
def test_a_backend_for_another_device_is_refused(backend):
    with pytest.raises(dropinf.BackendError, match=r"'cpu' is not for tensors on meta\. Here: "):
        ops.gram(rows.to("meta"), offsets, backend=backend.name)


@pytest.mark.ops("sampled_outer")
@pytest.mark.backends("cpu")
def test_a_backend_for_another_out_is_refused(backend):
    out = torch.zeros(2, 6, dtype=torch.float64)
    refused = r"'cpu' is for a float32 out, not torch\.float64\. Here: 'reference'"
    with pytest.raises(dropinf.BackendError, match=refused):
        ops.sampled_outer(x, dy, index, index, out=out, backend=backend.name)
    assert ops.sampled_outer(x, dy, index, index, out=out) is out


def test_bounds_in_a_list_may_change():
    bounds = [0, 3, 5]
    assert len(ops.gram(rows, bounds)) == 9 + 4
    bounds[1] = 4
    assert len(ops.gram(rows, bounds)) == 16 + 1
