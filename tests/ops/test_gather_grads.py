"""gather_grads: r entries, or signed sums, of each of L buffers, whatever strides and dtypes."""

import numpy as np
import pytest
import torch
from conftest import EPS32, assert_refused_or_nan, assert_within, numbers_of_threads

import dropinf
from dropinf import ops

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


def exact(grads, indices, scales):
    return torch.cat(
        [
            torch.zeros(len(i)).double() if g is None else g.double().flatten()[i] * c
            for g, i, c in zip(grads, indices, scales, strict=True)
        ]
    )


def ones_and_zeros(generator, r, s):
    return (torch.randint(3, (r, s), generator=generator) - 1).to(torch.int8)


def signed(dtype=torch.float32):
    """`buffers` with signed sums of 0 to 7 coordinates in all layers but one."""
    grads, _ = buffers(dtype)
    generator = torch.Generator().manual_seed(1)
    shapes = [(5, s) for s in range(len(grads))]
    indices = [
        torch.randint(g.numel(), shape, generator=generator)
        for g, shape in zip(grads, shapes, strict=True)
    ]
    signs = [ones_and_zeros(generator, *shape) for shape in shapes]
    indices[1], signs[1] = indices[1].flatten(), None
    return grads, indices, signs


def exact_sums(grads, indices, signs, scales):
    """The definition in float64; with absolute values in place of all factors, the sums' sizes."""
    parts = []
    for g, i, sign, c in zip(grads, indices, signs, scales, strict=True):
        picked = torch.zeros(i.shape).double() if g is None else g.double().flatten()[i]
        parts.append(
            c * (picked if sign is None else torch.einsum("kj,kj->k", picked, sign.double()))
        )
    return torch.cat(parts)


def assert_sums(out, grads, indices, signs, scales):
    """Within the bound of any float32 sum of s terms; the scale and the product are rounded."""
    sizes = exact_sums(
        [None if g is None else g.abs() for g in grads],
        indices,
        [None if sign is None else sign.abs() for sign in signs],
        map(abs, scales),
    )
    terms = torch.cat([torch.full((len(i),), i[:1].numel()) for i in indices])
    assert_within(out, exact_sums(grads, indices, signs, scales), (terms + 2) * EPS32 * sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gather_grads(backend, dtype):
    grads, indices = buffers(dtype)
    scales = [0.3 + l for l in range(len(grads))]
    R = sum(len(i) for i in indices)
    row = torch.full((R + 6,), torch.nan)
    out = ops.gather_grads(grads, indices, scales=scales, out=row[2 : 2 + R], backend=backend.name)
    truth = exact(grads, indices, scales)
    assert_within(out, truth, 2 * EPS32 * truth.abs())  # the scale and the product are rounded
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
    assert torch.equal(out.double(), exact(grads, indices, [1.0] * len(grads)))
    assert (out[len(indices[0]) :] == 0).any()


def test_many_layers_and_empty(backend):
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(64, 48, generator=generator) for _ in range(200)]
    indices = [torch.randint(64 * 48, (257,), generator=generator) for _ in range(200)]
    out = ops.gather_grads(grads, indices, backend=backend.name)
    assert torch.equal(out.double(), exact(grads, indices, [1.0] * 200))
    assert ops.gather_grads([], [], backend=backend.name).shape == (0,)
    nothing = torch.empty(0, dtype=torch.int64)
    assert ops.gather_grads([grads[0]], [nothing], backend=backend.name).shape == (0,)
    assert not ops.gather_grads([None], [indices[0]], backend=backend.name).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_signed_sums(backend, dtype):
    grads, indices, signs = signed(dtype)
    scales = [0.3 - l for l in range(len(grads))]
    R = sum(map(len, indices))
    row = torch.full((2 * R + 6,), torch.nan)
    out = ops.gather_grads(
        grads,
        indices,
        signs=signs,
        scales=scales,
        out=row[2 : 2 + 2 * R : 2],
        backend=backend.name,
    )
    assert_sums(out, grads, indices, signs, scales)
    row[2 : 2 + 2 * R : 2] = torch.nan
    assert row.isnan().all()


def test_signed_sums_of_any_layout(backend):
    grads, indices, signs = signed()
    grads[2] = torch.randn(2, 4, 6).permute(1, 2, 0)[:, ::2]
    grads[3] = None
    grads[5] = torch.randn(31).bfloat16().expand(17, 31)
    grads[6] = grads[6].half().to(memory_format=torch.channels_last)
    indices[5] = indices[5].T.contiguous().T
    signs[6] = signs[6].repeat_interleave(2, 1)[:, ::2]
    assert not indices[5].is_contiguous() and not signs[6].is_contiguous()
    ones = [1.0] * len(grads)
    out = ops.gather_grads(grads, indices, signs=signs, backend=backend.name)
    assert_sums(out, grads, indices, signs, ones)
    assert not out[[0, 1, 2, 3, 4, 15, 16, 17, 18, 19]].any()  # no coordinates, no gradient


def test_signed_sums_in_order(backend):
    """The bits of a loop over j, which every backend has, for any number of threads."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2000), (700, 3), (0, 4), (4, 0), (1, 1), (2, 1500)]
    grads = [torch.randn(50, 41, generator=generator) for _ in shapes]
    grads[1] = grads[1].T
    indices = [torch.randint(2050, shape, generator=generator) for shape in shapes]
    signs = [ones_and_zeros(generator, *shape) for shape in shapes]
    parts = []
    for g, i, sign in zip(grads, indices, signs, strict=True):
        sums = np.zeros(len(i), np.float32)
        terms = g.flatten()[i].numpy() * sign.numpy()
        for j in range(terms.shape[1]):
            sums += terms[:, j]
        parts.append(torch.from_numpy(np.float32(0.3) * sums))
    truth = torch.cat(parts)
    for _ in numbers_of_threads():
        out = ops.gather_grads(
            grads, indices, signs=signs, scales=[0.3] * len(grads), backend=backend.name
        )
        assert torch.equal(out, truth)


def test_many_signed_layers(backend):
    """More than one CUDA launch takes, with and without signs by turns."""
    generator = torch.Generator().manual_seed(0)
    grads = list(torch.randn(1500, 7, generator=generator))
    indices = [
        torch.randint(7, (2, 3) if l % 3 else (2,), generator=generator) for l in range(1500)
    ]
    signs = [ones_and_zeros(generator, 2, 3) if l % 3 else None for l in range(1500)]
    grads[4] = None
    out = ops.gather_grads(grads, indices, signs=signs, backend=backend.name)
    assert_sums(out, grads, indices, signs, [1.0] * 1500)


@pytest.mark.parametrize("strided", [False, True], ids=["", "strided"])
def test_zeros_leave_out(backend, strided):
    """Whatever is there; and without a gradient nothing is."""
    grad = torch.tensor([[1.0, torch.inf], [torch.nan, 4.0]])
    index, sign = torch.tensor([[0, 1], [2, 3], [1, 2]]), torch.tensor([[1, 0], [0, -1], [0, 0]])
    if strided:
        grad = grad.T.contiguous().T
    out = ops.gather_grads(
        [grad, None], [index, index], signs=[sign.to(torch.int8)] * 2, backend=backend.name
    )
    assert torch.equal(out, torch.tensor([1.0, -4.0, 0.0, 0.0, 0.0, 0.0]))


def test_signs_in_float64():
    grads, indices, signs = signed(torch.float64)
    scales = [0.3 - l for l in range(len(grads))]
    out = ops.gather_grads(grads, indices, signs=signs, scales=scales)
    assert out.dtype == torch.float64
    torch.testing.assert_close(
        out, exact_sums(grads, indices, signs, scales), rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize(
    "indices, signs, message",
    [
        (torch.zeros(2, 3), [], "signs must be as long as indices, 1, got 0; None stands"),
        (torch.zeros(2, 3), [None], r"indices\[0\] must be \[r\] without signs, got \(2, 3\)"),
        (torch.zeros(2, 3), None, r"indices\[0\] must be \[r\] without signs, got \(2, 3\)"),
        (torch.zeros(2), [torch.ones(2)], r"indices\[0\] must be \[r, s\] with signs, got \(2,\)"),
        (
            torch.zeros(2, 3),
            [torch.ones(1, 3)],
            r"signs\[0\] must have the shape \(2, 3\) of its indices, got \(1, 3\)",
        ),
        (torch.zeros(2, 3), [torch.ones(2, 3).int()], r"signs\[0\] must be torch.int8 on cpu"),
        (
            torch.zeros(2, 3),
            [torch.ones(2, 3, device="meta")],
            r"signs\[0\] must be torch.int8 on cpu, got torch.int8 \(2, 3\) on meta",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("grad", [torch.zeros(3), None], ids=["", "None"])
def test_bad_signs(grad, indices, signs, message):
    if signs is not None:
        signs = [s.to(torch.int8) if s is not None and s.is_floating_point() else s for s in signs]
    with pytest.raises(ValueError, match=message):
        ops.gather_grads([grad], [indices.long()], signs=signs)


@pytest.mark.parametrize(
    "grads, indices, message",
    [
        ([torch.zeros(3)], [], "equally long, got 1, 0 and 0"),
        ([torch.zeros(3)], [torch.zeros(2).int()], r"indices\[0\] must be torch.int64"),
        ([torch.zeros(3)], [torch.zeros(2, 1).long()], r"indices\[0\] must be \[r\]"),
        ([torch.zeros(3).long()], [torch.tensor([0])], r"grads\[0\] must be floating point"),
        ([torch.zeros(3, device="meta")], [torch.tensor([0])], r"grads\[0\] must be torch.float32"),
        ([torch.zeros(3).to_sparse()], [torch.tensor([0])], "sparse=False"),
    ],
    ids=str,
)
def test_bad_input(grads, indices, message):
    with pytest.raises(ValueError, match=message):
        ops.gather_grads(grads, indices)


def test_many_layers(backend):
    """More than one CUDA launch takes."""
    grads = list(torch.randn(1500, 7, generator=torch.Generator().manual_seed(0)))
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


@pytest.mark.parametrize(
    "index, sign, strided",
    [(9, 1, False), (-1, 1, True), (2**40, 1, False), (9, 0, True), (-1, 0, False)],
)
def test_signed_index_out_of_range(backend, index, sign, strided):
    grad = torch.zeros(3, 3)[:, ::2] if strided else torch.zeros(9)
    at = torch.zeros(4, 3).long()
    at[2, 1] = index
    signs = torch.ones(4, 3, dtype=torch.int8)
    signs[2, 1] = sign

    def run():
        return ops.gather_grads([grad], [at], signs=[signs], backend=backend.name)[None]

    assert_refused_or_nan(backend, run, 2, "out of bounds")


@pytest.mark.parametrize("sign", [2, -128])
@pytest.mark.parametrize("strided", [False, True], ids=["", "strided"])
def test_sign_out_of_range(backend, sign, strided):
    grad = torch.zeros(3, 3)[:, ::2] if strided else torch.zeros(9)
    signs = torch.ones(4, 3, dtype=torch.int8)
    signs[2, 1] = sign

    def run():
        at = torch.zeros(4, 3).long()
        return ops.gather_grads([grad], [at], signs=[signs], backend=backend.name)[None]

    assert_refused_or_nan(backend, run, 2, "must be of -1, 0 and 1")


@pytest.mark.parametrize("with_signs", [False, True], ids=["", "signs"])
def test_opcheck(with_signs):
    if dropinf.backends()["cpu"] != "available":
        pytest.skip(dropinf.backends()["cpu"])
    grads, indices, signs = signed() if with_signs else (*buffers(), ())
    grads[1] = None
    out = torch.zeros(sum(len(i) for i in indices))
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(
        torch.ops.dropinf.gather_grads.default, (grads, indices, signs, [1.0] * len(grads), out)
    )
