"""What only a GPU shows: streams, graphs, synchronisation, memory; and that bits do not move.

Without a GPU a rehearsal: what needs no CUDA runs on the CPU, so that these tests are tested too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from conftest import EPS32, assert_within, on_the_host
from torch import Tensor, nn

import dropinf
from dropinf import ops
from dropinf.compression.parts import draw
from dropinf.ops import dispatch
from dropinf.ops.bank_schedule import staged_order
from dropinf.ops.column_schedule import column_order

GPU = torch.cuda.is_available()
DEVICE = "cuda:0" if GPU else "cpu"
BACKENDS = ["cuda", "triton"] if GPU else ["cpu", "cuda-host", "reference"]
REPEATS = 20 if GPU else 2
POSITIONS = 300 if GPU else 90  # threads of a block on the CPU are slow

needs_cuda = pytest.mark.skipif(not GPU, reason="needs CUDA's streams, graphs or allocator")


class Call(NamedTuple):
    """One op on inputs that stay in place."""

    inputs: list[Tensor]  # floating point, to be changed between replays
    run: Callable[..., tuple[Tensor, ...]]  # (backend, examples=slice)
    num_examples: int = 0  # 0: the op has none


def coordinates(O, I, r):
    at = torch.from_numpy(draw(O * I, r, 1, 0))
    return (at // I).int().to(DEVICE), (at % I).int().to(DEVICE)


def random(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def sampled_outer():
    x, dy = random(5, POSITIONS, 96), random(5, POSITIONS, 80)
    at = coordinates(80, 96, 1500)

    def run(backend, examples=slice(None)):
        return (ops.sampled_outer(x[examples], dy[examples], *at, backend=backend),)

    return Call([x, dy], run, 5)


def staged(max_slots):
    """bfloat16 in several chunks of positions, each of several buffers."""
    B, T, I, O, r = 5, POSITIONS, 96, 80, 200
    x, dy = random(B, T, I, dtype=torch.bfloat16), random(B, T, O, dtype=torch.bfloat16)
    at = coordinates(O, I, r)
    order = staged_order(*at, I, O, x.element_size(), max_slots=max_slots)

    def run(backend, examples=slice(None)):
        given = {"order": order, "backend": backend}
        return (ops.sampled_outer(x[examples], dy[examples], *at, **given),)

    return Call([x, dy], run, B), len(order.passes)


def sampled_outer_staged():
    call, passes = staged(9600)
    assert passes == 1
    return call


def sampled_outer_staged_two_passes():
    call, passes = staged(160)
    assert passes == 2
    return call


def sampled_outer_staged_columns():
    """The columns kernel, where it has room; by rows that it reads four elements of at once."""
    B, T, I, O, r = 5, POSITIONS, 96, 80, 2000
    x, dy = random(B, T, I, dtype=torch.bfloat16), random(B, T, O, dtype=torch.bfloat16)
    at = coordinates(O, I, r)
    order = column_order(*at, I, O)

    def run(backend, examples=slice(None)):
        given = {"order": order, "backend": backend}
        return (ops.sampled_outer(x[examples], dy[examples], *at, **given),)

    return Call([x, dy], run, B)


def sampled_outer_columns_of_sums():
    """The columns kernel again, whose coordinates torch then adds."""
    B, T, I, O, r, s = 5, POSITIONS, 96, 80, 500, 4
    x, dy = random(B, T, I, dtype=torch.bfloat16), random(B, T, O, dtype=torch.bfloat16)
    at = [index.reshape(r, s) for index in coordinates(O, I, r * s)]
    order, weights = column_order(*at, I, O), random(r, s)

    def run(backend, examples=slice(None)):
        given = {"weights": weights, "order": order, "backend": backend}
        return (ops.sampled_outer(x[examples], dy[examples], *at, **given),)

    return Call([x, dy], run, B)


def sampled_embedding():
    ids = torch.arange(5 * POSITIONS).reshape(5, POSITIONS).to(DEVICE) % 37
    dy = random(5, POSITIONS, 24)
    i_idx, o_idx = coordinates(37, 24, 500)

    def run(backend, examples=slice(None)):
        return (ops.sampled_embedding(ids[examples], dy[examples], o_idx, i_idx, backend=backend),)

    return Call([dy], run, 5)


def sampled_norm(I=72):
    """Rows of vectors; and of numbers one by one."""
    x, dy = (random(5, POSITIONS, n, dtype=torch.bfloat16)[..., :I] for n in (I, I + 8))
    index = (torch.arange(3 * I, device=DEVICE) % (2 * I)).int()

    def run(backend, examples=slice(None)):
        return (ops.sampled_norm(x[examples], dy[examples], index, eps=1e-5, backend=backend),)

    return Call([x, dy], run, 5)


def sampled_norm_one_by_one():
    return sampled_norm(67)


def sampled_conv():
    C, O, H, W, r = (8, 12, 19, 17, 400) if GPU else (3, 4, 9, 7, 70)
    x, dy = random(5, C, H, W), random(5, O, H, W)
    at = coordinates(O, C * 9, r)
    layer = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}

    def run(backend, examples=slice(None)):
        return (ops.sampled_conv(x[examples], dy[examples], *at, **layer, backend=backend),)

    return Call([x, dy], run, 5)


def gather_grads():
    grads = [random(40, 30 + l) for l in range(50)]
    indices = [torch.arange(l, 1200, 3, device=DEVICE) for l in range(50)]
    return Call(grads, lambda backend: (ops.gather_grads(grads, indices, backend=backend),))


OFFSETS = (0, 1, 9, 73, 103, 363)


WIDE = (0, 40, 370, 700)  # two layers of 330, wider than the shared memory of sm_90 holds


def gram(n=129):
    rows = random(n, OFFSETS[-1])
    return Call([rows], lambda backend: (ops.gram(rows, OFFSETS, backend=backend),))


def gram_long():
    return gram(1100)  # in three chunks


def damped_cholesky(offsets=OFFSETS):
    rows, matrices = random(7, offsets[-1]), ops.gram(random(500, offsets[-1]), offsets)
    shift = torch.full((len(offsets) - 1,), 10.0, device=DEVICE)

    def run(backend):
        made = ops.damped_cholesky(matrices, offsets, shift, rows=rows, backend=backend)
        return made.factors, made.info, made.solved

    return Call([rows], run)


def damped_cholesky_wide():
    return damped_cholesky(WIDE)


def cholesky_solve(offsets=OFFSETS):
    matrices = ops.gram(random(500, offsets[-1]), offsets)
    factors, rows = ops.damped_cholesky(matrices, offsets, 10.0).factors, random(5, offsets[-1])

    def run(backend, examples=slice(None)):
        return (ops.cholesky_solve(factors, offsets, rows[examples], backend=backend),)

    return Call([rows], run, 5)


def cholesky_solve_wide():
    return cholesky_solve(WIDE)


def score_topk():
    queries, rows = random(5, 64), random(700, 64)

    def run(backend, examples=slice(None)):
        asked = queries[examples]
        values = torch.full((len(asked), 9), -torch.inf, device=DEVICE)
        indices = torch.full((len(asked), 9), -1, device=DEVICE)
        return tuple(ops.score_topk(asked, rows, values, indices, backend=backend))

    return Call([queries, rows], run)


def score_topk_parts():
    """So few queries share several blocks; their products are exact."""
    queries, rows = random(1, 8).round(), random(20_000, 8).round()

    def run(backend, examples=slice(None)):
        values, indices = torch.full((1, 9), -torch.inf), torch.full((1, 9), -1)
        kept = values.to(DEVICE), indices.to(DEVICE)
        return tuple(ops.score_topk(queries, rows, *kept, backend=backend))

    return Call([queries, rows], run)


# An op, and behind a dash what of it this call reaches.
CALLS = {
    "sampled_outer": sampled_outer,
    "sampled_outer-staged": sampled_outer_staged,
    "sampled_outer-staged, two passes": sampled_outer_staged_two_passes,
    "sampled_outer-staged columns": sampled_outer_staged_columns,
    "sampled_outer-columns of sums": sampled_outer_columns_of_sums,
    "sampled_embedding": sampled_embedding,
    "sampled_conv": sampled_conv,
    "sampled_norm": sampled_norm,
    "sampled_norm-one by one": sampled_norm_one_by_one,
    "gather_grads": gather_grads,
    "gram": gram,
    "gram-long": gram_long,
    "damped_cholesky": damped_cholesky,
    "damped_cholesky-wide": damped_cholesky_wide,
    "cholesky_solve": cholesky_solve,
    "cholesky_solve-wide": cholesky_solve_wide,
    "score_topk": score_topk,
    "score_topk-parts": score_topk_parts,
}


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    name = request.param.removesuffix("-host")
    if name != request.param:
        on_the_host(request, monkeypatch)
    if dropinf.backends()[name] != "available":
        pytest.skip(f"backend {name!r} is {dropinf.backends()[name]}")
    return name


@pytest.fixture
def call(op):
    return CALLS[op]()


PAIRS = [
    (backend, op)
    for op in CALLS
    for backend in BACKENDS
    if backend.removesuffix("-host") in dispatch.KERNELS[op.partition("-")[0]]
]
every_op = pytest.mark.parametrize("backend, op", PAIRS, indirect=["backend"])
every_op_on_a_gpu = pytest.mark.parametrize(
    "backend, op", PAIRS if GPU else PAIRS[:1], indirect=["backend"]
)


def test_every_op_with_a_kernel_for_gpus_is_called_here():
    kernels = dispatch.KERNELS.items()
    ours = {op for op, backends in kernels if set(backends) & set(dispatch.GPU_BACKENDS)}
    assert ours == {name.partition("-")[0] for name in CALLS}


def assert_same(results, others):
    for a, b in zip(results, others, strict=True):
        assert torch.equal(a, b)


@every_op
def test_same_bits_from_run_to_run(backend, op, call):
    first = call.run(backend)
    for _ in range(REPEATS):
        assert_same(first, call.run(backend))


@every_op
def test_examples_do_not_see_each_other(backend, op, call):
    if not call.num_examples:
        pytest.skip(f"{op} has no examples that stand alone")
    if op.startswith("cholesky_solve") and backend == "reference":
        pytest.skip("bits of torch's solve depend on the number of right-hand sides")
    whole = call.run(backend)
    for part in (slice(2, 3), slice(1, 5), slice(0, 2)):
        assert_same([t[part] for t in whole], call.run(backend, part))


@every_op
def test_agrees_with_reference(backend, op, call):
    for ours, theirs in zip(call.run(backend), call.run("reference"), strict=True):
        size = theirs.double().norm().item()
        assert (ours.double() - theirs.double()).norm().item() <= 1e-5 * size


@every_op_on_a_gpu
@needs_cuda
def test_current_stream(backend, op, call):
    """It waits for what came before on its stream, and for nothing on another."""
    wanted = [t.clone() for t in call.run(backend)]
    values = [t.clone() for t in call.inputs]
    for t in call.inputs:
        t.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 30 ms, in which the inputs are still zeros
        for t, value in zip(call.inputs, values, strict=True):
            t.copy_(value)
        got = call.run(backend)
    stream.synchronize()
    assert_same(wanted, got)


@every_op_on_a_gpu
@needs_cuda
def test_cuda_graph(backend, op, call):
    call.run(backend)  # the self-test cannot run while a graph is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.run(backend)
    for _ in range(3):
        for t in call.inputs:
            t.mul_(-0.5)
        graph.replay()
        replayed = [t.clone() for t in captured]
        assert_same(replayed, call.run(backend))


@every_op_on_a_gpu
@needs_cuda
def test_no_synchronisation(backend, op, call):
    call.run(backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.run(backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("B, T, r", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
@pytest.mark.parametrize("op", ["sampled_outer", "sampled_embedding"])
def test_empty(backend, op, B, T, r):
    dy, index = torch.ones(B, T, 3, device=DEVICE), torch.zeros(r, device=DEVICE).int()
    x = dy if op == "sampled_outer" else torch.zeros(B, T, device=DEVICE).long()
    out = getattr(ops, op)(x, dy, index, index, backend=backend)
    assert torch.equal(out, torch.zeros(B, r, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("r", [70, 4000])
def test_unaligned_views(backend, dtype, r):
    """Rows that start between the addresses that vector loads need, and end there."""
    B, T, I, O = 3, 67, 129, 91
    x = random(B, T, I + 6, dtype=dtype)[..., 1 : I + 1]
    dy = random(B, T, O + 8, dtype=dtype)[..., 3 : O + 3]
    o_idx, i_idx = coordinates(O, I, r)
    out = ops.sampled_outer(x, dy, o_idx, i_idx, backend=backend)
    truth, sizes = exact(x, dy, o_idx, i_idx), exact(x.abs(), dy.abs(), o_idx, i_idx)
    assert_within(out, truth, (T + 1) * EPS32 * sizes)


def exact(x, dy, o_idx, i_idx):
    full = torch.einsum("bto,bti->boi", dy.double(), x.double())
    return full[:, o_idx.long(), i_idx.long()]


@needs_cuda
@pytest.mark.parametrize("wide", ["x", "dy"])
def test_offsets_beyond_31_bits(backend, wide):
    """2.2 billion elements in one operand: 4.5 GB in bfloat16."""
    B, T, width, narrow = 2, 270_000, 4096, 4
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of free memory")
    large = torch.randn(B, T, width, device=DEVICE, dtype=torch.bfloat16)
    small = random(B, T, narrow, dtype=torch.bfloat16)
    x, dy = (large, small) if wide == "x" else (small, large)
    o_idx, i_idx = coordinates(dy.shape[2], x.shape[2], 60)
    out = ops.sampled_outer(x, dy, o_idx, i_idx, backend=backend)
    terms = x[:, :, i_idx.long()].double() * dy[:, :, o_idx.long()].double()
    assert_within(out, terms.sum(1), (T + 1) * EPS32 * terms.abs().sum(1))


@needs_cuda
@pytest.mark.parametrize("backend, op", [("cuda", "gather_grads")])
def test_positions_beyond_31_bits(backend, op):
    if torch.cuda.mem_get_info()[0] < 6e9:
        pytest.skip("needs 6 GB of free memory")
    grad = torch.randn(2**31 + 1000, device=DEVICE, dtype=torch.bfloat16)
    at = torch.tensor([5, 2**31 - 1, 2**31, 2**31 + 999], device=DEVICE)
    assert torch.equal(ops.gather_grads([grad], [at], backend=backend), grad[at].float())


@needs_cuda
@pytest.mark.parametrize("r", [64, 8192])
def test_scratch(backend, r):
    """No [B, O, I], no [B, T, r], no copy of x: less than half of x beyond the result."""
    B, T, I, O = 8, 2048, 4096, 4096
    x, dy = (torch.randn(B, T, n, device=DEVICE, dtype=torch.bfloat16) for n in (I, O))
    at, out = coordinates(O, I, r), torch.empty(B, r, device=DEVICE)
    ops.sampled_outer(x, dy, *at, out=out, backend=backend)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.sampled_outer(x, dy, *at, out=out, backend=backend)
    assert torch.cuda.max_memory_allocated() - before < x.nbytes / 2


class Small(nn.Module):
    """An embedding, norms, and linear layers with and without a bias."""

    def __init__(self):
        super().__init__()
        self.tokens, self.norm = nn.Embedding(31, 24), nn.LayerNorm(24)
        self.up, self.down = nn.Linear(24, 70), nn.Linear(70, 24, bias=False)
        self.head = nn.Linear(24, 31)

    def forward(self, ids):
        x = self.tokens(ids)
        return self.head(x + self.down(torch.tanh(self.up(self.norm(x)))))


def loss_fn(model, ids):
    losses = nn.functional.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:], reduction="none")
    return losses.sum(1)


def test_model(monkeypatch):
    """The rows of a model there are those on the CPU, with every kernel there is for them."""
    torch.manual_seed(0)
    model, ids = Small(), torch.randint(31, (6, 40))
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=300))
    with dropinf.capture(model, plan, backend="reference") as tap:
        truth = tap.rows(loss_fn(model, ids))
    for op, kernels in dispatch.KERNELS.items():
        for name in kernels:
            monkeypatch.setitem(dispatch.VERIFIED, (name, op), "taken by default, in this test")
    dispatch.kernel.cache_clear()
    model.to(DEVICE)
    with dropinf.capture(model, plan) as tap:
        rows = tap.rows(loss_fn(model, ids.to(DEVICE)))
    dispatch.kernel.cache_clear()
    assert rows.device == torch.device(DEVICE)
    assert (rows.cpu() - truth).norm() <= 1e-5 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("proj_type", ["dropout", "sketch"])
def test_projector(proj_type, dtype):
    """Projections there are those on the CPU, to the bit."""
    grads = {"weight": random(33, 9, 64).permute(1, 2, 0), "bias": random(9, 64)}
    joined = torch.cat([g.flatten(1) for g in grads.values()], 1)
    results = []
    for device in ("cpu", DEVICE):
        projector = dropinf.DropoutProjector(64 * 34, 500, 7, proj_type, device, dtype)
        here = [{name: g.to(device) for name, g in grads.items()}, joined.to(device)]
        results.append([projector.project(form, model_id=3).cpu() for form in here])
        assert projector.project(joined.to(device)).device == torch.device(device)
    assert_same(*results)
    assert_same(results[0][:1], results[0][1:])
