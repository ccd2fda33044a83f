"""Calls of each function in the table of alignment, and which owners it may lose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class Call(NamedTuple):
    name: str  # in the graph
    function: Callable[..., Tensor | Sequence[Tensor]]
    shapes: tuple[tuple[int, ...], ...]  # of its arguments
    # Dimensions of the result along which owners may be lost although nothing mixes: of -1 all.
    loses: frozenset[int]
    label: str
    positive: bool  # arguments between 0.1 and 0.9
    complex: bool


def words(text: str) -> list[str]:
    return text.split()


CALLS: list[Call] = []
_ALL = frozenset([-1])


def call(name, function, *shapes, loses=(), label="", positive=False, complex=False):
    """Each of the names in `name` that the function leaves in the graph; the first is asked."""
    loses = _ALL if loses == "all" else frozenset(loses)
    CALLS.append(Call(name, function, shapes or ((3, 4),), loses, label, positive, complex))


# Elementwise, of one argument.
for name in words("""
    abs asin asinh atan atanh ceil clone cos cosh deg2rad digamma erf erfc erfinv exp exp2
    expm1 floor frac i0 lgamma log log10 log1p log2 logit nan_to_num neg rad2deg reciprocal relu
    round rsqrt sgn sigmoid sign sin sinc sinh sqrt tan tanh trunc acos tril triu
"""):
    node = "".join(part.capitalize() for part in name.split("_"))
    call(
        node.replace("1p", "1P").replace("2r", "2R").replace("2d", "2D"),
        getattr(torch, name),
        (2, 3, 4),
        positive=True,
    )
call("Acosh", lambda x: torch.acosh(x + 2), positive=True)
for name in words("""
    celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu mish silu softplus softshrink
"""):
    node = "".join(part.capitalize() for part in name.split("_"))
    call(node, getattr(F, name), positive=True)
call("Celu", F.celu)
call("LogSigmoid", F.logsigmoid)
call("Threshold", lambda x: F.threshold(x, 0.1, 0.0))
call("NativeDropout", lambda x: aten.native_dropout(x, 0.2, True)[0])
call("Alias", aten.alias)
call("ToCopy", lambda x: x.float())
call("Copy", lambda x: torch.zeros(3, 4, dtype=torch.float64).copy_(x), label="into zeros")
call("Copy", lambda x, y: x.clone().copy_(y), (3, 4), (4,), label="broadcast")
call("Expand", lambda x: x.expand(3, 4), (1, 4))
call("Expand", lambda x: x.expand(3, -1, 4), (2, 1), label="in front")
call("Expand", lambda x: x.expand(2, 3), (), label="of a number")
call("Conj", lambda x: x.conj(), complex=True)
call("ConjPhysical", lambda x: x.conj_physical(), complex=True)
call("ViewAsReal", torch.real, complex=True, label="real", loses="all")
call("Angle", torch.angle, complex=True)
call("Abs", torch.abs, complex=True, label="complex")

# Elementwise, of several that broadcast.
for name in words("""
    add sub mul div maximum minimum fmax fmin atan2 copysign hypot logaddexp logaddexp2 xlogy pow
    remainder fmod complex rsub
"""):
    node, function = name.capitalize(), getattr(torch, name)
    for shapes in (((3, 4), (3, 4)), ((2, 3, 4), (3, 1)), ((3, 1), (4,)), ((), (3, 4))):
        if name in ("remainder", "fmod") and shapes[0] == ():
            continue
        # The sign that is copied has no gradient.
        call(node, function, *shapes, positive=True, label=str(shapes),
             loses=[0, 1, 2] if name == "copysign" else [])  # fmt: skip
call("Where", lambda x, y: torch.where(torch.tensor([[True], [False], [True]]), x, y), (3, 4), (4,),
     loses=[0])  # fmt: skip
call("MaskedFill", lambda x, v: x.masked_fill(torch.tensor([1, 0, 1, 1]).bool(), v), (3, 4), ())
call("Lerp", torch.lerp, (3, 4), (4,), (3, 1))
call("Addcmul", torch.addcmul, (4,), (3, 4), (3, 1))
call("Addcdiv", torch.addcdiv, (3, 1), (3, 4), (3, 4), positive=True)
call("Clamp", lambda x, a, b: torch.clamp(x, a, b), (3, 4), (4,), (3, 1), positive=True,
     loses=[0, 1])  # fmt: skip
call("ClampMin", lambda x, a: torch.clamp_min(x, a), (3, 4), (1, 4))
call("ClampMax", lambda x, a: torch.clamp_max(x, a), (3, 4), ())

# Shapes.
call("View", lambda x: x.view(12), (3, 4))
call("View", lambda x: x.view(3, 2, 2, 2), (3, 2, 4), label="apart")
call("View", lambda x: x.view(2, 6), (2, 3, 2), label="together")
call("View", lambda x: x.view(4, 3), (3, 4), label="across", loses=[0, 1])
call("View", lambda x: x.view(1, 3, 1, 4), (3, 4), label="ones")
call("View", lambda x: x.view(3, 4), (1, 3, 1, 4), label="no ones")
call("UnsafeView", lambda x: aten._unsafe_view(x, (2, 6)), (2, 3, 2))
call("ReshapeAlias", lambda x: aten._reshape_alias(x, (2, 6), (6, 1)), (2, 3, 2))
call("Squeeze", lambda x: x.squeeze(-2), (3, 1, 4))
call("Squeeze", lambda x: x.squeeze(), (1, 3, 1, 4), label="all")
call("Squeeze", lambda x: x.squeeze((0, 2)), (1, 3, 1, 4), label="two")
call("Unsqueeze", lambda x: x.unsqueeze(-1), (3, 4))
call("Unsqueeze", lambda x: x.unsqueeze(0), (3, 4), label="first")
call("Permute", lambda x: x.permute(2, 0, 1), (2, 3, 4))
call("Permute", lambda x: x.permute(-1, 1, -3), (2, 3, 4), label="from the end")
call("Transpose", lambda x: x.transpose(0, 2), (2, 3, 4))
call("Transpose", lambda x: x.transpose(-1, -2), (2, 3, 4), label="from the end")
call("T", lambda x: x.t(), (3, 4))
call("Transpose", lambda x: x.mT, (2, 3, 4), label="mT")
call("ViewAsReal", torch.view_as_real, complex=True, loses=[2])
call("ViewAsComplex", torch.view_as_complex, (3, 4, 2))

# Reductions.
for name in words("amax amin logsumexp mean sum std var nansum prod"):
    node, function = name.capitalize(), getattr(torch, name)
    for keepdim in (False, True):
        for dim in (0, -1, (0, 2), (-1, -2), (0, 1, 2)):
            if name == "prod" and not isinstance(dim, int):
                continue
            call(
                node,
                lambda x, f=function, d=dim, k=keepdim: f(x, d, keepdim=k),
                (2, 3, 4),
                label=f"{dim} {keepdim}",
            )
for name in words("max min median mode nanmedian"):
    for keepdim in (False, True):
        for dim in (0, 1, -1):
            call(
                name.capitalize(),
                lambda x, n=name, d=dim, k=keepdim: getattr(torch, n)(x, d, keepdim=k)[0],
                (2, 3, 4),
                label=f"{dim} {keepdim}",
            )
for name in words("max min median nanmedian sum mean prod std var amax nansum logsumexp"):
    function = getattr(torch, name)
    if name == "logsumexp":
        call("Logsumexp", lambda x: x.logsumexp(0), (4,), label="of one dimension")
    else:
        call(name.capitalize(), function, (3, 4), label="of all")
        call(name.capitalize(), function, (4,), label="of all of one dimension")
call("Sum", lambda x: x.sum(()), (3, 4), label="empty dims")
for dim in (1, -1, (0, 1), None):
    call("LinalgVectorNorm", lambda x, d=dim: torch.linalg.vector_norm(x, 3, d), label=str(dim))
call("Norm", lambda x: aten.norm.ScalarOpt_dim(x, 2, [-1], False))
call("Norm", lambda x: aten.norm.Scalar(x, 2), label="of all")
call("Norm", lambda x: aten.norm.ScalarOpt_dim(x, 2, [1], True), (2, 3, 4), label="kept")

# Along one dimension.
for dim in (0, 1, -1):
    at = {"label": str(dim)}
    call("Softmax", lambda x, d=dim: x.softmax(d), (2, 3, 4), **at)
    call("LogSoftmax", lambda x, d=dim: x.log_softmax(d), (2, 3, 4), **at)
    call("SafeSoftmax", lambda x, d=dim: aten._safe_softmax(x, d), (2, 3, 4), **at)
    call("Cumsum", lambda x, d=dim: x.cumsum(d), (2, 3, 4), **at)
    call("Cumprod", lambda x, d=dim: x.cumprod(d), (2, 3, 4), **at)
    call("Cummax", lambda x, d=dim: x.cummax(d)[0], (2, 3, 4), loses="all", **at)
    call("Cummin", lambda x, d=dim: x.cummin(d)[0], (2, 3, 4), loses="all", **at)
    call("Logcumsumexp", lambda x, d=dim: x.logcumsumexp(d), (2, 3, 4), **at)
    call("Sort", lambda x, d=dim: x.sort(d)[0], (2, 3, 4), loses="all", **at)
    call("Topk", lambda x, d=dim: x.topk(2, d)[0], (2, 3, 4), loses="all", **at)
    call("Kthvalue", lambda x, d=dim: x.kthvalue(2, d, True)[0], (2, 3, 4), **at)
    call("Flip", lambda x, d=dim: x.flip(d), (2, 3, 4), **at)
    call("Glu", lambda x, d=dim: F.glu(x, d), (2, 4, 6), loses={dim % 3}, **at)
    call("Roll", lambda x, d=dim: x.roll(1, d), (2, 3, 4), **at)
    call("Roll", lambda x, d=dim: x.roll(-1, d), (2, 3, 4), label=f"{dim} back")
    call("Slice", lambda x, d=dim: x.narrow(d, 1, 1), (2, 3, 4), **at)
    call("Slice", lambda x, d=dim: aten.slice(x, d, -2, None, 1), (2, 3, 4), label=f"{dim} end")
    call("Slice", lambda x, d=dim: aten.slice(x, d, 0, -1, 2), (2, 3, 4), label=f"{dim} step")
    call("Select", lambda x, d=dim: x.select(d, 1), (2, 3, 4), **at)
    call("Select", lambda x, d=dim: x.select(d, -1), (2, 3, 4), label=f"{dim} end")
    call("Unbind", lambda x, d=dim: x.unbind(d), (2, 3, 4), **at)
    call("Split", lambda x, d=dim: x.split(2, d), (2, 3, 4), **at)
    call("UnsafeSplit", lambda x, d=dim: x.unsafe_split(2, d), (2, 3, 4), **at)
    call("Unfold", lambda x, d=dim: x.unfold(d, 2, 1), (2, 3, 4), **at)
    call("IndexSelect", lambda x, d=dim: x.index_select(d, torch.tensor([1, 0])), (2, 3, 4), **at)
    call("Cat", lambda x, y, d=dim: torch.cat([x, y], d), (2, 3, 4), (2, 3, 4), **at)
    call("Cat", lambda x, d=dim: torch.cat([torch.zeros(2, 3, 4), x, torch.ones(2, 3, 4)], d),
         (2, 3, 4), label=f"{dim} beside data")  # fmt: skip
    call("Stack", lambda x, y, d=dim: torch.stack([x, y], d), (2, 3, 4), (2, 3, 4), **at)
    call("Stack", lambda x, y, d=dim: torch.stack([x, torch.ones(2, 3), y], d), (2, 3), (2, 3),
         label=f"{dim} beside data")  # fmt: skip
call("Kthvalue", lambda x: x.kthvalue(2, 0)[0], (3, 4), label="not kept")
call("Sort", lambda x: x.sort(stable=True, descending=True)[0], loses="all", label="stable")
call("Flip", lambda x: x.flip(0, -1), (2, 3, 4), label="two")
call("Roll", lambda x: x.roll((1, 2), (0, -1)), (2, 3, 4), label="two")
call("Roll", lambda x: x.roll(5), (3, 4), label="all", loses="all")
call("SplitWithSizes", lambda x: x.split([1, 3, 0], -1), (3, 4))
call("SplitWithSizes", lambda x: x.split([1, 2]), (3, 4), label="first")
call("UnsafeSplitWithSizes", lambda x: x.unsafe_split_with_sizes([1, 3], 1), (3, 4))
call("Unbind", lambda x: x.unbind()[1:], (3, 4), label="some")
call("Unbind", lambda x: x.unbind(), (3,), label="numbers")
call("Split", lambda x: x.chunk(3, 1)[::2], (2, 6), label="some")
call("Unfold", lambda x: x.unfold(-1, 3, 2), (3, 7), label="step")
call("Cat", lambda x, y: torch.cat([x, y]), (1, 4), (2, 4), label="lengths")
call("Cat", lambda x, y: torch.cat([x, torch.zeros(0), y]), (1, 4), (2, 4), label="an empty one")
call("Cat", lambda x: torch.cat([x, x.flip(0)], 1), (3, 4), label="one twice")
call("Repeat", lambda x: x.repeat(2, 1), (3, 4), loses=[0])
call("Repeat", lambda x: x.repeat(2, 1, 3), (1, 4), label="in front", loses=[0, 1, 2])
call("Repeat", lambda x: x.repeat(3, 1), (1, 4), label="of one")
call("ConstantPadNd", lambda x: aten.constant_pad_nd(x, (1, 2)), (3, 4))
call("ConstantPadNd", lambda x: aten.constant_pad_nd(x, (0, 0, 1, 2)), (3, 4), label="first")
call("ConstantPadNd", lambda x: aten.constant_pad_nd(x, (0, 0, 1, -1)), (3, 4), label="shifted",
     loses="all")  # fmt: skip
call("ConstantPadNd", lambda x: aten.constant_pad_nd(x, (-1, -1, 1, 0)), (3, 4), label="cut",
     loses="all")  # fmt: skip
call("ConstantPadNd", lambda x: F.pad(x, (1, 0, 0, 1)), (3, 4), label="F.pad", loses=[0, 1])
call("ConstantPadNd", lambda x: F.pad(x, (0, 0, 1, -1)), (3, 4), label="F.pad, shifted",
     loses="all")  # fmt: skip
call("Diagonal", lambda x: x.diagonal(), (3, 4))
call("Diagonal", lambda x: x.diagonal(1, -1, 0), (3, 2, 4), label="above")
call("Diagonal", lambda x: x.diagonal(-1, 1, 2), (2, 4, 4), label="below")

# Indices.
I, J = torch.tensor([2, 0, 1]), torch.tensor([0, 3, 1])
call("Index", lambda x: x[I], (3, 4))
call("Index", lambda x: x[I, J], (3, 4), label="pairs")
call("Index", lambda x: x[:, J], (3, 4), label="second")
call("Index", lambda x: x[:, I, :, J], (2, 3, 2, 4), label="apart")
call("Index", lambda x: x[I[:, None], J], (3, 4), label="a grid")
call("Index", lambda x: x[I - 3], (3, 4), label="from the end")
call("Index", lambda x: x[I.view(3, 1).expand(3, 2)], (3, 2), label="repeated", loses=[1])
call("Index", lambda x: x[torch.tensor([True, False, True])], (3, 4), label="a mask")
call("Index", lambda x: x[:, torch.tensor([[1, 0, 1], [0, 1, 1]]).bool()], (2, 2, 3),
     label="a mask of two")  # fmt: skip
call("Index", lambda x: x[torch.tensor([0, 0, 1], dtype=torch.uint8)], (3, 4), label="bytes")
call("Index", lambda x: x[torch.tensor([0, 1, 1], dtype=torch.uint8)], (3, 4), label="two bytes")
call("Index", lambda x: x[I.int()], (3, 4), label="int32")
call("UnsafeIndex", lambda x: aten._unsafe_index(x, [None, J]), (3, 4))
call("IndexSelect", lambda x: x.index_select(-1, torch.tensor(2)), (3, 4), label="a number")
call("Gather", lambda x: x.gather(0, I[:, None].expand(3, 4)), (3, 4))
call("Gather", lambda x: x.gather(-1, torch.tensor([[3, 0], [1, 1]])), (3, 4), label="part")
call("Gather", lambda x: x.gather(1, torch.tensor([[3], [1], [0]])), (3, 4), label="one each")
call("IndexAdd", lambda x, s: x.index_add(0, I[:2], s), (3, 4), (2, 4))
call("IndexAdd", lambda x, s: x.index_add(-1, torch.tensor([1, 1]), s), (3, 4), (3, 2), label="1")
call(
    "IndexAdd", lambda s: torch.zeros(4, 3).double().index_add(0, J, s), (3, 3), label="into zeros"
)
call("IndexCopy", lambda x, s: x.index_copy(0, I[:2], s), (3, 4), (2, 4))
call("IndexCopy", lambda x, s: x.index_copy(1, J[1], s), (3, 4), (3, 1), label="a number")
SPREAD = torch.tensor([[2, 0, 1, 1], [0, 1, 2, 0]])
call("Scatter", lambda x, s: x.scatter(0, SPREAD, s), (3, 4), (2, 4))
call("Scatter", lambda x, s: x.scatter(1, SPREAD[:, :2], s), (3, 4), (2, 2), label="1",
     loses=[0])  # fmt: skip
call("Scatter", lambda x: x.scatter(0, SPREAD, 2.0), (3, 4), label="a number")
call("ScatterAdd", lambda x, s: x.scatter_add(-1, SPREAD, s), (3, 4), (2, 4), loses=[0])
for how in ("sum", "prod", "mean", "amax"):
    call("ScatterReduce", lambda x, s, h=how: x.scatter_reduce(0, SPREAD, s, h), (3, 4), (2, 4),
         label=how)  # fmt: skip
    call("ScatterReduce", lambda x, s, h=how: x.scatter_reduce(0, SPREAD, s, h, include_self=False),
         (3, 4), (2, 4), label=f"{how} without")  # fmt: skip
call("IndexPut", lambda x, v: x.index_put((I[:2],), v), (3, 4), (2, 4))
call("IndexPut", lambda x, v: x.index_put((I, J), v, accumulate=True), (3, 4), (3,), label="pairs")
call("IndexPut", lambda x, v: x.index_put((I[:2],), v), (3, 4), (4,), label="one value", loses=[0])
call("IndexPut", lambda x, v: aten.index_put(x, [None, J[:2]], v), (3, 4), (3, 2), label="second")
call("IndexPut", lambda x, v: x.index_put((torch.tensor([1, 0, 1]).bool(),), v), (3, 4), (2, 4),
     label="a mask")  # fmt: skip
call("IndexPut", lambda x, v: x.index_put((torch.tensor([0, 0, 1]).byte(),), v), (3, 4), (1, 4),
     label="bytes", loses=[0])  # fmt: skip
call("IndexPut", lambda x, v: x.index_put((CHECKERED, J[2:]), v), (3, 4, 2), (5,),
     label="behind a mask")  # fmt: skip
call("IndexPutImpl", lambda x, v: aten._index_put_impl_(x.clone(), [I[:2]], v), (3, 4), (2, 4))
call("UnsafeIndexPut", lambda x, v: aten._unsafe_index_put(x, [I[:2]], v), (3, 4), (2, 4))
CHECKERED = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0], [1, 1, 0, 0]]).bool()
call("MaskedScatter", lambda x, s: x.masked_scatter(CHECKERED, s), (3, 4), (3, 2))
call("MaskedScatter", lambda x, s: x.masked_scatter(CHECKERED[1], s), (3, 4), (3,), label="a row")


def written(index):
    def write(x, v):
        x = x.clone()
        x[index] = v
        return x

    return write


call("CopySlices", written(1), (3, 4), (4,))
call("CopySlices", written(slice(0, 2)), (3, 4), (2, 4), label="a slice")
call("CopySlices", written(slice(0, 2)), (3, 4), (), label="a number", loses=[0, 1])
call("CopySlices", written((slice(None), -1)), (3, 4), (3,), label="a column")
call("CopySlices", written((..., slice(1, None, 2))), (2, 3, 4), (3, 2), label="an ellipsis",
     loses=[0])  # fmt: skip
call("CopySlices", written((slice(1, None), J)), (3, 4), (2, 3), label="behind a slice")
call("CopySlices", written((None, slice(0, 2))), (3, 4), (1, 2, 4), label="None")
call("CopySlices", lambda v: written(slice(1, 3))(torch.zeros(3, 4, dtype=torch.float64), v),
     (2, 4), label="into zeros")  # fmt: skip
call("CopySlices", lambda x, v: (y := x.clone(), y.view(-1)[2:6].copy_(v), y)[-1], (3, 4), (4,),
     label="through a view", loses="all")  # fmt: skip

# Products.
call("Mm", torch.mm, (3, 4), (4, 2))
call("Bmm", torch.bmm, (2, 3, 4), (2, 4, 2))
call("Addmm", torch.addmm, (2,), (3, 4), (4, 2))
call("Addmm", torch.addmm, (3, 1), (3, 4), (4, 2), label="a column")
call("Baddbmm", torch.baddbmm, (3, 2), (2, 3, 4), (2, 4, 2))
call("Dot", torch.dot, (4,), (4,))
call("LinalgCross", lambda x, y: torch.linalg.cross(x, y), (2, 3), (2, 3))
call("LinalgCross", lambda x, y: torch.linalg.cross(x, y, dim=0), (3, 4), (3, 4), label="first")
call("LinalgCross", lambda x, y: torch.linalg.cross(x, y), (1, 3), (2, 3), label="broadcast",
     loses="all")  # fmt: skip
call("Mv", torch.mv, (3, 4), (4,))
call("Addmv", torch.addmv, (3,), (3, 4), (4,))
call("Addmv", torch.addmv, (1,), (3, 4), (4,), label="of one", loses=[0])
EYE = torch.eye(3, dtype=torch.float64)
call("LinalgInvEx", lambda x: torch.linalg.inv(x + 3 * EYE), (2, 3, 3))
call("LinalgSolveEx", lambda x, y: torch.linalg.solve(x + 3 * EYE, y), (2, 3, 3), (2, 3, 4),
     loses=[1, 2])  # fmt: skip
call("LinalgSolveEx", lambda x, y: torch.linalg.solve(x + 3 * EYE, y), (2, 3, 3), (2, 3),
     label="vectors", loses="all")  # fmt: skip
call("LinalgSolveEx", lambda x, y: torch.linalg.solve(x + 3 * EYE, y), (3, 3), (2, 3, 4),
     label="one matrix", loses=[0, 1, 2])  # fmt: skip
call("LinalgSolveTriangular", lambda x, y: torch.linalg.solve_triangular(
    x.tril(-1) + EYE, y, upper=False), (2, 3, 3), (2, 3, 4), loses=[1, 2])  # fmt: skip
call("LinalgCholeskyEx", lambda x: torch.linalg.cholesky(x @ x.mT + EYE), (2, 3, 3))
call("Cholesky", lambda x: aten.cholesky(x @ x.mT + EYE), (2, 3, 3))
call("ScaledDotProductFlashAttentionForCpu", F.scaled_dot_product_attention,
     (2, 2, 3, 4), (2, 2, 3, 4), (2, 2, 3, 4), loses=[2, 3])  # fmt: skip
call("ScaledDotProductFlashAttentionForCpu",
     lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
     (2, 4, 3, 4), (2, 2, 3, 4), (2, 2, 3, 4), label="shared heads", loses=[1, 2, 3])  # fmt: skip

# Layers; what all examples share is lost whatever happens.
call("NativeLayerNorm", lambda x: F.layer_norm(x, (4,)), (2, 3, 4))
call("NativeLayerNorm", lambda x: F.layer_norm(x, (3, 4)), (2, 3, 4), label="two")
call("NativeLayerNorm", lambda x, w: F.layer_norm(x, (4,), w), (3, 4), (4,), label="weight",
     loses="all")  # fmt: skip
call("NativeGroupNorm", lambda x: F.group_norm(x, 2), (3, 4, 2), loses=[1])
call("NativeBatchNorm", lambda x: F.batch_norm(x, torch.zeros(4).double(), torch.ones(4).double()),
     (3, 4, 2))  # fmt: skip
call("NativeBatchNorm", lambda x: F.batch_norm(x, None, None, training=True), (3, 4, 2),
     label="train", loses="all")  # fmt: skip
KERNELS = torch.randn(2, 4, 2).double()
call("Convolution", lambda x: F.conv1d(x, KERNELS), (3, 4, 5))
call("Convolution", lambda x, w: F.conv1d(x, w, padding=1), (3, 4, 5), (2, 4, 2), label="weight",
     loses="all")  # fmt: skip
call("Convolution", lambda x: F.conv_transpose1d(x, KERNELS), (3, 2, 5),
     label="transposed")  # fmt: skip
call("Convolution", lambda x: F.conv1d(x, KERNELS[:, :1], groups=2), (3, 2, 5), label="groups",
     loses=[1])  # fmt: skip
call("Convolution", lambda x: F.conv1d(x, KERNELS[:, :, :1]), (3, 4, 5), label="of one",
     loses=[2])  # fmt: skip
for d in (2, 3):
    size = (2, 2) + (4,) * d
    every = {"loses": range(1, d + 2)}
    call(f"AvgPool{d}D", lambda x, d=d: getattr(F, f"avg_pool{d}d")(x, 2), size, **every)
    call(f"MaxPool{d}DWithIndices", lambda x, d=d: getattr(F, f"max_pool{d}d")(x, 2), size, **every)
    call(f"AdaptiveAvgPool{d}D", lambda x, d=d: getattr(F, f"adaptive_avg_pool{d}d")(x, 2), size,
         **every)  # fmt: skip
    call(f"AdaptiveMaxPool{d}D", lambda x, d=d: getattr(F, f"adaptive_max_pool{d}d")(x, 2), size,
         **every)  # fmt: skip
for d in (1, 2, 3):
    size, modes = (2, 2) + (5 - d,) * d, {"nearest": "Nearest", "nearest-exact": "NearestExact"}
    modes |= {1: {"linear": "Linear"}, 2: {"bilinear": "Bilinear", "bicubic": "Bicubic"},
              3: {"trilinear": "Trilinear"}}[d]  # fmt: skip
    for mode, part in modes.items():
        call(f"Upsample{part}{d}D", lambda x, m=mode: F.interpolate(x, scale_factor=2, mode=m),
             size, loses=range(1, d + 2))  # fmt: skip
    for part in ("Reflection", "Replication"):
        call(f"{part}Pad{d}D", lambda x, p=part, d=d: getattr(aten, f"{p.lower()}_pad{d}d")(
            x, [1] * 2 * d), size, loses=range(1, d + 2))  # fmt: skip
for mode in ("bilinear", "bicubic"):
    call(f"Upsample{mode.capitalize()}2DAa", lambda x, m=mode: F.interpolate(
        x, scale_factor=0.5, mode=m, antialias=True), (2, 2, 4, 4), loses=[1, 2, 3])  # fmt: skip
call("ReplicationPad1D", lambda x: aten.replication_pad1d(x, [1, -1]), (3, 4), label="[C, L]",
     loses="all")  # fmt: skip
call("ReplicationPad1D", lambda x: F.pad(x, (1, -1), mode="replicate"), (3, 4),
     label="[C, L] by F.pad", loses="all")  # fmt: skip
call("Col2Im", lambda x: F.fold(x, (3, 3), 2), (2, 4, 4), loses=[1, 2, 3])
call("Im2Col", lambda x: F.unfold(x, 2), (2, 2, 3, 3), loses=[1, 2])
call("ChannelShuffle", lambda x: F.channel_shuffle(x, 2), (2, 4, 2, 2), loses=[1, 2, 3])
call("PixelShuffle", lambda x: F.pixel_shuffle(x, 2), (2, 4, 2, 2), loses=[1, 2, 3])
call("PixelUnshuffle", lambda x: F.pixel_unshuffle(x, 2), (2, 1, 4, 4), loses=[1, 2, 3])
call("PixelUnshuffle", lambda x: F.pixel_unshuffle(x, 2), (2, 4, 4), label="unbatched",
     loses="all")  # fmt: skip
call("GridSampler2D", lambda x, g: F.grid_sample(x, g.tanh() * 0.9, align_corners=False),
     (2, 2, 3, 3), (2, 2, 2, 2), loses=[1, 2, 3])  # fmt: skip
call("GridSampler3D", lambda x, g: F.grid_sample(x, g.tanh() * 0.9, align_corners=False),
     (2, 1, 3, 3, 3), (2, 2, 2, 1, 3), loses=[1, 2, 3, 4])  # fmt: skip
call("AffineGridGenerator", lambda t: F.affine_grid(t, (3, 1, 2, 2), align_corners=False),
     (3, 2, 3), loses=[1, 2, 3])  # fmt: skip
for dims in ((-1,), (0, 1)):
    call("FftC2C", lambda x, d=dims: torch.fft.fftn(x, dim=d), (3, 2, 4), label=str(dims),
         complex=True)  # fmt: skip
    call("FftR2C", lambda x, d=dims: torch.fft.rfftn(x, dim=d), (3, 2, 4), label=str(dims))
    call("FftC2R", lambda x, d=dims: torch.fft.irfftn(x, dim=d), (3, 2, 4), label=str(dims),
         complex=True)  # fmt: skip

# Losses.
for reduction in ("none", "sum", "mean"):
    how = {"label": reduction}
    for node, function in {"MseLoss": F.mse_loss, "HuberLoss": F.huber_loss,
                           "SmoothL1Loss": F.smooth_l1_loss}.items():  # fmt: skip
        call(node, lambda x, y, f=function, r=reduction: f(x, y, reduction=r), (3, 4), (3, 4),
             **how, positive=True)  # fmt: skip
    call("SoftMarginLoss", lambda x, r=reduction: F.soft_margin_loss(
        x, torch.ones(3, 4).double(), reduction=r), **how)  # fmt: skip
    call("BinaryCrossEntropy", lambda x, y, r=reduction: F.binary_cross_entropy(x, y, reduction=r),
         (3, 4), (3, 4), **how, positive=True)  # fmt: skip
    call("BinaryCrossEntropyWithLogits", lambda x, y, r=reduction:
         F.binary_cross_entropy_with_logits(x, y, reduction=r), (3, 4), (3, 4), **how)  # fmt: skip
    call("NllLoss", lambda x, r=reduction: F.nll_loss(x, torch.tensor([1, 0, 3]), reduction=r),
         (3, 4), **how)  # fmt: skip
    call("NllLoss2D", lambda x, r=reduction: aten.nll_loss2d_forward(
        x, torch.tensor([[[1, 0]], [[3, 2]], [[0, 0]]]), None,
        {"none": 0, "mean": 1, "sum": 2}[r], -100)[0], (3, 4, 1, 2), **how)  # fmt: skip
    call("CtcLoss", lambda x, r=reduction: aten._ctc_loss(
        x.log_softmax(-1), torch.tensor([[1, 2], [2, 1], [1, 1]]), [4, 4, 4], [2, 2, 2])[0],
         (4, 3, 5), **how)  # fmt: skip
call("NllLoss", lambda x: F.nll_loss(x, torch.tensor(1)), (4,), label="one")

# What runs on other devices alone; on a CPU it is made of other functions.
NOT_HERE = set(
    words("""
    ConvolutionOverrideable CudnnBatchNorm CudnnConvolution FusedRmsNorm MkldnnAdaptiveAvgPool2D
    MkldnnConvolution ScaledDotProductCudnnAttention ScaledDotProductEfficientAttention
    ScaledDotProductFlashAttention ScaledDotProductFusedAttentionOverrideable
    """)
)
