"""gather_grads: r entries of each of L buffers, whatever their strides and dtypes."""

import pytest
import torch
from conftest import EPS32, assert_refused_or_nan, assert_within

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
def test_bad_input(backend, grads, indices, message):
    with pytest.raises((ValueError, IndexError, RuntimeError), match=message):
        ops.gather_grads(grads, indices, backend=backend.name)


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


def test_opcheck():
    if dropinf.backends()["cpu"] != "available":
        pytest.skip(dropinf.backends()["cpu"])
    grads, indices = buffers()
    grads[1] = None
    out = torch.zeros(sum(len(i) for i in indices))
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(
        torch.ops.dropinf.gather_grads.default, (grads, indices, [1.0] * len(grads), out)
    )
