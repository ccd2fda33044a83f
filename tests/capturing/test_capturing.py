"""capture: rows equal one-example autograd in float64, and the model is left as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, ScaleKernel, Transformer, build, cross_entropy, squares, true_rows
from torch import nn
from torch.utils.checkpoint import checkpoint

import dropinf
from dropinf import Dropout, Full, Plan, capture

MODES = ["activations", "grads"]
case_of = {case.name: case for case in CASES}


def rows_of(case, model, batch, plan, mode, **options):
    with capture(model, plan, mode, **options) as tap:
        return tap.rows(case.loss_fn(model, batch))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compression", [Dropout(r=37), Full()], ids=["Dropout", "Full"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_equal_autograd(case, compression, mode):
    model, batch = build(case, torch.float64)
    plan = Plan.make(model, compression)
    rows = rows_of(case, model, batch, plan, mode)
    truth = true_rows(case, model, batch, plan)
    assert rows.dtype == torch.float64
    assert truth.abs().amax(0).gt(0).float().mean() > 0.5  # the truth is not a row of zeros
    torch.testing.assert_close(rows, truth, rtol=0, atol=1e-13 * truth.abs().max().item())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32_rows(case, mode, backend):
    """As close to the float64 truth as twice what plain float32 autograd reaches."""
    model, batch = build(case, torch.float64)
    plan = Plan.make(model, Dropout(r=50))
    truth = true_rows(case, model, batch, plan)
    narrow = copy.deepcopy(model).float()
    batch32 = tuple(t.float() if t.is_floating_point() else t for t in batch)
    plain = (true_rows(case, narrow, batch32, plan).double() - truth).norm()
    rows = rows_of(case, narrow, batch32, plan, mode, backend=backend.name)
    assert rows.dtype == torch.float32
    assert (rows.double() - truth).norm() <= 2 * plain


@pytest.mark.parametrize("mode", MODES)
def test_batches_and_order(mode):
    """Several batches through one capture; each row depends on its example only."""
    case = case_of["transformer"]
    model, batch = build(case, torch.float64)
    plan = Plan.make(model, Dropout(r=20))
    order = torch.tensor([3, 0, 4, 1, 2])
    with capture(model, plan, mode) as tap:
        whole = tap.rows(case.loss_fn(model, batch))
        parts = [tap.rows(case.loss_fn(model, (batch[0][b : b + 2],))) for b in (0, 2, 4)]
        shuffled = tap.rows(case.loss_fn(model, (batch[0][order],)))
    size = whole.abs().max().item()
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-13 * size)
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=1e-13 * size)


def test_include_exclude_rows():
    """Parameters outside the plan get no entries, and do not disturb those inside."""
    case = case_of["transformer"]
    model, batch = build(case, torch.float64)
    plan = Plan.make(model, Dropout(r=20), include="layers.*.mlp", exclude="*.bias")
    assert [slot.name for slot in plan.slots] == [
        f"layers.{i}.mlp.{j}.weight" for i in (0, 1) for j in (0, 3)
    ]
    truth = true_rows(case, model, batch, plan)
    for mode in MODES:
        rows = rows_of(case, model, batch, plan, mode)
        torch.testing.assert_close(rows, truth, rtol=0, atol=1e-13 * truth.abs().max().item())


def test_row_of_a_loop_left_untouched():
    """mode="grads": the user's own backward, and the row of what is in .grad then."""
    case = case_of["transformer"]
    model, batch = build(case, torch.float64)
    plan = Plan.make(model, Dropout(r=20))
    truth = true_rows(case, model, batch, plan)
    with capture(model, plan, "grads") as tap:
        case.loss_fn(model, batch).sum().backward()
        row = tap.row()
    assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(row, truth.sum(0), rtol=0, atol=1e-12 * truth.abs().max().item())


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_row_after_a_backward_pass_that_can_be_derived(backend):
    """create_graph=True, as for a penalty of gradients, leaves gradients that require grad."""
    model = nn.Linear(3, 2)
    plan = Plan.make(model, Full())
    with capture(model, plan, "grads", backend=backend) as tap:
        model(torch.randn(4, 3)).square().sum().backward(create_graph=True)
        row = tap.row()
    whole = torch.cat([p.grad.detach().flatten() for p in model.parameters()])
    assert torch.equal(row, whole) and not row.requires_grad
    model.zero_grad()


def test_row_of_two_dtypes():
    """Weights are as wide as the gradients that are there."""
    model = nn.ModuleDict({"narrow": nn.Linear(7, 5), "wide": nn.Linear(7, 5).double()})
    x = torch.randn(4, 7)
    plan = Plan.make(model, Dropout(r=9))
    slots = {slot.name: slot for slot in plan.slots}
    assert all(slot.scale != 1 for slot in plan.slots if slot.r)

    def part(p, slot):
        return slot.scale * (
            torch.zeros(slot.r) if p.grad is None else p.grad.flatten()[slot.index]
        )

    with capture(model, plan, "grads") as tap:
        for name, inputs, dtype in (
            ("narrow", x, torch.float32),
            ("wide", x.double(), torch.float64),
        ):
            model[name](inputs).square().sum().backward()
            row = tap.row()
            truth = torch.cat(
                [part(p, slots[n]) for n, p in model.named_parameters() if n in slots]
            )
            assert row.dtype == dtype and row.any()
            torch.testing.assert_close(row, truth.to(dtype), rtol=1e-6, atol=0)
        losses = sum(
            model[n](x.to(t)).square().sum(1).double()
            for n, t in (("narrow", torch.float32), ("wide", torch.float64))
        )
        model.zero_grad()
        rows = tap.rows(losses)
    torch.testing.assert_close(rows.sum(0).double(), truth.double(), rtol=1e-4, atol=1e-4)


def test_unused_parameter_is_zeros():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    model = Unused()
    plan = Plan.make(model, Full())
    used = plan.blocks[0].entries
    for mode in MODES:
        with capture(model, plan, mode) as tap:
            rows = tap.rows(squares(model, (torch.randn(4, 3),)))
        assert (rows[:, used] != 0).any() and not rows[:, used.stop :].any()
        assert tap.met == {"used.weight", "used.bias"}


def state(model):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return (
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [len(getattr(m, h)) for m in model.modules() for h in hooks],
        [m.training for m in model.modules()],
        [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
        [p.clone() for p in model.parameters()],
        len(torch.overrides._get_current_function_mode_stack()),
    )


def assert_same_state(one, other):
    for a, b in zip(one, other, strict=True):
        assert repr(a) == repr(b)


class Failing(nn.Module):
    """Fails in the forward or the backward pass, with an error or an interrupt."""

    def __init__(self, where, error):
        super().__init__()
        self.first, self.last, self.where, self.error = (
            nn.Linear(3, 4),
            nn.Linear(4, 2),
            where,
            error,
        )

    def forward(self, x):
        x = self.first(x)
        if self.where == "forward":
            raise self.error("planted")
        if self.where == "backward":

            def fail(grad):
                raise self.error("planted")

            x.register_hook(fail)
        return self.last(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["nowhere", "forward", "backward", "loss"])
def test_model_is_left_as_it_was(where, error, mode):
    model = Failing(where, error)
    plan = Plan.make(model, Dropout(r=5))
    model.first.bias.grad = torch.arange(4.0)
    model.eval()
    model.last.train()
    before = state(model)
    x = torch.randn(6, 3, requires_grad=where == "nowhere")
    try:
        with capture(model, plan, mode) as tap:
            losses = squares(model, (x,))
            tap.rows(losses.mean() if where == "loss" else losses)
        assert where == "nowhere"
    except (ValueError, KeyboardInterrupt):
        assert where != "nowhere"
    assert_same_state(before, state(model))


def leaves_of(grad_fn):
    """The tensors that a backward pass from here would accumulate gradients into."""
    if hasattr(grad_fn, "variable"):
        return [grad_fn.variable]
    return [leaf for f, _ in grad_fn.next_functions if f is not None for leaf in leaves_of(f)]


def test_no_weight_gradient_is_formed():
    """The graph inside ends in no parameter, so autograd has no weight gradient to form."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    parameters = set(map(id, model.parameters()))
    assert parameters <= set(map(id, leaves_of(squares(model, (x,)).grad_fn)))
    with capture(model, Plan.make(model, Dropout(r=3))) as tap:
        losses = squares(model, (x,))
        assert not parameters & set(map(id, leaves_of(losses.grad_fn)))
        tap.rows(losses)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    """The recomputed forward inside the backward pass is tapped as well."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(5, 5)
            self.bodies = nn.ModuleList(
                nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.LayerNorm(7), nn.Linear(7, 5))
                for _ in range(2)
            )
            self.reentrant = False

        def forward(self, x):
            x = self.first(x)
            for body in self.bodies:
                x = checkpoint(body, x, use_reentrant=self.reentrant)
            return x

    torch.manual_seed(0)
    model = Checkpointed().double()
    plan = Plan.make(model, Full())
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    case = case_of["Conv1D"]._replace(loss_fn=squares)
    truth = true_rows(case, model, (x,), plan)
    model.reentrant = reentrant  # of which torch.autograd.grad, the truth, is refused
    # The reentrant kind cannot keep the graph for a second example.
    for mode in MODES[:1] if reentrant else MODES:
        before = state(model)
        rows = rows_of(case, model, (x,), plan, mode)
        torch.testing.assert_close(rows, truth, rtol=0, atol=1e-13 * truth.abs().max().item())
        assert_same_state(before, state(model))


class SharedBias(nn.Module):
    """The first block makes a bias of positions, which it hands on, as T5 does."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Embedding(4, 5)
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))

    def block(self, i, x, bias):
        bias = self.bias(torch.arange(x.shape[1])) if bias is None else bias
        return self.blocks[i](x + bias), bias

    def forward(self, x, reentrant=False):
        bias = None
        for i in range(2):
            x, bias = checkpoint(self.block, i, x, bias, use_reentrant=reentrant)
        return x


def test_a_parameter_that_leaves_a_reentrant_checkpoint():
    """Outside of it, its gradient is summed over the batch."""
    torch.manual_seed(0)
    model, x = SharedBias().double(), torch.randn(3, 4, 5, dtype=torch.float64)
    plan, case = Plan.make(model, Full()), case_of["Conv1D"]
    truth = true_rows(case, model, (x,), plan)
    torch.testing.assert_close(rows_of(case, model, (x,), plan, "activations"), truth)
    x.requires_grad_(True)
    with (
        pytest.warns(UserWarning, match="a backward pass for each of the 3 losses, .*checkpoint"),
        capture(model, plan) as tap,
    ):
        rows = tap.rows(squares(lambda x: model(x, reentrant=True), (x,)))
    torch.testing.assert_close(rows, truth)


class Odd(nn.Module):
    """Parameters that meet the whole batch at once, and others that do not."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 5, max_norm=0.1)
        self.pairs = nn.Parameter(torch.ones(5))
        self.frozen_gain = nn.Parameter(torch.ones(5), requires_grad=False)
        self.out = nn.Linear(5, 2)

    def forward(self, ids):
        assert self.pairs.shape == (5,) and self.pairs.dtype == self.out.weight.dtype
        x = self.embed(ids) * self.frozen_gain
        x = x + torch.einsum("bti,cti,i->b", x, x, self.pairs)[:, None, None]
        return self.out(x) + torch.zeros_like(self.out.bias) * self.out.bias.detach()


def test_what_takes_passes_is_listed():
    torch.manual_seed(0)
    model, ids = Odd().double(), torch.randint(9, (6, 3))
    plan = Plan.make(model, Full())
    with capture(model, plan, "grads") as tap:
        truth = tap.rows(squares(model, (ids,)))
    with pytest.warns(UserWarning) as caught, capture(model, plan) as tap:
        for _ in range(2):  # said once
            torch.testing.assert_close(tap.rows(squares(model, (ids,))), truth)
    (message,) = (str(w.message) for w in caught if issubclass(w.category, UserWarning))
    for part in (
        "a backward pass for each of the 6 losses",
        "embed.weight (Bmm, which mixes examples)",
        "pairs (Bmm, which mixes examples)",
        "plan.describe()",
        "dropinf.keeps_examples",
    ):
        assert part in message
    assert "out.weight" not in message and "frozen" not in message
    assert plan.paths["out.weight"] == plan.paths["out.bias"] == "closed form"
    assert plan.paths["pairs"] == "a pass for each loss: Bmm, which mixes examples"


@torch.jit.script
def scripted(x: torch.Tensor, w: torch.Tensor):
    return x * w


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:rows. a backward pass for each:UserWarning")
@pytest.mark.parametrize(
    "function, why",
    [(ScaleKernel.apply, "ScaleKernel, which is not known"), (scripted, "Mul, which several")],
    ids=["Function", "script"],
)
def test_what_torch_functions_do_not_show(function, why):
    """A fused kernel takes the parameter past the mode."""

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.scale = nn.Linear(3, 4), nn.Parameter(torch.randn(4))

        def forward(self, x):
            return function(self.first(x), self.scale)

    torch.manual_seed(0)
    model, x = Fused().double(), torch.randn(5, 3, dtype=torch.float64)
    model.scale.grad = torch.arange(4.0, dtype=torch.float64)
    before = state(model)
    plan = Plan.make(model, Full())
    case = case_of["Conv1D"]._replace(loss_fn=squares)
    truth = true_rows(case, model, (x,), plan)
    torch.testing.assert_close(rows_of(case, model, (x,), plan, "activations"), truth)
    assert plan.paths["scale"].startswith(f"a pass for each loss: {why}")
    assert_same_state(before, state(model))


class Borrowed(nn.Module):
    """Its parent uses the parameters of a child whose forward never runs."""

    def __init__(self):
        super().__init__()
        self.child, self.embed = nn.Linear(3, 2), nn.Embedding(7, 3)

    def forward(self, ids):
        return F.linear(self.embed(ids), self.child.weight, self.child.bias)


def test_parameters_used_outside_of_their_module():
    torch.manual_seed(0)
    model, ids = Borrowed().double(), torch.randint(7, (6, 4))
    plan = Plan.make(model, Full())
    case = case_of["Conv1D"]._replace(loss_fn=squares)
    truth = true_rows(case, model, (ids,), plan)
    torch.testing.assert_close(rows_of(case, model, (ids,), plan, "activations"), truth)


def test_parameters_used_in_the_loss():
    """Outside of any forward; a penalty is part of every example's loss."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(6, 3).double()
    plan = Plan.make(model, Full())

    def tied(model, batch):
        return F.linear(F.linear(model(batch[0]), model.weight.new_ones(3, 2)), model.weight).sum(1)

    def penalty(model, batch):
        return model(batch[0]).sum(1) + sum(p.pow(2).sum() for p in model.parameters())

    for loss_fn in (tied, penalty):
        case = case_of["Conv1D"]._replace(loss_fn=loss_fn)
        truth = true_rows(case, model, (x,), plan)
        torch.testing.assert_close(rows_of(case, model, (x,), plan, "activations"), truth)


class FlatIds(nn.Module):
    """Looks up ids [B * T], which may as well be the positions of every example."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)

    def forward(self, ids):
        return self.embed(ids.flatten()).unflatten(0, ids.shape)


def test_ids_without_a_dimension_of_the_batch():
    torch.manual_seed(0)
    model, ids = FlatIds().double(), torch.randint(9, (4, 6))
    plan, case = Plan.make(model, Full()), case_of["Conv1D"]
    truth = true_rows(case, model, (ids,), plan)
    torch.testing.assert_close(rows_of(case, model, (ids,), plan, "activations"), truth)
    assert plan.paths == {"embed.weight": "closed form"}


@pytest.mark.parametrize("mode", MODES)
def test_bad_losses(mode):
    model = nn.Linear(3, 2)
    plan = Plan.make(model, Full())
    x = torch.randn(4, 3)
    with capture(model, plan, mode) as tap:
        with pytest.raises(ValueError, match=r"one loss per example, \[B\], got a scalar"):
            tap.rows(model(x).mean())
        with pytest.raises(ValueError, match=r"got \(4, 2\)"):
            tap.rows(model(x))
        with pytest.raises(ValueError, match="got float"):
            tap.rows(1.0)
        with pytest.raises(ValueError, match="holds no example"):
            tap.rows(model(x[:0]).sum(1))
        with pytest.raises(RuntimeError, match="gradient"):
            tap.rows(model(x).sum(1).detach())
        if mode == "activations":
            with pytest.raises(RuntimeError, match="do not depend on any tracked parameter"):
                tap.rows(x.clone().requires_grad_().sum(1))
        with pytest.raises(RuntimeError, match="open already"):
            tap.__enter__()
        losses = model(x).sum(1)
    with pytest.raises(RuntimeError, match="inside `with"):
        tap.rows(losses)


def test_bad_plans():
    model = nn.Linear(3, 2)
    plan = Plan.make(model, Full())
    with pytest.raises(ValueError, match=r"'weight' of shape \(2, 3\), the model \(2, 4\)"):
        capture(nn.Linear(4, 2), plan)
    with pytest.raises(ValueError, match=r"'weight' of shape \(2, 3\), the model none"):
        capture(nn.Sequential(model), plan)
    with pytest.raises(ValueError, match="mode must be"):
        capture(model, plan, "weights")
    model.bias.requires_grad_(False)
    with capture(model, plan, "grads") as tap, pytest.raises(ValueError, match="'bias' does not"):
        tap.rows(squares(model, (torch.randn(4, 3),)))


def test_autocast():
    """bfloat16 autocast: rows as autograd has them, to bfloat16's rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4))
    x, label = torch.randn(5, 16), torch.randint(4, (5,))
    plan = Plan.make(model, Full())

    def loss_fn(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model, batch).float()

    case = case_of["mlp"]._replace(loss_fn=loss_fn)
    truth = true_rows(case, model, (x, label), plan)
    for mode in MODES:
        rows = rows_of(case, model, (x, label), plan, mode)
        assert (rows - truth).norm() <= 0.01 * truth.norm()


def test_train_mode_dropout_rows_are_of_the_pass():
    """In train mode the rows are those of the sampled masks: same seed, same rows in both modes."""
    torch.manual_seed(0)
    model = Transformer().train()
    plan = Plan.make(model, Dropout(r=20))
    ids = torch.randint(1, 23, (3, 8))
    rows = []
    for mode in MODES:
        torch.manual_seed(1)
        rows.append(rows_of(case_of["transformer"], model, (ids,), plan, mode))
    torch.testing.assert_close(*rows)


def test_a_scale_of_the_losses_is_taken_out_everywhere():
    """Of closed forms, of what is expanded over the batch, and of what takes a pass each."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.mix = nn.Linear(3, 4), nn.Bilinear(4, 4, 2)
            self.shift = nn.Parameter(torch.randn(4))

        def forward(self, x):
            y = self.layer(x) + self.shift
            return self.mix(y, y)

    model, x = Model().double(), torch.randn(5, 3).double()
    rows = []
    for scale in (1.0, 8.0):
        with capture(model, Plan.make(model, Full())) as tap:
            rows.append(tap.rows(model(x).sum(1) * scale, loss_scale=scale))
    torch.testing.assert_close(*rows)


def test_named_backend():
    model = nn.Linear(3, 2)
    with (
        pytest.raises(dropinf.BackendError, match="backend 'cuda'"),
        capture(model, Plan.make(model, Full()), backend="cuda") as tap,
    ):
        tap.rows(squares(model, (torch.randn(4, 3),)))


def test_functional_call_of_an_untracked_weight():
    """A frozen weight in a tracked layer, and the other way round."""
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    plan = Plan.make(model, Full())
    x = torch.randn(4, 3)
    with capture(model, plan) as tap:
        rows = tap.rows(squares(model, (x,)))
    torch.testing.assert_close(rows, 2 * F.linear(x, model.weight, model.bias))


def test_a_reentrant_checkpoint_that_is_cut_off():
    """What is excluded is frozen, so that the checkpoint's input has no gradient: not zeros."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3).double()

    def loss_fn(model, batch, reentrant=True):
        h = checkpoint(model[1], model[0](batch[0]), use_reentrant=reentrant)
        return model[2](h).square().sum(1)

    plan = Plan.make(model, Full(), exclude="0")
    with capture(model, plan) as tap:
        with torch.no_grad():
            loss_fn(model, (x,))  # of which nobody asks rows
        losses = loss_fn(model, (x,))
        with pytest.raises(RuntimeError, match=r"'1.bias' .* use_reentrant=False"):
            tap.rows(losses)
        rows = tap.rows(loss_fn(model, (x,), reentrant=False))
    case = case_of["Conv1D"]._replace(loss_fn=lambda m, b: loss_fn(m, b, reentrant=False))
    torch.testing.assert_close(rows, true_rows(case, model, (x,), plan))
    with capture(model, Plan.make(model, Full())) as tap:
        assert tap.rows(loss_fn(model, (x,))).any()
    model[0].requires_grad_(False)  # as the user has it, and plain autograd then too
    with capture(model, Plan.make(model, Full())) as tap:
        loss_fn(model, (x,))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_batches_of_two_sizes_before_their_rows(reentrant):
    """What runs again decides as it did, though another batch has come since."""

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.token = (
                nn.Parameter(torch.rand(3) + 1),
                nn.Parameter(torch.randn(1, 3)),
            )

        def forward(self, x):
            h = torch.atan2(x, self.scale * 2) + self.token.expand(len(x), -1)
            return h * self.scale

    torch.manual_seed(0)
    model = Body().double()
    plan, case = Plan.make(model, Full()), case_of["Conv1D"]
    batches = [(torch.randn(n, 3).double().requires_grad_(),) for n in (4, 3, 1)]

    def loss_fn(model, batch):
        return checkpoint(model, batch[0], use_reentrant=reentrant).square().sum(1)

    plain = case._replace(loss_fn=lambda m, b: m(b[0]).square().sum(1))
    truths = [true_rows(plain, model, batch, plan) for batch in batches]
    with capture(model, plan) as tap:
        losses = [loss_fn(model, batch) for batch in batches]
        for some, truth in zip(losses, truths, strict=True):
            torch.testing.assert_close(tap.rows(some), truth)
