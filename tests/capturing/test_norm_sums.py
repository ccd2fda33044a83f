"""Norms whose sums one op forms, as on a GPU: here that is asked for on a CPU."""

import copy

import pytest
import torch
from cases import Case, assert_exact, build, padded_ids, squares, tokens_cross_entropy, true_rows
from cases import Transformer as Tokens
from conftest import on_the_host
from torch import nn

from dropinf import Dropout, Full, Gaussian, Plan, Sketch, capture, ops
from dropinf.capturing import closing, extension, kept
from dropinf.capturing.rules import norms
from dropinf.ops import dispatch


@pytest.fixture(autouse=True)
def summed(monkeypatch):
    monkeypatch.setattr(norms, "SUMMED_ON", {"cpu"})


@pytest.fixture
def calls(monkeypatch):
    """The dtypes of x in calls of the op that Python makes."""
    made, op = [], ops.sampled_norm

    def counted(x, *args, **options):
        made.append(x.dtype)
        return op(x, *args, **options)

    monkeypatch.setattr(ops, "sampled_norm", counted)
    return made


class Norms(nn.Module):
    """Of one dimension and of two; without a shift, without a scale; a scale of every kind."""

    def __init__(self):
        super().__init__()
        self.flat, self.both = nn.LayerNorm(8, eps=1e-3), nn.LayerNorm((3, 8))
        self.rms, self.own_eps = nn.RMSNorm(8), nn.RMSNorm((3, 8), eps=1e-2)
        self.scale_alone, self.shift = nn.LayerNorm(8, bias=False), nn.Parameter(torch.zeros(8))

    def forward(self, x):
        x = self.rms(self.both(self.flat(x)).tanh())
        x = self.own_eps(self.scale_alone(x).tanh())
        # Of a scale that is made of a parameter, as Gemma has it, and none at all.
        return nn.functional.layer_norm(x, (8,), 1 + self.shift, self.shift)


CASES = [
    Case("norms", Norms, lambda: (torch.randn(4, 5, 3, 8),), squares),
    Case("a vector", lambda: nn.LayerNorm(8), lambda: (torch.randn(4, 8),), squares),
    Case("a transformer", lambda: Tokens().eval(), padded_ids, tokens_cross_entropy),
]
SKETCH = Sketch(r=7, s=3)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
@pytest.mark.parametrize("compression", [Dropout(r=13), Full()], ids=["Dropout", "Full"])
def test_rows_equal_autograd(case, compression, calls):
    model, batch = build(case, torch.float64)
    plan = Plan.make(model, compression)
    truth = true_rows(case, model, batch, plan)
    with capture(model, plan) as tap:
        for _ in range(2):
            assert_exact(tap.rows(case.loss_fn(model, batch)), truth)
    assert calls and set(plan.paths.values()) <= {"closed form", "pulled back"}


@pytest.mark.parametrize("compression", [SKETCH, Gaussian(r=9)], ids=["Sketch", "Gaussian"])
@every_case
def test_other_compressions(case, compression, calls, monkeypatch):
    """Rows are those of the way of a CPU."""
    model, batch = build(case, torch.float64)
    plan = Plan.make(model, compression)
    rows = []
    for places in ({"cpu"}, {"cuda"}):
        monkeypatch.setattr(norms, "SUMMED_ON", places)
        with capture(model, plan) as tap:
            rows.append(tap.rows(case.loss_fn(model, batch)))
    assert calls
    assert_exact(*rows)


def test_a_sum_of_scales_and_shifts_is_one_call(calls):
    model = nn.LayerNorm(8)
    plan = Plan.make(model, SKETCH)
    with capture(model, plan, backend="reference") as tap:
        tap.rows(squares(model, (torch.randn(3, 5, 8),)))
    assert len(calls) == 1


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_one_of_the_two(frozen, calls):
    model, x = nn.LayerNorm(8).double(), torch.randn(3, 5, 8).double()
    model.get_parameter(frozen).requires_grad_(False)
    plan = Plan.make(model, Full())
    truth = true_rows(Case("", None, None, squares), model, (x,), plan)
    with capture(model, plan) as tap:
        assert_exact(tap.rows(squares(model, (x,))), truth)
    assert len(calls) == 1


def test_tokens(calls, monkeypatch):
    model, batch = build(CASES[2], torch.float64)
    plan = Plan.make(model, Dropout(r=13))
    rows = []
    for places in ({"cpu"}, {"cuda"}):
        monkeypatch.setattr(norms, "SUMMED_ON", places)
        with capture(model, plan, per="token") as tap:
            rows.append(tap.rows(tokens_cross_entropy(model, batch)))
    assert calls
    assert_exact(*rows)


def test_what_is_read_is_not_widened(calls):
    """The op takes x and dy as they are; where they differ, as under autocast, in the wider one."""
    model, x = nn.LayerNorm(8).bfloat16(), torch.randn(3, 5, 8).bfloat16()
    with capture(model, Plan.make(model, Full())) as tap:
        tap.rows(squares(model, (x,)).float())
    assert calls == [torch.bfloat16]
    (form,) = norms.layer_norm(x, (8,), model.weight)
    assert [t.dtype for t in form.prepare(x, x.float())] == [torch.float32] * 2


@pytest.fixture
def on_host(request, monkeypatch):
    """The CUDA kernel of the op alone, on the host, by default and as C++ calls it."""
    native = torch.ops.dropinf.sampled_norm.default
    on_the_host(request, monkeypatch)
    for op, kernels in dispatch.KERNELS.items():
        if "cuda" in kernels:
            monkeypatch.setitem(kernels, "cuda", getattr(torch.ops.dropinf, op).default)
    monkeypatch.setitem(dispatch.VERIFIED, ("cuda", "sampled_norm"), "taken by default here")
    with torch.library._scoped_library("dropinf", "IMPL") as library:
        library.impl("sampled_norm", torch.ops.dropinf_host.sampled_norm.default, "CPU")
        dispatch.kernel.cache_clear()
        assert dispatch.KERNELS["sampled_norm"]["cuda"] is native
        yield


@pytest.mark.skipif(extension.CPP is None, reason="the extension was not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compression", [Dropout(r=13), SKETCH], ids=["Dropout", "Sketch"])
@every_case
def test_the_same_bits_in_cpp(case, compression, dtype, calls, on_host, monkeypatch):
    """What C++ writes without a word of Python, from the second pass on."""
    model, batch = build(case, torch.float32)
    model.to(dtype)
    batch = tuple(t.to(dtype) if t.is_floating_point() else t for t in batch)

    def rows_in(passes):
        plan, rows, made = Plan.make(model, compression), [], []
        with capture(model, plan) as tap:
            for _ in range(passes):
                before = len(calls)
                rows.append(tap.rows(case.loss_fn(model, batch)))
                made.append(len(calls) - before)
        return rows, made

    rows, made = rows_in(2)
    with monkeypatch.context() as patch:
        for module in (closing, kept):
            patch.setattr(module, "CPP", None)
        plain, all_made = rows_in(1)
    assert torch.equal(rows[0], plain[0]) and torch.equal(rows[1], plain[0])
    # What C++ leaves to Python: a scale that is made of a parameter, and sums of it.
    assert made[1] < all_made[0] if case.name == "norms" else made[1] == 0 < all_made[0]


@pytest.mark.skipif(extension.CPP is None, reason="the extension was not built")
def test_compiled(calls, on_host):
    torch._dynamo.reset()
    case = CASES[2]
    model, batch = build(case, torch.float32)
    plan = Plan.make(model, Dropout(r=13))
    truth = true_rows(case, copy.deepcopy(model).double(), batch, plan)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        with capture(compiled, plan) as tap:
            rows = tap.rows(case.loss_fn(compiled, batch))
        assert (rows - truth).norm() <= 2e-6 * truth.norm()
    assert set(plan.paths.values()) == {"closed form"} and not calls
    torch._dynamo.reset()
