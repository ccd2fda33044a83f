"""Several captures, threads, copies and setters: a capture is refused in one sentence, or right."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dropinf import Full, Plan, capture, collect

MODES = ["activations", "grads"]
pytestmark = pytest.mark.filterwarnings("ignore:rows. a backward pass for each:UserWarning")


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def losses_of(model, x):
    return model(x).square().sum(1)


def data(seed=0):
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).double()


def true_rows(model, losses):
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True,
                                    materialize_grads=True)  # fmt: skip
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def rows_in(tap, model, x):
    return tap.rows(losses_of(model, x))


def opened(model, mode="activations"):
    return capture(model, Plan.make(model, Full()), mode)


def in_thread(work):
    found = []

    def run():
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


# One model in two captures.


@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", MODES)
def test_a_model_in_two_captures(first, second):
    model, x = mlp(), data()
    truth = true_rows(model, losses_of(model, x))
    part = model[2]  # shares parameters with the whole

    def another(model):
        with opened(model, second):
            pass

    with opened(model, first) as tap:
        for whose in (model, part):
            with pytest.raises(RuntimeError, match="is in a capture that is open; close that"):
                another(whose)
            error = in_thread(lambda whose=whose: another(whose))
            assert isinstance(error, RuntimeError) and "is in a capture that is open" in str(error)
        torch.testing.assert_close(rows_in(tap, model, x), truth)  # the first goes on
    with opened(model, second) as tap:
        torch.testing.assert_close(rows_in(tap, model, x), truth)


def test_a_capture_that_failed_to_open_leaves_the_model_free():
    model, x = mlp(), data()
    tap = opened(model)
    with tap, pytest.raises(RuntimeError, match="this capture is open already"):
        tap.__enter__()
    with opened(model) as tap:
        assert rows_in(tap, model, x).any()


@pytest.mark.parametrize("mode", MODES)
def test_two_models_in_two_threads(mode):
    barrier = threading.Barrier(2, timeout=60)

    def work(seed):
        model, x = mlp(seed), data(seed)
        truth = true_rows(model, losses_of(model, x))
        with opened(model, mode) as tap:
            for _ in range(10):
                barrier.wait()
                torch.testing.assert_close(rows_in(tap, model, x), truth)
        return "exact"

    other = []
    thread = threading.Thread(target=lambda: other.append(work(1)))
    thread.start()
    assert work(0) == "exact"
    thread.join()
    assert other == ["exact"]


def test_a_forward_pass_in_another_thread():
    """Nothing is seen there, so that all is left to autograd."""
    model, x = mlp(), data()
    truth = true_rows(model, losses_of(model, x))
    plan = Plan.make(model, Full())
    with capture(model, plan) as tap:
        torch.testing.assert_close(tap.rows(in_thread(lambda: losses_of(model, x))), truth)
    assert all(path.startswith("a pass for each loss") for path in plan.paths.values())


def test_nested_captures_of_two_models():
    one, other, x = mlp(0), mlp(1), data()
    truths = [true_rows(m, losses_of(m, x)) for m in (one, other)]
    with opened(one) as first:
        with opened(other) as second:
            both = losses_of(one, x), losses_of(other, x)
            torch.testing.assert_close(second.rows(both[1]), truths[1])
            torch.testing.assert_close(first.rows(both[0]), truths[0])
        torch.testing.assert_close(rows_in(first, one, x), truths[0])


def test_captures_that_are_closed_out_of_order():
    one, other, x = mlp(0), mlp(1), data()
    truths = [true_rows(m, losses_of(m, x)) for m in (one, other)]
    import torch._dynamo

    first, second = opened(one), opened(other)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    try:
        losses_of(one, x).sum().backward()  # as outside of any capture
        grads = torch.cat([p.grad.flatten() for p in one.parameters()])
        torch.testing.assert_close(grads, truths[0].sum(0))
        torch.testing.assert_close(rows_in(second, other, x), truths[1])
        assert set(second.plan.paths.values()) == {"closed form"}
    finally:
        second.__exit__(None, None, None)
        left = torch.overrides._get_current_function_mode_stack()
        for _ in left:
            torch.overrides._pop_mode()
        stance = torch._dynamo.eval_frame._stance.stance
        torch.compiler.set_stance("default")
    assert not left and stance == "default"  # what is compiled is compiled again


def test_a_capture_below_others_is_closed():
    """Those above stay in their order."""
    first, *above = [opened(mlp(seed)) for seed in range(3)]
    first.__enter__()
    for tap in above:
        tap.__enter__()
    first.__exit__(None, None, None)
    assert torch.overrides._get_current_function_mode_stack() == [t._closing for t in above]
    for tap in reversed(above):
        tap.__exit__(None, None, None)


# Copies.


def written(model):
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), written],
    ids=["deepcopy", "pickle", "torch.save"],
)  # fmt: skip
def test_a_copy_made_inside(copied):
    model, x = mlp(), data()
    model[0].bias.requires_grad_(False)
    truth = true_rows(model[2], losses_of(model, x))
    plan = Plan.make(model, Full(), include="2")
    with capture(model, plan) as tap:
        losses = losses_of(model, x)
        twin = copied(model)
        assert [tuple(a.shape) for a in twin.parameters()] == [
            tuple(a.shape) for a in model.parameters()
        ]
        twin(x[:2])  # another batch, which is not the capture's
        torch.testing.assert_close(tap.rows(losses), truth)
        with opened(twin) as other:  # and can be captured itself
            assert rows_in(other, twin, x).shape == (5, other.plan.width)
        torch.testing.assert_close(rows_in(tap, model, x), truth)
    losses_of(twin, x).sum().backward()
    grads = [p.grad.flatten() for p in twin[2].parameters()]
    torch.testing.assert_close(torch.cat(grads), truth.sum(0))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_a_capture_is_not_copied(mode):
    with opened(mlp(), mode) as tap:
        with pytest.raises(TypeError, match="an open capture cannot be copied"):
            copy.deepcopy(tap)
        with pytest.raises(TypeError, match="a capture cannot be pickled"):
            pickle.dumps(tap)


def test_state_is_saved_and_loaded_inside():
    model, x = mlp(), data()
    state = {name: 2 * p for name, p in model.state_dict().items()}
    doubled = mlp()
    doubled.load_state_dict(state)
    truth = true_rows(doubled, losses_of(doubled, x))
    with opened(model) as tap:
        model.load_state_dict(state)
        torch.testing.assert_close(rows_in(tap, model, x), truth)
        assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())


# What is the user's.


class Counting(nn.Module):
    """Keeps a buffer, and an optimizer's step in a hook of a parameter."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.stepped = []
        for p in self.inner.parameters():
            p.register_post_accumulate_grad_hook(lambda p: self.stepped.append(id(p)))

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


@pytest.mark.parametrize("sorts", [False, True], ids=["closed", "passes"])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_the_users_is_as_before(mode, sorts):
    model, x = Counting(), data().requires_grad_()
    frozen, *rest = model.inner.parameters()
    frozen.requires_grad_(False)
    for p in rest:
        p.grad = torch.full_like(p, 3.0)
    x.grad = torch.full_like(x, 5.0)
    grads = [p.grad for p in rest]
    hooks = [list(p._post_accumulate_grad_hooks.values()) for p in model.inner.parameters()]
    plan = Plan.make(model, Full())
    assert frozen.shape not in [slot.shape for slot in plan.slots]
    with capture(model, plan, mode) as tap:
        y = model(x)
        losses = (y.sort(0)[0] if sorts else y).square().sum(1)
        tap.rows(losses)
        assert all(p.grad is g for p, g in zip(rest, grads, strict=True))
    assert all(p.grad is g and (g == 3).all() for p, g in zip(rest, grads, strict=True))
    assert frozen.grad is None and not frozen.requires_grad
    assert all(p.requires_grad for p in rest)
    assert hooks == [list(p._post_accumulate_grad_hooks.values()) for p in model.inner.parameters()]
    assert not model.stepped and model.calls == 1
    if mode == "activations":
        assert (x.grad == 5).all()
    losses_of(model, x).sum().backward()
    assert len(model.stepped) == len(rest)  # the hooks live again


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_gradient_of_an_input_is_left_alone_by_checkpoints(reentrant):
    model, x = mlp(), data().requires_grad_()
    with opened(model) as tap:
        tap.rows(checkpoint(model, x, use_reentrant=reentrant).square().sum(1))
    assert x.grad is None


def test_setters_do_inside_what_they_do_outside():
    model, x = mlp(), data()
    twin = mlp()
    for p in twin.parameters():
        p.data = 0.5 * p.data
    truth = true_rows(twin, losses_of(twin, x))
    with opened(model) as tap:
        for p in model.parameters():
            p.data = 0.5 * p.data
            p.grad = torch.ones_like(p)
        torch.testing.assert_close(rows_in(tap, model, x), truth)
        assert all((p.grad == 1).all() for p in model.parameters())
        for p in model.parameters():
            p.grad = None
        model[0].weight.requires_grad_(True)
        with torch.no_grad():
            model[0].weight.mul_(2)
    torch.testing.assert_close(model[0].weight, 2 * twin[0].weight)
    assert all(p.grad is None for p in model.parameters())


def test_a_parameter_that_is_replaced_inside():
    """What stands in its place is another tensor, of which the plan knows nothing."""
    model, x = mlp(), data()
    old = model[0].weight
    with opened(model) as tap:
        model[0].weight = nn.Parameter(2 * old.detach())
        rows = rows_in(tap, model, x)
    assert not rows[:, :12].any()  # it meets no data any more
    truth = true_rows(model, losses_of(model, x))
    torch.testing.assert_close(rows[:, 12:], truth[:, 12:])


def test_kept_activations():
    """retain_grad, and hooks of modules, do inside what they do outside."""
    model, x, kept = mlp(), data(), []
    handle = model[0].register_forward_hook(lambda m, args, y: kept.append(y) or y.retain_grad())
    losses_of(model, x).sum().backward()
    with opened(model) as tap:
        rows_in(tap, model, x)
    handle.remove()
    torch.testing.assert_close(kept[1].grad, kept[0].grad)


# Gradients of gradients.


def physics(model, batch):
    """A PINN's residual."""
    (x,) = batch
    x = x.clone().requires_grad_()
    y = model(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return (slope.sum(1, keepdim=True) - y).square().sum(1)


def penalty(model, batch):
    x = batch[0].clone().requires_grad_()
    losses = losses_of(model, x)
    (slope,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
    return losses + slope.norm(dim=1)


def forces(model, batch):
    """Energies alone have a gradient; what is compared is their slope."""
    x = batch[0].clone().requires_grad_()
    (force,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (force - 1).square().sum(1)


def twice(model, batch):
    x = batch[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (curve,) = torch.autograd.grad(slope.square().sum(), x, create_graph=True)
    return curve.square().sum(1)


NETS = {
    "linear": mlp,
    "norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)),
    "groups": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Softplus(), nn.Linear(4, 2)
    ),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 2)
    ),
    "prelu": lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Tanh(), nn.Linear(4, 2)),
}


@pytest.mark.parametrize("how", ["capture", "closed=False", "collect"])
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
@pytest.mark.parametrize("loss_fn", [physics, penalty, forces, twice], ids=lambda f: f.__name__)
def test_gradients_of_gradients(loss_fn, net, how):
    torch.manual_seed(0)
    model, batch = net().double(), (data(),)
    plan = Plan.make(model, Full())
    truth = true_rows(model, loss_fn(model, batch))
    if how == "collect":
        rows = collect(model, [batch], loss_fn, plan, check=False, progress=False).rows
    else:
        with capture(model, plan, closed=how == "capture") as tap:
            rows = tap.rows(loss_fn(model, batch))
    torch.testing.assert_close(rows, truth)


def test_gradients_of_gradients_by_biases_alone():
    """Whose sites have kept no input."""
    model, batch = mlp(), (data(),)
    model[1] = nn.Sigmoid()
    plan = Plan.make(model, Full(), include=["*.bias"])
    truth = true_rows(model, penalty(model, batch))
    names = [n for n, p in model.named_parameters() for _ in range(p.numel())]
    with capture(model, plan) as tap:
        rows = tap.rows(penalty(model, batch))
    torch.testing.assert_close(rows, truth[:, [n.endswith("bias") for n in names]])


def inner_step(model, batch):
    """MAML: the loss after a step on the same example."""
    (x,) = batch
    weight = model.weight
    (step,) = torch.autograd.grad(F.linear(x, weight).square().sum(), weight, create_graph=True)
    return F.linear(x, weight - 0.1 * step).square().sum(1)


def inner_step_by(take):
    """Of what is made of the parameter."""

    def losses(model, batch):
        (x,) = batch
        weight = take(model.weight)
        (step,) = torch.autograd.grad(
            F.linear(x, weight).square().sum(), weight, create_graph=True, allow_unused=True
        )
        step = torch.zeros_like(weight) if step is None else step
        return F.linear(x, weight - 0.1 * step).square().sum(1)

    return losses


@pytest.mark.parametrize(
    "loss_fn",
    [inner_step, *(inner_step_by(f) for f in (lambda w: w * 1, lambda w: w.view(6).view(2, 3)))],
    ids=["the parameter", "what is made of it", "a view"],
)
def test_gradients_of_the_parameters_themselves(loss_fn):
    torch.manual_seed(0)
    model, batch = nn.Linear(3, 2, bias=False).double(), (data(),)
    plan = Plan.make(model, Full())
    truth = true_rows(model, loss_fn(model, batch))
    with capture(model, plan, closed=False) as tap:
        torch.testing.assert_close(tap.rows(loss_fn(model, batch)), truth)
    rows = collect(model, [batch], loss_fn, plan, check=False, progress=False).rows
    torch.testing.assert_close(rows, truth)
    with (
        pytest.raises(RuntimeError, match=r"'weight' itself.*closed=False"),
        capture(model, plan) as tap,
    ):
        tap.rows(loss_fn(model, batch))
    assert model.weight.requires_grad and model.weight.grad is None


def test_a_graph_of_a_capture_that_is_closed():
    model, x = mlp(), data().requires_grad_()
    with opened(model):
        losses = losses_of(model, x)
    for run in (lambda: losses.sum().backward(retain_graph=True),
                lambda: torch.autograd.grad(losses.sum(), x)):  # fmt: skip
        with pytest.raises(RuntimeError, match="computed inside of a capture"):
            run()


def test_a_hook_that_was_there_before():
    model, x = mlp(), data()
    model[0].weight.register_hook(lambda g: 3 * g)
    truth = true_rows(model, losses_of(model, x))
    with opened(model) as tap:
        torch.testing.assert_close(tap.rows(losses_of(model, x)), truth)


@pytest.mark.parametrize("which", ["layer.weight", "shift"])
def test_a_hook_set_by_a_later_forward_pass(which):
    """It changes the gradients of the earlier one too, which has closed the parameter already."""

    class Hooking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.late = nn.Linear(3, 2), False
            self.shift = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            if self.late:
                self.get_parameter(which).register_hook(lambda g: 3 * g)
            return self.layer(x) + self.shift

    model, x = Hooking().double(), data()
    with capture(model, Plan.make(model, Full())) as tap:
        first = model(x).square().sum(1)
        model.late = True
        with pytest.raises(RuntimeError, match="hooks it"):
            model(x)
        tap.rows(first)


def test_a_backward_pass_of_ones_own():
    model, x = mlp(), data().requires_grad_()
    truth = true_rows(model, losses_of(model, x))
    with opened(model) as tap:
        losses = losses_of(model, x)
        for run in (lambda: losses.sum().backward(retain_graph=True),
                    lambda: torch.autograd.backward(losses.sum(), retain_graph=True)):  # fmt: skip
            with pytest.raises(RuntimeError, match=r"computed inside of a capture.*closed=False"):
                run()
            torch.autograd.grad(losses.sum(), x, retain_graph=True)  # is no such pass
        torch.testing.assert_close(tap.rows(losses), truth)


@pytest.mark.parametrize("mode", ["activations", "grads"])
def test_a_capture_that_another_thread_closes(mode):
    """Refused, with nothing undone: the thread that opened it goes on and closes it."""
    model, x = mlp(), data()
    truth = true_rows(model, losses_of(model, x))
    said = []

    def close():
        with pytest.raises(RuntimeError, match="close it in the thread that opened it") as error:
            tap.__exit__(None, None, None)
        said.append(error)

    with opened(model, mode) as tap:
        thread = threading.Thread(target=close)
        thread.start()
        thread.join()
        assert said
        torch.testing.assert_close(tap.rows(losses_of(model, x)), truth)
    assert not torch.overrides._get_current_function_mode_stack()


def test_an_interrupt_as_a_capture_is_paused():
    """Its mode is off the stack then, where those of others stay."""

    class Mode(torch.overrides.TorchFunctionMode):
        seen = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen += 1
            return func(*args, **(kwargs or {}))

    model = mlp()
    with Mode() as mode:
        with (
            pytest.raises(KeyboardInterrupt),
            capture(model, Plan.make(model, Full())) as tap,
        ):
            tap._closing.__exit__(None, None, None)  # as `paused` does
            raise KeyboardInterrupt
        torch.ones(2).sum()
    assert mode.seen
    with capture(model, Plan.make(model, Full())) as tap:
        losses = losses_of(model, data())
        rows = tap.rows(losses)
    assert torch.allclose(rows, true_rows(model, losses_of(model, data())).to(rows))
