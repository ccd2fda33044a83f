"""Models under torch.compile: compiled inside a capture, exact, and never compiled where not sure.

Most run the compiler's graphs by `Counted`, which traces as inductor does and generates no code.
"""

import contextlib
import copy
import gc
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Flipping, assert_exact, build, true_rows
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.compile_fx import compile_fx
from torch.utils.checkpoint import checkpoint

from dropinf import Dropout, Full, Plan, capture, collect, verify


class Counted:
    """A backend that counts the graphs it compiles, and how often they run."""

    def __init__(self, inner=aot_eager):
        self.compiled = self.ran = 0
        self._inner = inner

    def __call__(self, module, inputs):
        self.compiled += 1
        run = self._inner(module, inputs)

        def counted(*inputs):
            self.ran += 1
            return run(*inputs)

        return counted


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def autograd_rows(model, losses_of, plan, B):
    """[B, R] by plain autograd of one loss after another; the plan keeps every coordinate."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    some = [parameters[slot.name] for slot in plan.slots]
    rows = []
    for b in range(B):
        grads = torch.autograd.grad(losses_of(b), some, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def squares(model, x):
    results = model(x * 1.0)
    results = results if isinstance(results, tuple) else (results,)
    return sum((k + 1) * y.pow(2).flatten(1).sum(1) for k, y in enumerate(results))


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check(model, batches, compiled, loss_fn=squares, exclude=None, **options):
    """Rows of each batch are exact, and all of them, none, or those but the first are compiled."""
    plan, backend = Plan.make(model, Full(), exclude=exclude), Counted()
    given = torch.compile(model, backend=backend, **options)
    for number, x in enumerate(batches):
        truth = autograd_rows(model, lambda b, x=x: loss_fn(model, x)[b], plan, len(x))
        before = backend.ran
        with quiet(), capture(given, plan) as tap:
            rows = tap.rows(loss_fn(given, x))
        assert_exact(rows, truth)
        here = compiled if isinstance(compiled, bool) else number == 0
        assert (backend.ran > before) == here, backend.ran
    return plan, backend


# Whole models.


def check_case(case, sizes, inner=aot_eager, dtype=torch.float64):
    """Rows of batches of these sizes are exact, in closed form, and compiled without a break."""
    model, batch = build(case, dtype)
    plan, backend = Plan.make(model, Dropout(r=30)), Counted(inner)
    given = torch.compile(model, backend=backend, fullgraph=True)
    double = copy.deepcopy(model).double()
    for number, size in enumerate(sizes, 1):
        some = tuple(t[:size] for t in batch)
        with capture(given, plan) as tap:
            rows = tap.rows(case.loss_fn(given, some))
        wide = tuple(t.double() if t.is_floating_point() else t for t in some)
        truth = true_rows(case, double, wide, plan)
        if dtype == torch.float64:
            assert_exact(rows, truth)
        else:
            assert (rows - truth).norm() <= 2e-6 * truth.norm()
        assert backend.ran == number
        assert set(plan.paths.values()) == {"closed form"}
    assert backend.compiled <= 2  # the second for any number of examples


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c.name, marks=[pytest.mark.more] * c.name.startswith("GPT"))
        for c in CASES
    ],
)
def test_models(case):
    check_case(case, [5, 3, 5] if case.name in ("mlp", "transformer") else [5])


def test_inductor():
    """Generated code, with a layer that is called twice."""
    check_case(CASES[1], [5, 5], compile_fx, torch.float32)


@pytest.mark.more
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_models_on_inductor(case):
    check_case(case, [5, 3, 5], compile_fx, torch.float32)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=23,
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config).eval()


def lora():
    import peft
    from cases import gpt2

    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    return peft.get_peft_model(gpt2(), config).eval()


def vit():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=8,
        patch_size=4,
    )
    return ViTModel(config, add_pooling_layer=False).eval()


IDS = torch.randint(1, 23, (4, 7), generator=torch.Generator().manual_seed(0))


def logits(model, x):
    y = model(input_ids=x).logits
    return y.pow(2).flatten(1).sum(1)


@pytest.mark.more
@pytest.mark.parametrize("make", [llama, lora])
def test_language_models(make):
    model = make().double()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    check(model, [IDS, IDS[:2, :5]], True, logits)


def test_images():
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    hidden = lambda m, x: m(x).last_hidden_state.pow(2).flatten(1).sum(1)  # noqa: E731
    check(vit().double(), [images], True, hidden)


def test_convolutions():
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    convolutions = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, stride=2),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(4, 4, 2),
        nn.PReLU(4),
        nn.Flatten(),
        nn.Linear(100, 5),
    )
    check(convolutions.double(), [images], True, fullgraph=True)


# One parameter after another, in all kinds of graphs.


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.l, self.k, self.of = nn.Linear(3, 5), nn.Linear(5, 5), forward

    def forward(self, x):
        return self.of(self, x)


def order(x):
    return x.flatten(1).sum(1).argsort()


def put(y, at, value):
    y[at] = value
    return y


def without_gradient(s, x):
    with torch.no_grad():
        y = s.k(s.l(x))
    return y * s.k(s.l(x))


def with_hook(s, x):
    y = s.l(x).tanh()
    y.register_hook(lambda g: g.flip(0))
    return s.k(y)


def shared_memory(s, x):
    y = s.k(s.l(x).tanh())
    return y, y.view(len(y), -1)


def both_ways(s, x):
    y = s.k(s.l(x).tanh())
    return y, y.flip(0)


COMPILED = {
    "plain": lambda s, x: s.k(s.l(x).tanh()),
    "a layer called twice": lambda s, x: s.k(s.k(s.l(x)).tanh() + s.l(x)),
    "examples that are turned around": lambda s, x: s.k(s.l(x).tanh().flip(0)),
    "examples that are turned around, and back": lambda s, x: s.k(s.l(x).roll(1, 0)).roll(-1, 0),
    "two results": lambda s, x: (s.k(s.l(x).tanh()), s.l(x)),
    "sequence first": lambda s, x: s.k(s.l(x.transpose(0, 1)).tanh()).transpose(0, 1),
    "flattened": lambda s, x: s.k(s.l(x.reshape(-1, 3)).tanh()).reshape(*x.shape[:-1], 5),
    "a weight in another function too": lambda s, x: s.k(s.l(x).tanh()) @ s.k.weight,
    "in place": lambda s, x: s.k(s.l(x).relu_()).mul_(2),
    "the batch twice": lambda s, x: s.k(torch.cat([s.l(x), s.l(x)], 0))[: len(x)],
    "constants in front": lambda s, x: s.k(torch.cat([x.new_ones(2, 2, 5), s.l(x)], 0))[2:],
    "constants on both sides": lambda s, x: s.k(
        torch.cat([x.new_ones(2, 2, 5), s.l(x), x.new_ones(1, 2, 5)], 0)
    )[2:6],
    "a write": lambda s, x: s.k(put(x.new_zeros(4, 2, 5), slice(1, 3), s.l(x)[:2])),
    "a part without gradients": without_gradient,
    "what is written to": lambda s, x: s.k(s.l(x.mul_(2))),
    "a norm of parameters of layers": lambda s, x: s.k(
        F.layer_norm(s.l(x), (5,), s.k.bias, s.l.bias)
    ),
    "parameters that broadcast": lambda s, x: (s.k(s.l(x) + s.k.bias) - s.l.bias) * s.k.bias,
    "parameters that are expanded": lambda s, x: s.k(
        torch.cat([s.l.bias.expand(len(x), 1, -1), s.l(x)], 1)
    ),
    "labels that are gathered": lambda s, x: s.k(s.l(x)).gather(-1, (x[..., :1] > 0).long()),
}
# What the compiler sees and has no site for; nothing ran compiled.
REFUSED = {
    "a weight that is made": lambda s, x: F.linear(s.l(x), 2 * s.k.weight, s.k.bias),
    "a penalty": lambda s, x: s.k(s.l(x)) + s.k.weight.pow(2).sum(),
    "a weight on the left": lambda s, x: s.k(s.l(x)) * s.k.weight.sum(0),
    "a branch on data": lambda s, x: s.k(s.l(x).flip(0)) if x.sum() > 0 else s.k(s.l(x)),
    "a hook": with_hook,
    "a Function of one's own": lambda s, x: s.k(Flipping.apply(s.l(x))),
    "a checkpoint": lambda s, x: checkpoint(lambda y: s.k(y).tanh(), s.l(x), use_reentrant=False),
}
# What the walk finds; such a batch takes passes, later ones are as written.
GIVEN_UP = {
    "examples sorted by data": lambda s, x: s.k(s.l(x)[order(x)]),
    "examples sorted by data, and back": lambda s, x: s.k(s.l(x)[order(x)])[order(x).argsort()],
    "a write by data": lambda s, x: s.k(put(x.new_zeros(4, 2, 5), order(x), s.l(x))),
    "examples that are mixed": lambda s, x: s.k(s.l(x) - s.l(x).mean(0)),
    "results that share memory": shared_memory,
    "a result both ways": both_ways,
}


def data(seeds=(1, 2, 1)):
    """[4, 2, 3] each."""
    return [
        torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
        for s in seeds
    ]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name):
    check(Net(COMPILED[name]).double(), data(), True, fullgraph=True)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    check(Net(REFUSED[name]).double(), data(), False)


@pytest.mark.parametrize("name", GIVEN_UP)
def test_given_up(name):
    check(Net(GIVEN_UP[name]).double(), data(), "the first")


def test_state_that_changes_what_is_done():
    """Python that decides: the compiler makes a graph of each way, and each is walked."""

    def forward(s, x):
        s.step = not getattr(s, "step", False)
        return s.k(s.l(x).flip(0) if s.step else s.l(x).tanh())

    model = Net(forward).double()

    def loss_fn(model, x):
        inside(model).step = ways[0]
        return squares(model, x)

    ways = [False]
    inside = lambda model: getattr(model, "_orig_mod", model)  # noqa: E731
    for ways[0] in (False, True):
        check(model, data(), True, loss_fn)


def test_whose_rows_depend_on_the_order_of_the_losses():
    """The losses are turned around outside of what is compiled."""
    turned = lambda model, x: squares(model, x).flip(0)  # noqa: E731
    check(Net(COMPILED["plain"]).double(), data(), True, turned)


def test_results_that_are_written_to():
    """By the loss: as in plain code, also where what is written to is needed."""

    def written(model, x):
        y = model(x)
        y[:, 0] = 0
        return y.mul_(2).pow(2).flatten(1).sum(1)

    check(Net(COMPILED["plain"]).double(), data(), True, written)
    model, (x, *_) = Net(lambda s, x: s.k(s.l(x)).tanh()).double(), data()
    plan, given = Plan.make(model, Full()), torch.compile(model, backend=Counted())
    with capture(given, plan) as tap, pytest.raises(RuntimeError, match="inplace operation"):
        tap.rows(written(given, x))


def test_several_passes_before_the_rows():
    both = lambda model, x: squares(model, x) + squares(model, x.flip(0)).flip(0)  # noqa: E731
    check(Net(COMPILED["plain"]).double(), data(), True, both)


def test_rows_in_another_thread():
    """Where no mode shows the walk what functions do."""
    model, (x, *_) = Net(COMPILED["constants on both sides"]).double(), data()
    plan, given = Plan.make(model, Full()), torch.compile(model, backend=Counted())
    truth = autograd_rows(model, lambda b: squares(model, x)[b], plan, len(x))
    with capture(given, plan) as tap, ThreadPoolExecutor() as threads:
        rows = threads.submit(tap.rows, squares(given, x)).result()
    assert_exact(rows, truth)
    assert set(plan.paths.values()) == {"closed form"}


def test_parameters_that_are_left_out():
    model = Net(COMPILED["a layer called twice"]).double()
    plan, _ = check(model, data(), True, exclude=["k"])
    assert [slot.name for slot in plan.slots] == ["l.weight", "l.bias"]
    model.l.bias.requires_grad_(False)
    check(model, data(), True)


# What is said.


def test_why_it_is_not_compiled_is_said_once():
    model = Net(REFUSED["a weight that is made"]).double()
    plan, given = Plan.make(model, Full()), torch.compile(model, backend=Counted())
    said = r"captured as written, because of 'k.weight' in torch.mul"
    with pytest.warns(UserWarning, match=said), capture(given, plan) as tap:
        tap.rows(squares(given, data()[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with capture(given, plan) as tap:
            tap.rows(squares(given, data()[0]))


def slopes(model, x):
    """Gradients of the model's own results."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return g.pow(2).flatten(1).sum(1)


def test_gradients_of_gradients():
    """Refused in a loop of one's own, which goes on; taken again by collect."""
    model = Net(COMPILED["plain"]).double()
    plan, given = Plan.make(model, Full()), torch.compile(model, backend=Counted())
    (x,) = data([1])
    truth = autograd_rows(model, lambda b: slopes(model, x)[b], plan, len(x))
    with quiet(), capture(given, plan) as tap:
        with pytest.raises(RuntimeError, match="run the model on this batch again"):
            tap.rows(slopes(given, x))
        torch.testing.assert_close(tap.rows(slopes(given, x)), truth)
    with pytest.warns(UserWarning, match="a gradient of a gradient"):
        store = collect(given, [x, x], slopes, plan, progress=False)
    torch.testing.assert_close(store.rows, truth.repeat(2, 1))


# Collections, and what surrounds a capture.


def test_collect():
    """Compiled throughout, but for the example that runs alone and the proof."""
    model = Net(COMPILED["plain"]).double()
    plan, backend = Plan.make(model, Full()), Counted()
    batches = [*data((1, 2, 3, 4)), data((5,))[0][:3], data((6,))[0][:3]]
    store = collect(torch.compile(model, backend=backend), batches, squares, plan, progress=False)
    whole = torch.cat(batches)
    truth = autograd_rows(model, lambda b: squares(model, whole)[b], plan, len(whole))
    assert_exact(store.rows, truth)
    assert backend.ran == len(batches) and backend.compiled == 2
    assert store.proof.examples == 2 and store.proof.largest < 1e-12
    proof = verify(torch.compile(model, backend=backend), batches[0], squares, plan)
    assert proof.examples == 1


@pytest.mark.parametrize("how", ["torch.compile", "module.compile"])
def test_nothing_is_left_and_nothing_is_mixed_up(how):
    """Plain, captured, plain, captured: two graphs are compiled, and each is used for its own."""
    model, (x, *_) = Net(COMPILED["plain"]).double(), data()
    plan, backend, given = Plan.make(model, Full()), Counted(), model
    truth = autograd_rows(model, lambda b: squares(model, x)[b], plan, len(x))
    expected = model(x)
    if how == "torch.compile":
        given = torch.compile(model, backend=backend)
        before = set(given.__dict__), given.forward
    else:
        model.compile(backend=backend)
        before = set(given.__dict__), given._compiled_call_impl
    for _ in range(3):
        assert torch.equal(given(x), expected)
        given(x).sum().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        with capture(given, plan) as tap:
            assert_exact(tap.rows(squares(given, x)), truth)
            assert torch.equal(given(x), expected)
        for p, grad in zip(model.parameters(), grads, strict=True):
            assert torch.equal(p.grad, grad) and p.requires_grad
            p.grad = None
    assert backend.compiled == 2
    after = given.forward if how == "torch.compile" else given._compiled_call_impl
    assert (set(given.__dict__), after) == before
    assert not model._forward_pre_hooks and not torch.overrides._get_current_function_mode_stack()
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_other_plans_of_the_same_parameters_compile_nothing():
    model, (x, *_) = Net(COMPILED["plain"]).double(), data()
    backend = Counted()
    given = torch.compile(model, backend=backend)
    for seed in range(3):
        plan = Plan.make(model, Dropout(r=10, seed=seed))
        with capture(given, plan) as tap:
            rows = tap.rows(squares(given, x))
        with capture(model, plan) as tap:
            torch.testing.assert_close(rows, tap.rows(squares(model, x)))
    assert backend.compiled == 1


def test_training_mode():
    """Dropout is drawn by the compiled code; with it off, eval and train take turns."""
    forward = lambda s, x: s.k(F.dropout(s.l(x), 0.5 * s.on, s.training))  # noqa: E731
    model, (x, *_) = Net(forward).double(), data()
    plan, backend = Plan.make(model, Full()), Counted()
    given = torch.compile(model, backend=backend)
    model.on = 0
    for training in (False, True, False, True):
        model.train(training)
        truth = autograd_rows(model, lambda b: squares(model, x)[b], plan, len(x))
        with capture(given, plan) as tap:
            assert_exact(tap.rows(squares(given, x)), truth)
    assert backend.compiled == 2
    model.on = 1
    with capture(given, plan) as tap:
        torch.manual_seed(0)
        losses = squares(given, x)
        rows = tap.rows(losses)
    torch.manual_seed(0)
    with capture(model, plan) as tap:  # aot_eager draws as eager code does
        again = squares(model, x)
        torch.testing.assert_close(losses, again)
        torch.testing.assert_close(rows, tap.rows(again))


def test_half_precision():
    model, (x, *_) = Net(COMPILED["plain"]).float(), data()
    plan = Plan.make(model, Full())
    given, x = torch.compile(model, backend=Counted()), x.float()
    rows = []
    for one in (given, model):
        with capture(one, plan) as tap:
            with torch.autocast("cpu", torch.bfloat16):
                losses = one(x).float().pow(2).flatten(1).sum(1)
            rows.append(tap.rows(losses))
    assert set(plan.paths.values()) == {"closed form"}
    torch.testing.assert_close(*rows, rtol=0.02, atol=0.02)


def test_a_graph_that_is_kept():
    model, (x, *_) = Net(COMPILED["plain"]).double(), data()
    plan, given = Plan.make(model, Full()), torch.compile(model, backend=Counted())
    truth = autograd_rows(model, lambda b: squares(model, x)[b], plan, len(x))
    with capture(given, plan) as tap:
        losses = squares(given, x)
        for factor in (2, 1):
            rows = tap.rows(factor * losses, retain_graph=factor == 2)
            assert_exact(rows, factor * truth)
    with capture(given, plan) as tap:
        losses = squares(given, x)
    with pytest.raises(RuntimeError, match=r"call tap\.rows"):
        losses.sum().backward()


def test_hooks_of_ones_own_are_run():
    """On the model: it is captured as written. On a parameter: it is left to autograd."""
    model, (x, *_) = Net(COMPILED["plain"]).double(), data()
    plan, backend = Plan.make(model, Full()), Counted()
    given = torch.compile(model, backend=backend)
    model.k.weight.register_hook(lambda g: 3 * g)
    handle = model.register_forward_hook(lambda m, args, y: y.flip(0))
    for hooked in (True, False):
        if not hooked:
            handle.remove()
        truth = autograd_rows(model, lambda b: squares(model, x)[b], plan, len(x))
        with quiet(), capture(given, plan) as tap:
            assert_exact(tap.rows(squares(given, x)), truth)
    assert backend.ran == 0


def test_sizes_without_end():
    """More graphs than torch.compile makes: the model is captured as written from there on."""
    model = Net(COMPILED["plain"]).double()
    plan, backend = Plan.make(model, Full()), Counted()
    given = torch.compile(model, backend=backend, dynamic=False)
    for T in range(2, 13):
        x = torch.randn(3, T, 3, dtype=torch.float64)
        with quiet(), capture(given, plan) as tap:
            rows = tap.rows(squares(given, x))
        with capture(model, plan) as tap:
            torch.testing.assert_close(rows, tap.rows(squares(model, x)))
    assert backend.ran == backend.compiled == torch._dynamo.config.recompile_limit


def test_an_error_of_the_model_is_its_own():
    model, (x, *_) = Net(COMPILED["plain"]).double(), data()
    plan, backend = Plan.make(model, Full()), Counted()
    given = torch.compile(model, backend=backend)
    with capture(given, plan) as tap:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            given(x[..., :2])
        tap.rows(squares(given, x))
    assert backend.ran == 1


def test_two_models_in_captures_at_once():
    one, other = (Net(COMPILED["plain"]).double() for _ in range(2))
    (x, *_), plan = data(), Plan.make(one, Full())
    given = [torch.compile(m, backend=Counted()) for m in (one, other)]
    truths = [autograd_rows(m, lambda b, m=m: squares(m, x)[b], plan, len(x)) for m in (one, other)]
    with capture(given[0], plan) as first, capture(given[1], plan) as second:
        losses = [squares(m, x) for m in given]
        for tap, some, truth in zip((first, second), losses, truths, strict=True):
            assert_exact(tap.rows(some), truth)


def test_a_model_is_freed():
    model, (x, *_) = Net(COMPILED["plain"]).double(), data()
    plan, given = Plan.make(model, Full()), torch.compile(model, backend=Counted())
    with capture(given, plan) as tap:
        tap.rows(squares(given, x))
    alive = weakref.ref(model)
    del model, given, tap
    torch._dynamo.reset()
    gc.collect()
    assert alive() is None
