"""gather_grads: r entries, or weighted sums, of each of L buffers, whatever strides and dtypes."""

import numpy as np
import pytest
import torch
from conftest import EPS32, assert_refused_or_nan, assert_within, numbers_of_threads

import dropinf
from dropinf import ops
from dropinf.ops import dispatch

OPS = ("gather_grads",)

SHAPES = [(7,), (3, 5), (4, 3, 2), (1,), (), (17, 31), (2, 3, 4, 5)]


def buffers(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    counts = [max(1, g.numel() // 2) for g in grads]
    indices = [
        torch.randperm(g.numel(), generator=generator)[:r].sort().values
        for g, r in zip(grads, counts, strict=True)
    ]
    return grads, indices


def exact(grads, indices):
    return torch.cat(
        [
            torch.zeros(len(i)).double() if g is None else g.double().flatten()[i]
            for g, i in zip(grads, indices, strict=True)
        ]
    )


def some_zeros(generator, *shape):
    weights = torch.randn(shape, generator=generator)
    return weights * torch.randint(4, shape, generator=generator).clamp(max=1)


def packed(weights, dtype=torch.float32):
    """As the op takes them; the rest of this file has them by layer."""
    return torch.cat([weight.flatten().to(dtype) for weight in weights])


def summed(dtype=torch.float32):
    """`buffers` with weighted sums of 0 to 7 coordinates in all layers but one."""
    grads, _ = buffers(dtype)
    generator = torch.Generator().manual_seed(1)
    shapes = [(5, s) for s in range(len(grads))]
    indices = [
        torch.randint(g.numel(), shape, generator=generator)
        for g, shape in zip(grads, shapes, strict=True)
    ]
    weights = [some_zeros(generator, *shape) for shape in shapes]
    indices[1], weights[1] = indices[1].flatten(), weights[1].flatten()
    return grads, indices, weights


def exact_sums(grads, indices, weights):
    """The definition in float64; with absolute values in place of all factors, the sums' sizes."""
    parts = []
    for g, i, weight in zip(grads, indices, weights, strict=True):
        picked = torch.zeros(i.shape).double() if g is None else g.double().flatten()[i]
        parts.append((picked * weight.double()).reshape(len(i), -1).sum(1))
    return torch.cat(parts)


def assert_sums(out, grads, indices, weights):
    """Within the bound of any float32 sum of s terms, each a rounded product."""
    sizes = exact_sums(
        [None if g is None else g.abs() for g in grads],
        indices,
        [weight.abs() for weight in weights],
    )
    terms = torch.cat([torch.full((len(i),), i[:1].numel()) for i in indices])
    assert_within(out, exact_sums(grads, indices, weights), (terms + 1) * EPS32 * sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gather_grads(backend, dtype):
    grads, indices = buffers(dtype)
    generator = torch.Generator().manual_seed(1)
    R = sum(len(i) for i in indices)
    weights = torch.randn(R, generator=generator)
    row = torch.full((R + 6,), torch.nan)
    out = ops.gather_grads(
        grads, indices, weights=weights, out=row[2 : 2 + R], backend=backend.name
    )
    assert torch.equal(out, exact(grads, indices).float() * weights)  # one rounding
    assert row[:2].isnan().all() and row[2 + R :].isnan().all()


def test_strides_none_and_mixed_dtypes(backend):
    grads, indices = buffers()
    grads[1] = grads[1].T.contiguous().T
    grads[2] = torch.randn(2, 4, 6).permute(1, 2, 0)[:, ::2]
    grads[3] = None
    grads[5] = torch.randn(31).bfloat16().expand(17, 31)
    grads[6] = grads[6].half().to(memory_format=torch.channels_last)
    indices[6] = indices[6].repeat_interleave(2)[::2]
    assert not indices[6].is_contiguous()
    out = torch.full((2 * sum(len(i) for i in indices),), torch.nan)[::2]
    ops.gather_grads(grads, indices, out=out, backend=backend.name)
    assert torch.equal(out.double(), exact(grads, indices))
    assert (out[len(indices[0]) :] == 0).any()


def test_many_layers_and_empty(backend):
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(64, 48, generator=generator) for _ in range(200)]
    indices = [torch.randint(64 * 48, (257,), generator=generator) for _ in range(200)]
    out = ops.gather_grads(grads, indices, backend=backend.name)
    assert torch.equal(out.double(), exact(grads, indices))
    none = torch.empty(0)  # without it there is no device but the CPU
    assert ops.gather_grads([], [], out=none, backend=backend.name).shape == (0,)
    nothing = torch.empty(0, dtype=torch.int64)
    assert ops.gather_grads([grads[0]], [nothing], backend=backend.name).shape == (0,)
    assert not ops.gather_grads([None], [indices[0]], backend=backend.name).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weighted_sums(backend, dtype):
    grads, indices, weights = summed(dtype)
    R = sum(map(len, indices))
    row = torch.full((2 * R + 6,), torch.nan)
    out = ops.gather_grads(
        grads,
        indices,
        weights=packed(weights),
        out=row[2 : 2 + 2 * R : 2],
        backend=backend.name,
    )
    assert_sums(out, grads, indices, weights)
    row[2 : 2 + 2 * R : 2] = torch.nan
    assert row.isnan().all()


def test_weighted_sums_of_any_layout(backend):
    grads, indices, weights = summed()
    grads[2] = torch.randn(2, 4, 6).permute(1, 2, 0)[:, ::2]
    grads[3] = None
    grads[5] = torch.randn(31).bfloat16().expand(17, 31)
    grads[6] = grads[6].half().to(memory_format=torch.channels_last)
    indices[5] = indices[5].T.contiguous().T
    gaps = packed(weights).repeat_interleave(2)[::2]
    assert not indices[5].is_contiguous() and not gaps.is_contiguous()
    out = ops.gather_grads(grads, indices, weights=gaps, backend=backend.name)
    assert_sums(out, grads, indices, weights)
    assert not out[[0, 1, 2, 3, 4, 15, 16, 17, 18, 19]].any()  # no coordinates, no gradient


def test_sums_in_order(backend):
    """The bits of a loop over j, which every backend has, for any number of threads."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2000), (700, 3), (0, 4), (4, 0), (1, 1), (2, 1500)]
    grads = [torch.randn(50, 41, generator=generator) for _ in shapes]
    grads[1] = grads[1].T
    indices = [torch.randint(2050, shape, generator=generator) for shape in shapes]
    # Powers of two, with which a sum and a product rounded as one are no other bits.
    weights = [torch.randint(-1, 2, shape, generator=generator) * 2.0 for shape in shapes]
    parts = []
    for g, i, weight in zip(grads, indices, weights, strict=True):
        sums = np.zeros(len(i), np.float32)
        terms = g.flatten()[i].numpy() * weight.numpy()
        for j in range(terms.shape[1]):
            sums += terms[:, j]
        parts.append(torch.from_numpy(sums))
    truth = torch.cat(parts)
    for _ in numbers_of_threads():
        out = ops.gather_grads(grads, indices, weights=packed(weights), backend=backend.name)
        assert torch.equal(out, truth)


def test_many_weighted_layers(backend):
    """More than one CUDA launch takes, sums and single ones by turns."""
    generator = torch.Generator().manual_seed(0)
    grads = list(torch.randn(1500, 7, generator=generator))
    indices = [
        torch.randint(7, (2, 3) if l % 3 else (2,), generator=generator) for l in range(1500)
    ]
    weights = [some_zeros(generator, *i.shape) for i in indices]
    grads[4] = None
    out = ops.gather_grads(grads, indices, weights=packed(weights), backend=backend.name)
    assert_sums(out, grads, indices, weights)


@pytest.mark.parametrize("strided", [False, True], ids=["", "strided"])
def test_zeros_leave_out(backend, strided):
    """Whatever is there; and without a gradient nothing is."""
    grad = torch.tensor([[1.0, torch.inf], [torch.nan, 4.0]])
    index = torch.tensor([[0, 1], [2, 3], [1, 2]])
    weights = torch.tensor([[1.0, 0.0], [0.0, -1.5], [0.0, -0.0]])
    if strided:
        grad = grad.T.contiguous().T
    out = ops.gather_grads(
        [grad, None], [index, index], weights=packed([weights] * 2), backend=backend.name
    )
    assert torch.equal(out, torch.tensor([1.0, -6.0, 0.0, 0.0, 0.0, 0.0]))


def test_sums_in_float64():
    grads, indices, weights = summed(torch.float64)
    truth = exact_sums(grads, indices, weights)
    for dtype in (torch.float32, torch.float64):
        out = ops.gather_grads(grads, indices, weights=packed(weights, dtype))
        assert out.dtype == torch.float64
        torch.testing.assert_close(out, truth, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "indices, weights, message",
    [
        (torch.zeros(2, 3), torch.ones(5), r"weights must be \(6,\), got \(5,\)"),
        (torch.zeros(2, 3), torch.ones(2, 3), r"weights must be \(6,\), got \(2, 3\)"),
        (torch.zeros(()), None, r"indices\[0\] must be \[r\] or \[r, s\], got \(\)"),
        (torch.zeros(2, 3, 1), None, r"indices\[0\] must be \[r\] or \[r, s\], got \(2, 3, 1\)"),
        (torch.zeros(2), torch.ones(2).half(), "weights must be torch.float32 on cpu"),
        (torch.zeros(2), torch.ones(2).double(), "weights must be torch.float32 on cpu"),
        (
            torch.zeros(2, 3),
            torch.ones(6, device="meta"),
            r"weights must be torch.float32 on cpu, got torch.float32 \(6,\) on meta",
        ),
        (
            torch.zeros(2, 3),
            torch.ones(6).requires_grad_(),
            "weights requires grad, and the op has no derivative",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("grad", [torch.zeros(3), None], ids=["", "None"])
def test_bad_weights(grad, indices, weights, message):
    with pytest.raises(ValueError, match=message):
        ops.gather_grads([grad], [indices.long()], weights=weights)


@pytest.mark.parametrize(
    "grads, indices, message",
    [
        ([torch.zeros(3)], [], "grads must be as long as indices, 0, got 1"),
        ([torch.zeros(3)], [torch.zeros(2).int()], r"indices\[0\] must be torch.int64"),
        ([torch.zeros(3)], [torch.zeros(2, 1, 1).long()], r"indices\[0\] must be \[r\]"),
        ([torch.zeros(3).long()], [torch.tensor([0])], r"grads\[0\] must be floating point"),
        ([torch.zeros(3, device="meta")], [torch.tensor([0])], r"grads\[0\] must be torch.float32"),
        ([None], [torch.tensor([0], device="meta").int()], r"indices\[0\] must be torch.int64"),
        (
            [torch.zeros(3)] * 2,
            [torch.tensor([0]), torch.tensor([0], device="meta")],
            r"indices\[1\] must be torch.int64 on cpu",
        ),
        ([torch.zeros(3).to_sparse()], [torch.tensor([0])], "sparse=False"),
    ],
    ids=str,
)
def test_bad_input(grads, indices, message):
    with pytest.raises(ValueError, match=message):
        ops.gather_grads(grads, indices)


@pytest.mark.parametrize("L", [63, 64, 65, 582, 583, 1500])
def test_many_layers(backend, L):
    """Around what the tables of CUDA launches hold, and more than one takes."""
    grads = list(torch.randn(L, 7, generator=torch.Generator().manual_seed(0)))
    indices = [torch.tensor([l % 7, 3]) for l in range(len(grads))]
    grads[5] = None
    out = ops.gather_grads(grads, indices, backend=backend.name)
    grads[5] = torch.zeros(7)
    assert torch.equal(out, torch.cat([g[i] for g, i in zip(grads, indices, strict=True)]))


@pytest.mark.parametrize("index", [3, -1, 2**40])
def test_index_out_of_range(backend, index):
    indices = [torch.tensor([0, 2]), torch.tensor([1, index, 2])]

    def run():
        return ops.gather_grads([torch.zeros(3)] * 2, indices, backend=backend.name)[None]

    assert_refused_or_nan(backend, run, 3, "out of bounds")


@pytest.mark.parametrize("index, strided", [(9, False), (-1, True), (2**40, False)])
def test_summed_index_out_of_range(backend, index, strided):
    grad = torch.zeros(3, 3)[:, ::2] if strided else torch.zeros(9)
    at = torch.zeros(4, 3).long()
    at[2, 1] = index

    def run():
        return ops.gather_grads([grad], [at], backend=backend.name)[None]

    assert_refused_or_nan(backend, run, 2, "out of bounds")


@pytest.mark.parametrize("index, strided", [(9, True), (-1, False)])
@pytest.mark.parametrize("shape", [(4,), (4, 3)], ids=str)
def test_index_of_what_is_left_out(backend, index, strided, shape):
    """It is to be in range too; a kernel that cannot raise an error does not look at it."""
    grad = torch.zeros(3, 3)[:, ::2] if strided else torch.zeros(9)
    at, weights = torch.zeros(shape).long(), torch.ones(shape)
    at.view(-1)[3], weights.view(-1)[3] = index, 0

    def run():
        return ops.gather_grads([grad], [at], weights=weights.flatten(), backend=backend.name)

    if backend.name in dispatch.GPU_BACKENDS:
        assert not run().any()
    else:
        with pytest.raises(IndexError, match="out of range"):
            run()


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
def test_opcheck(weighted):
    if dropinf.backends()["cpu"] != "available":
        pytest.skip(dropinf.backends()["cpu"])
    grads, indices, weights = summed() if weighted else (*buffers(), None)
    weights = packed(weights) if weighted else None
    grads[1] = None
    out = torch.zeros(sum(len(i) for i in indices))
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(torch.ops.dropinf.gather_grads.default, (grads, indices, weights, out))
