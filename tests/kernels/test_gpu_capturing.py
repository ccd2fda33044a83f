"""Captures on a GPU: rows of every kind of layer are those of autograd on the CPU, by its paths."""

import copy
import os
import subprocess
import sys
from contextlib import nullcontext

import on_gpu
import pytest
import torch
from cases import CASES, Transformer, build, padded_ids, squares, tokens_cross_entropy, true_rows
from layer_cases import LAYERS, statistics
from on_gpu import DEVICE, GPU, assert_near, needs_cuda, there
from torch import nn
from torch._inductor.compile_fx import compile_fx
from torch.utils.checkpoint import checkpoint

import dropinf
from dropinf import Dropout, Plan, capture
from dropinf.ops import dispatch

backend = on_gpu.backend  # the fixture

pytestmark = pytest.mark.filterwarnings("ignore:rows. a backward pass for each:UserWarning")

ALL = [(case, {"closed form"}) for case in CASES] + [(l.case, l.paths) for l in LAYERS]


def short(path):
    return "passes" if path.startswith("a pass for each loss") else path


@pytest.mark.parametrize("case, paths", ALL, ids=[case.name for case, _ in ALL])
def test_every_layer(case, paths, backend):
    """Thrice in a row: calls that are new, known, and what then writes by itself in C++."""
    model, batch = build(case, torch.float64)
    plan = Plan.make(model, Dropout(r=50))
    truth = true_rows(case, model, batch, plan)
    narrow = tuple(t.float() if t.is_floating_point() else t for t in batch)
    model.float()
    plain = true_rows(case, model, narrow, plan).double() - truth
    limit = max(1e-5, 2 * plain.norm().item() / truth.norm().item())  # torch's own error
    model.to(DEVICE)
    batch = there(narrow)
    with capture(model, plan) as tap:
        for _ in range(3):
            rows = tap.rows(case.loss_fn(model, batch))
            assert rows.device == DEVICE
            assert_near(rows, truth, limit)
    assert set(map(short, plan.paths.values())) == paths
    with capture(model, plan, "grads") as tap:
        rows = tap.rows(case.loss_fn(model, batch))
        assert rows.device == DEVICE
        assert_near(rows, truth, limit)
    assert all(p.grad is None and p.device == DEVICE for p in model.parameters())


# A transformer and images, each on the CPU and there.


class Images(nn.Sequential):
    def __init__(self):
        layers = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        super().__init__(*layers, nn.Conv2d(6, 4, 3, groups=2), nn.Flatten(), nn.Linear(60, 5))


def models():
    """(model, batch, loss_fn) of each."""
    torch.manual_seed(0)
    yield Transformer().eval(), padded_ids(), tokens_cross_entropy
    yield statistics(Images()), (torch.randn(5, 3, 7, 5),), squares


def rows_of(model, batch, loss_fn, plan, **options):
    with capture(model, plan, **options) as tap:
        for _ in range(2):
            rows = tap.rows(loss_fn(model, batch))
    return rows


COMPRESSIONS = [
    *(dropinf.Sketch(r=40, s=3), dropinf.FactoredDropout(r=40), dropinf.LoGra(r=40)),
    *(dropinf.Gaussian(r=30), dropinf.Rademacher(r=30), dropinf.SJLT(r=30), dropinf.FJLT(r=30)),
    *(dropinf.Full(), "energies"),
]


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda c: str(c).partition("(")[0])
def test_every_compression(compression, backend):
    """Rows of either mode are those of the same plan on the CPU; energies are measured there."""
    for model, batch, loss_fn in models():
        here, batch_here = copy.deepcopy(model).to(DEVICE), there(batch)
        if compression == "energies":
            e = dropinf.energies(here, [batch_here], loss_fn)
            given = dropinf.Dropout(r=40, energies=e)
        else:
            given = compression
        plan = Plan.make(model, given)
        for mode in ("activations", "grads"):
            truth = rows_of(model, batch, loss_fn, plan, mode=mode, backend="reference")
            found = rows_of(here, batch_here, loss_fn, plan, mode=mode)
            assert found.device == DEVICE
            assert_near(found, truth)


@pytest.mark.parametrize("per", ["token", "segment"])
def test_parts_of_examples(per, backend):
    model, batch, loss_fn = next(models())
    plan = Plan.make(model, Dropout(r=40))
    segments = torch.arange(8).expand(5, 8) // 3
    given = {} if per == "token" else {"segment_ids": segments}
    with capture(model, plan, per=per, backend="reference") as tap:
        truth, origin = tap.rows(loss_fn(model, batch), **given), tap.origin
    model.to(DEVICE)
    with capture(model, plan, per=per) as tap:
        rows = tap.rows(loss_fn(model, there(batch)), **there(given))
    assert rows.device == DEVICE and torch.equal(tap.origin, origin)
    assert_near(rows, truth)


def verified(model, batch, loss_fn, **options):
    """Rows beside plain autograd of the same pass, on the same device."""
    plan = Plan.make(model, Dropout(r=60))
    for _ in range(2):
        proof = dropinf.verify(model, batch, loss_fn, plan, **options)
    assert proof.examples == 1 and len(proof.layers) == len(plan.blocks)
    assert set(plan.paths.values()) <= {"closed form", ".grad"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, backend):
    for model, batch, loss_fn in models():

        def losses(model, batch, loss_fn=loss_fn):
            with torch.autocast(DEVICE.type, dtype):
                return loss_fn(model, batch).float()

        verified(model.to(DEVICE), there(batch), losses)


def test_bfloat16(backend):
    model, batch, loss_fn = next(models())
    model = model.to(DEVICE, torch.bfloat16)
    verified(model, there(batch), lambda *given: loss_fn(*given).float())
    with capture(model, Plan.make(model, Dropout(r=60))) as tap:
        assert tap.rows(loss_fn(model, there(batch))).dtype == torch.float32


def test_scaled_losses(backend):
    """As of a GradScaler."""
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=256.0)
    for model, batch, loss_fn in models():
        model, batch = model.to(DEVICE), there(batch)
        plan = Plan.make(model, Dropout(r=40))
        for mode in ("activations", "grads"):
            with capture(model, plan, mode) as tap:
                truth = tap.rows(loss_fn(model, batch))
                scaled = scaler.scale(loss_fn(model, batch))
                assert_near(tap.rows(scaled, loss_scale=scaler.get_scale()), truth)


def test_own_loop(backend):
    """tap.row() after the user's backward, step after step."""
    model, batch, loss_fn = next(models())
    plan = Plan.make(model, Dropout(r=40))
    truth = rows_of(model, batch, loss_fn, plan, mode="grads", backend="reference").sum(0)
    model.to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with capture(model, plan, "grads") as tap:
        for _ in range(2):
            optimizer.zero_grad()
            loss_fn(model, there(batch)).sum().backward()
            row = tap.row()
            assert row.device == DEVICE
            assert_near(row, truth)
            optimizer.step()


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.reentrant = nn.Linear(5, 5), reentrant
        self.bodies = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.LayerNorm(7), nn.Linear(7, 5))
            for _ in range(2)
        )

    def forward(self, x):
        x = self.first(x)
        for body in self.bodies:
            x = (
                body(x)
                if self.reentrant is None
                else checkpoint(body, x, use_reentrant=self.reentrant)
            )
        return x


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_checkpointing(reentrant, backend):
    """The device's own thread runs the forward pass again."""
    torch.manual_seed(0)
    model, batch = Checkpointed(None), (torch.randn(4, 3, 5),)
    plan = Plan.make(model, Dropout(r=20))
    truth = rows_of(model, batch, squares, plan, backend="reference")
    model.to(DEVICE).reentrant = reentrant
    plan.paths.clear()
    rows = rows_of(model, there(batch), squares, plan)
    assert_near(rows, truth)
    assert set(plan.paths.values()) == {"closed form"}


class LowRank(nn.Module):
    """A frozen layer beside a trained product of two."""

    def __init__(self):
        super().__init__()
        self.base, self.a = nn.Linear(8, 6), nn.Linear(8, 2, bias=False)
        self.b = nn.Linear(2, 6, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + 2 * self.b(self.a(x))


def test_low_rank(backend):
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), LowRank()), (torch.randn(4, 6, 8),)
    model[0].requires_grad_(False)
    plan = Plan.make(model, Dropout(r=10))
    truth = rows_of(model, batch, squares, plan, backend="reference")
    assert_near(rows_of(model.to(DEVICE), there(batch), squares, plan), truth)


def test_gradient_of_a_gradient(backend):
    """Losses that hold a gradient, whose pass is no pass of rows."""
    torch.manual_seed(0)
    model, (x,) = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), (torch.randn(4, 5),)
    plan = Plan.make(model, Dropout(r=20))

    def losses(model, x):
        x = x.clone().requires_grad_()
        y = model(x).pow(2).sum(1)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y + dx.pow(2).sum(1)

    truth = rows_of(model, x, losses, plan, backend="reference")
    assert_near(rows_of(model.to(DEVICE), x.to(DEVICE), losses, plan), truth)


def test_compiled(backend):
    """Compiled inside of the capture, by inductor."""
    case = CASES[1]
    model, batch = build(case, torch.float32)
    plan = Plan.make(model, Dropout(r=30))
    truth = rows_of(model, batch, case.loss_fn, plan, backend="reference")
    ran = []

    def counted(module, inputs):
        run = compile_fx(module, inputs)
        return lambda *inputs: ran.append(1) or run(*inputs)

    torch._dynamo.reset()
    given = torch.compile(model.to(DEVICE), backend=counted, fullgraph=True)
    plan.paths.clear()
    rows = rows_of(given, there(batch), case.loss_fn, plan)
    torch._dynamo.reset()
    assert len(ran) == 2
    assert_near(rows, truth)
    assert set(plan.paths.values()) == {"closed form"}


# What only a GPU has.


def slow_stream():
    """A stream that is busy for some 30 ms."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
    return stream


@needs_cuda
@pytest.mark.parametrize("rows_there", [True, False], ids=["rows there", "rows on the other"])
def test_another_stream(rows_there, backend):
    """A pass on a stream of its own; its rows are complete for the stream that asked for them."""
    for model, batch, loss_fn in models():
        plan = Plan.make(model, Dropout(r=40))
        truth = rows_of(model, batch, loss_fn, plan, backend="reference")
        model, batch = model.to(DEVICE), there(batch)
        with capture(model, plan) as tap:
            for _ in range(3):
                stream = slow_stream()
                with torch.cuda.stream(stream):
                    losses = loss_fn(model, batch)
                if not rows_there:
                    torch.cuda.current_stream().wait_stream(stream)
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(50_000_000)  # so that rows come late
                with torch.cuda.stream(stream) if rows_there else nullcontext():
                    rows = tap.rows(losses)
                    copied = rows.clone()
                torch.cuda.synchronize()
                assert_near(copied, truth)


def skip_reference(backend):
    if backend == "default" and ("cuda", "sampled_embedding") not in dispatch.VERIFIED:
        pytest.skip("the default is reference, which counts on the host what meets")


@needs_cuda
def test_no_synchronisation(backend):
    """From the third step on, nothing is copied from or to the host, nor waited for."""
    skip_reference(backend)
    for model, batch, loss_fn in models():
        model, batch = model.to(DEVICE), there(batch)
        for compression in (
            Dropout(r=40),
            dropinf.Sketch(r=40, s=3),
            dropinf.FactoredDropout(r=40),
        ):
            with capture(model, Plan.make(model, compression)) as tap:
                for step in range(4):
                    torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
                    try:
                        tap.rows(loss_fn(model, batch))
                    finally:
                        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_given_back(backend):
    """Step after step takes no more memory, and none stays but the rows."""
    model, batch, loss_fn = next(models())
    model, batch = model.to(DEVICE), there(batch)
    plan, held = Plan.make(model, Dropout(r=40)), []
    with capture(model, plan) as tap:
        for _ in range(6):
            rows = tap.rows(loss_fn(model, batch))
            held.append(torch.cuda.memory_allocated() if GPU else 0)
    assert rows.isfinite().all() and len(set(held[2:])) == 1, held


FORKED = """
import os
import sys
import torch
import dropinf
from dropinf import Dropout, Plan, capture

model = torch.nn.Linear(4, 3)
plan = Plan.make(model, Dropout(r=5))
dropinf.ops.gather_grads([torch.ones(4)], [torch.tensor([1])])
with torch.no_grad(), capture(model, plan):  # no backward pass: autograd's threads survive no fork
    model(torch.randn(2, 4))
assert not torch.cuda.is_initialized()
device = os.environ["DEVICE"]
child = os.fork()
if child == 0:
    try:
        model.to(device)
        with capture(model, plan) as tap:
            tap.rows(model(torch.randn(2, 4, device=device)).pow(2).sum(1))
        os._exit(0)
    except BaseException as error:
        print(error, file=sys.stderr, flush=True)
    finally:
        os._exit(5)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.more
@pytest.mark.parametrize("backend", ["default"])
def test_after_a_fork(backend):
    """Neither the import nor a capture on the CPU sets CUDA up, which no fork survives."""
    made = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    made |= {"DEVICE": str(DEVICE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, env=made)
    assert done.returncode == 0, done.stderr


@needs_cuda
def test_cuda_graph(backend):
    """The last test, as a capture that fails may leave the device unusable: right, or refused."""
    skip_reference(backend)
    model, batch, loss_fn = next(models())
    plan = Plan.make(model, Dropout(r=40))
    model, batch = model.to(DEVICE), there(batch)
    truth = rows_of(model, batch, loss_fn, plan)
    with capture(model, plan) as tap:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # as torch asks for
            for _ in range(3):
                tap.rows(loss_fn(model, batch))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rows = tap.rows(loss_fn(model, batch))
        for _ in range(2):
            rows.zero_()
            graph.replay()
            assert_near(rows, truth)
