"""Tensors that are not plain memory, and where an op writes: each op, on every backend."""

import pytest
import torch
from conftest import BACKENDS
from torch import Tensor

from dropinf import ops
from dropinf.ops import checks, dispatch

FEW = torch.tensor([0, 2, 4]).int()
PACKED = torch.tensor([2.0, 0, 1, 2, 3, 0, -1, 4])  # two layers of 2 x 2


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def calls():
    """Each op's arguments; every tensor may be replaced by one of the same numbers."""
    ones = dict.fromkeys(("kernel_size", "stride", "padding", "dilation"), (1, 1))
    x, dy, index = randn(2, 3, 4), randn(2, 3, 5), torch.tensor([0, 3, 1]).int()
    nothing = {"values": torch.full((2, 3), -torch.inf), "indices": torch.full((2, 3), -1)}
    return {
        "sampled_outer": {
            "x": x,
            "dy": dy,
            "o_idx": torch.stack([FEW, FEW], 1),
            "i_idx": torch.stack([index, index], 1),
            "weights": torch.tensor([[1.5, -1], [1, 0], [-1, -2]]),
        },
        "factored_outer": {
            "x": x,
            "dy": dy,
            "o_idx": FEW.long(),
            "i_idx": index.long(),
            "weights": randn(9),
        },
        "sampled_embedding": {
            "ids": torch.tensor([[1, 2, 3], [1, 1, 1]]),
            "dy": dy,
            "o_idx": FEW,
            "i_idx": torch.tensor([1, 1, 3]).int(),
            "weights": torch.tensor([1.5, 0.0, -2.0]),
        },
        "sampled_conv": {
            "x": randn(2, 4, 5, 5),
            "dy": randn(2, 5, 7, 7),
            "o_idx": FEW,
            "i_idx": index,
            "weights": torch.tensor([1.5, 0.0, -2.0]),
            **ones,
        },
        "sampled_norm": {
            "x": x,
            "dy": dy[..., :4],
            "index": torch.stack([FEW, index], 1),
            "weights": torch.tensor([[1.5, -1], [1, 0], [-1, -2]]),
            "eps": 1e-5,
        },
        "gather_grads": {
            "grads": [randn(3, 4), randn(7)],
            "indices": [torch.tensor([[0, 5]]), torch.tensor([3])],
            "weights": torch.tensor([1.5, -1.0, 0.5]),
        },
        "gram": {"rows": randn(6, 4), "offsets": (0, 2, 4)},
        "damped_cholesky": {"matrices": PACKED, "offsets": (0, 2, 4), "rows": randn(3, 4)},
        "cholesky_solve": {"factors": PACKED, "offsets": (0, 2, 4), "rows": randn(3, 4)},
        "row_products": {
            "queries": randn(2, 4),
            "rows": randn(9, 4),
            "scales": torch.rand(9, 2),
            "offsets": (0, 2, 4),
        },
        "score_topk": {
            "queries": randn(2, 4),
            "rows": randn(9, 4),
            "factors": torch.rand(9),
            **nothing,
        },
    }


# What each op writes to that the caller may give, and its shape.
WRITTEN = {
    "sampled_outer": ("out", (2, 3)),
    "factored_outer": ("out", (2, 9)),
    "sampled_embedding": ("out", (2, 3)),
    "sampled_conv": ("out", (2, 3)),
    "sampled_norm": ("out", (2, 3)),
    "gather_grads": ("out", (2,)),
    "gram": ("out", (8,)),
    "damped_cholesky": ("out", (8,)),
    "cholesky_solve": ("out", (3, 4)),
    "row_products": ("out", (2, 9)),
    "score_topk": ("values", (2, 3)),
}
PAIRS = [
    (op, name) for op in calls() for name in BACKENDS if name.split("-")[0] in dispatch.KERNELS[op]
]
every = pytest.mark.parametrize("op, backend", PAIRS, indirect=["backend"])


def run(op, backend, arguments):
    result = getattr(ops, op)(**arguments, backend=backend.name)
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]


def mapped(change, arguments):
    """The arguments with every tensor changed, those in lists too."""
    return {
        name: change(value)
        if isinstance(value, Tensor)
        else [None if t is None else change(t) for t in value]
        if isinstance(value, list)
        else value
        for name, value in arguments.items()
    }


def negated(t):
    """The same numbers, which only the negative bit makes of what is in memory."""
    return torch._neg_view(t.neg())


def imaginary(t):
    """The same, as autograd gives it: of a complex conjugate, with a stride of 2."""
    return torch.complex(torch.zeros(t.shape), t.neg()).conj().imag if t.is_floating_point() else t


@every
@pytest.mark.parametrize("lazy", [negated, imaginary])
def test_negative_bit(backend, op, lazy):
    given = calls()[op]
    written = ("values", "indices") if op == "score_topk" else ()
    kept = {name: given[name].clone() for name in written}
    packed = ("matrices", "factors") if lazy is imaginary else ()  # must be contiguous
    changed = mapped(lazy, {k: v for k, v in given.items() if k not in kept and k not in packed})
    some = [t for v in changed.values() for t in (v if isinstance(v, list) else [v])]
    assert any(isinstance(t, Tensor) and t.is_neg() for t in some)
    truth = run(op, backend, given)
    for out, exact in zip(run(op, backend, {**given, **changed, **kept}), truth, strict=True):
        assert torch.equal(out, exact)


def test_zeros_without_memory(backend):
    """What forward-mode derivatives leave; in a list nothing but the op sees to it."""
    zeros = torch._efficientzerotensor((3, 4))
    at = torch.tensor([0, 5])
    assert not ops.gather_grads([zeros], [at], backend=backend.name).any()


OPS = ("gather_grads",)  # for the test above


@every
def test_out_that_is_no_memory_of_its_own(backend, op):
    name, shape = WRITTEN[op]
    given = calls()[op]
    views = [
        torch.zeros(1).expand(shape),
        torch.zeros(100).as_strided(shape, (1,) * len(shape)),
        negated(torch.zeros(shape)),
        torch._efficientzerotensor(shape),
    ]
    for view in views:
        if len(shape) == 1 and view.stride() == (1,) and not view.is_neg():
            continue  # memory of its own, but for the zeros
        with pytest.raises(ValueError, match=f"{op}: {name} (must|is written)"):
            run(op, backend, {**given, name: view})


@pytest.mark.parametrize(
    "shape, strides, overlap",
    [
        ((5,), (0,), True),
        ((1,), (0,), False),
        ((3,), (7,), False),
        ((0, 3), (0, 0), False),
        ((4, 1), (0, 0), True),
        ((4, 1), (1, 0), False),
        ((3, 4), (2, 1), True),
        ((3, 4), (9, 2), False),
        ((2, 2), (2, 3), False),
        ((4, 4), (2, 3), True),
        ((3, 4), (1, 3), False),
    ],
)
def test_overlaps(shape, strides, overlap):
    view = torch.arange(99).as_strided(shape, strides)
    assert (view.unique().numel() < view.numel()) == overlap == checks._overlaps(view)


@every
def test_inputs_that_require_grad(backend, op):
    given = calls()[op]
    truth = run(op, backend, mapped(Tensor.clone, given))
    for name, value in given.items():
        first = value[0] if isinstance(value, list) else value
        if not isinstance(first, Tensor) or not first.is_floating_point():
            continue
        leaf = first.clone().requires_grad_()
        at = f"{name}[0]" if isinstance(value, list) else name
        again = mapped(Tensor.clone, given)
        again[name] = [leaf, *value[1:]] if isinstance(value, list) else leaf
        message = rf"{op}: {at} requires grad, and the op has no derivative; call it under".replace(
            "[0]", r"\[0\]"
        )
        with pytest.raises(ValueError, match=message):
            run(op, backend, again)
        with torch.no_grad():
            for out, exact in zip(run(op, backend, again), truth, strict=True):
                assert torch.equal(out, exact) and not out.grad_fn


@every
def test_empty_batch_of_any_strides(backend, op):
    """Nothing is read, so a last dimension with gaps is as good as any."""
    given = calls()[op]
    if op in ("gather_grads", "damped_cholesky"):
        pytest.skip("no batch, or its matrices are the batch")
    batched = {"x", "dy", "ids", "rows"} - ({"rows"} if "queries" in given else set())
    for name, value in given.items():
        if name in batched or name in ("queries", "values", "indices"):
            wide = value.repeat_interleave(2, -1)[..., ::2][:0]
            given[name] = wide.contiguous() if name in ("values", "indices") else wide
    name, shape = WRITTEN[op]
    outs = run(op, backend, given)
    if op == "gram":
        assert not outs[0].any()
    else:
        assert outs[0].shape == (0, *shape[1:])


@pytest.mark.parametrize("op", calls())
def test_meta(op):
    """Shapes and dtypes without numbers."""
    given = mapped(Tensor.clone, calls()[op])
    truth = getattr(ops, op)(**given)
    out = getattr(ops, op)(**mapped(lambda t: t.to("meta"), given))
    for t, exact in zip(*(r if isinstance(r, tuple) else (r,) for r in (out, truth)), strict=True):
        assert t is exact or (t.is_meta and (t.shape, t.dtype) == (exact.shape, exact.dtype))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("op", calls())
def test_compiled(op):
    torch.compiler.reset()
    given = calls()[op]
    truth = getattr(ops, op)(**mapped(Tensor.clone, given))
    # gather_grads looks at all layers at once, in a way that torch.compile does not follow.
    compiled = torch.compile(
        lambda arguments: getattr(ops, op)(**arguments),
        backend="aot_eager",
        fullgraph=op != "gather_grads",
    )
    out = compiled(mapped(Tensor.clone, given))
    for t, exact in zip(*(r if isinstance(r, tuple) else (r,) for r in (out, truth)), strict=True):
        assert t is exact or torch.equal(t, exact)
