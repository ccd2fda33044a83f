"""energies and energies_from_adam, beside gradients that plain autograd forms one by one."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, build, cross_entropy, example
from torch import nn

import dropinf
from dropinf import Dropout, Plan
from dropinf.compression import FewOfEach
from dropinf.compression.energy import sides


def mean_squares(model, batch, loss_fn, names):
    """E g^2 of each parameter as the matrix [a, b] that it is taken for, float64."""
    found = dict.fromkeys(names, 0.0)
    B = len(batch[0])
    for b in range(B):
        model.zero_grad()
        loss_fn(model, example(batch, b)).sum().backward()
        for name in names:
            grad = model.get_parameter(name).grad
            if grad is not None:
                found[name] = found[name] + grad.double().square() / B
    model.zero_grad()
    shapes = {name: sides(model.get_parameter(name).shape) for name in names}
    return {
        name: (torch.zeros(1) + value).expand(model.get_parameter(name).shape).reshape(shapes[name])
        for name, value in found.items()
    }


def assert_near(energies, name, squares, steps=1.01):
    """Rows and columns have the sums of these squares, to the levels' rounding."""
    rows, columns = energies[name]
    squares = squares.numpy()
    whole = squares.sum()
    room = 2 ** (steps / 8)
    for told, true in (
        (rows * columns.sum(), squares.sum(1)),
        (columns * rows.sum(), squares.sum(0)),
    ):
        large = true > 1e-6 * whole
        ratio = told[large] / true[large]
        assert ratio.max(initial=1) <= room and ratio.min(initial=1) >= 1 / room, (name, ratio)
        assert (told[true == 0] == 0).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_and_columns_of_plain_autograd(case, monkeypatch):
    """Looking at every coordinate, so that nothing is estimated."""
    monkeypatch.setattr("dropinf.rows.energy_pass.FewOfEach", partial(FewOfEach, each=100))
    model, batch = build(case, torch.float64)
    energies = dropinf.energies(model, [batch], case.loss_fn, examples=len(batch[0]))
    squares = mean_squares(model, batch, case.loss_fn, list(energies))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(energies)
    for name in energies:
        assert_near(energies, name, squares[name])


def test_large_parameters_are_estimated():
    """From four coordinates a column: to some 30 %, over four orders of magnitude."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 5))
    x = torch.randn(64, 300) * torch.logspace(-2, 1, 300)
    batch = x, torch.randint(5, (64,))
    energies = dropinf.energies(model, [batch], cross_entropy)
    ((weight, _), _) = FewOfEach().keep([("0", [(200, 300), (200,)]), ("2", [(5, 200)])])
    assert len(weight.index) < 0.04 * 60000
    rows, columns = energies["0.weight"]
    squares = mean_squares(model, batch, cross_entropy, ["0.weight"])["0.weight"].numpy()
    for told, true in (
        (rows * columns.sum(), squares.sum(1)),
        (columns * rows.sum(), squares.sum(0)),
    ):
        assert abs(np.log(told / true)).mean() < 0.35
        assert np.corrcoef(np.log(told), np.log(true))[0, 1] > 0.85


def test_not_of_the_batches_but_of_the_first_examples():
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    x, label = torch.randn(30, 6), torch.randint(4, (30,))
    one = dropinf.energies(model, [(x, label)], cross_entropy, examples=20)
    cut = [(x[i : i + 7], label[i : i + 7]) for i in range(0, 28, 7)]
    assert dropinf.energies(model, cut, cross_entropy, examples=20) == one
    x[20:] *= 100
    assert dropinf.energies(model, cut, cross_entropy, examples=20) == one
    x[20:] = float("nan")
    assert dropinf.energies(model, cut, cross_entropy, examples=20) == one
    asked = []

    def loader():
        for batch in cut:
            asked.append(batch)
            yield batch

    dropinf.energies(model, loader(), cross_entropy, examples=14)
    assert len(asked) == 2


def test_what_is_beyond_the_examples_does_not_count():
    """Nor is it refused."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    x, label = torch.randn(30, 6), torch.randint(4, (30,))
    of_20 = dropinf.energies(model, [(x, label)], cross_entropy, examples=20)
    x[20] = torch.nan
    assert dropinf.energies(model, [(x, label)], cross_entropy, examples=20) == of_20
    with pytest.raises(ValueError, match="of example 20 "):
        dropinf.energies(model, [(x, label)], cross_entropy, examples=21)


@pytest.mark.parametrize("examples", [1, 7, 8, 29, 30, 31])
def test_spread_over_a_data_set_in_order(examples):
    """As of data sorted by class; a loader that shuffles, or does something else, is as it is."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    x, label = torch.randn(30, 6), torch.arange(30) // 8
    data = torch.utils.data.TensorDataset(x, label)
    at = torch.arange(min(examples, 30)) * 30 // min(examples, 30)
    expected = dropinf.energies(model, [(x[at], label[at])], cross_entropy, examples=examples)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    assert dropinf.energies(model, loader, cross_entropy, examples=examples) == expected
    first = dropinf.energies(model, [data[:examples]], cross_entropy, examples=examples)
    assert (first == expected) == (examples in (1, 29, 30, 31))

    class Other(torch.utils.data.DataLoader):
        pass

    sampler = list(range(30))
    for other in (Other(data, 4), torch.utils.data.DataLoader(data, 4, sampler=sampler)):
        assert dropinf.energies(model, other, cross_entropy, examples=examples) == first

    def by(sampler):
        return torch.utils.data.DataLoader(
            data, batch_sampler=torch.utils.data.BatchSampler(sampler, 4, drop_last=False)
        )

    inside = torch.utils.data.SequentialSampler(data), range(30)  # what a loader asks is not its
    found = [dropinf.energies(model, by(s), cross_entropy, examples=examples) for s in inside]
    assert found == [expected, first]
    wrong = x.clone()
    wrong[at[-1]] = torch.nan
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(wrong, label), 4)
    with pytest.raises(ValueError, match=f"of example {at[-1]} "):
        dropinf.energies(model, loader, cross_entropy, examples=examples)


def test_a_layer_without_gradients_is_named():
    """As the A of a LoRA whose B is zero; all layers without are an error."""
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 3, bias=False))
    nn.init.zeros_(model[1].weight)
    batch = torch.randn(9, 6), torch.randint(3, (9,))
    with pytest.warns(UserWarning, match="every gradient of '0' was zero"):
        energies = dropinf.energies(model, [batch], cross_entropy)
    made = Dropout(total=12, energies=energies, allocation="energy")
    assert [block.r for block in Plan.make(model, made).blocks] == [2, 10]


def test_both_modes_and_a_model_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    model[0].bias.requires_grad_(False)
    model[2].weight.grad = torch.ones(4, 5)
    batch = torch.randn(9, 6), torch.randint(4, (9,))
    one = dropinf.energies(model, [batch], cross_entropy)
    assert one == dropinf.energies(model, [batch], cross_entropy, mode="grads")
    assert list(one) == ["0.weight", "2.weight", "2.bias"]
    assert list(dropinf.energies(model, [batch], cross_entropy, exclude="2.bias")) == list(one)[:2]
    assert torch.equal(model[2].weight.grad, torch.ones(4, 5)) and model[0].weight.grad is None
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]


def test_lora():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=30, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    adapters = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
    model = peft.get_peft_model(model, adapters).eval()
    batch = (torch.randint(30, (5, 8)),)

    def loss_fn(model, batch):
        logits = model(input_ids=batch[0]).logits[:, :-1]
        return F.cross_entropy(logits.mT, batch[0][:, 1:], reduction="none").sum(1)

    energies = dropinf.energies(model, [batch], loss_fn)
    squares = mean_squares(model, batch, loss_fn, list(energies))
    assert len(energies) == 2
    for name in energies:
        assert_near(energies, name, squares[name], steps=1.1)  # of a float32 model
    plan = Plan.make(model, Dropout(r=8, energies=energies))
    rows = dropinf.collect(model, [batch], loss_fn, plan, progress=False).rows
    assert rows.shape == (5, 16)  # and collect has compared them with plain autograd


class LoRA(nn.Module):
    """y = B A x + W x, with B = 0 at the beginning, so that no gradient of A is other than zero."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(20, 4).requires_grad_(False)
        self.A, self.B = nn.Linear(20, 3, bias=False), nn.Linear(3, 4, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x):
        return self.base(x) + self.B(self.A(x))


def test_lora_at_its_beginning(recwarn):
    model = LoRA()
    batch = torch.randn(9, 20), torch.randint(4, (9,))
    with pytest.warns(
        UserWarning, match="every gradient of 'A' was zero, .* measure after"
    ) as told:
        energies = dropinf.energies(model, [batch], cross_entropy)
    assert len(told) == 1 and told[0].filename == __file__
    by_energy = Dropout(r=6, allocation="energy", energies=energies)
    # Of 10 beyond one each: B 9 + 0.1 * 10 * 12 / 72, A 0.1 * 10 * 60 / 72 = 0.83.
    assert [block.r for block in Plan.make(model, by_energy).blocks] == [2, 10]

    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    cross_entropy(model, batch).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="energies_from_adam: every gradient of 'A' was zero"):
        dropinf.energies_from_adam(optimizer, model)
    recwarn.clear()
    after = dropinf.energies(model, [batch], cross_entropy)
    assert not recwarn.list and after["A.weight"][0].any()


def test_a_warning_names_some_layers_of_many():
    model = nn.ModuleList([nn.Linear(6, 4) for _ in range(6)])
    batch = torch.randn(9, 6), torch.randint(4, (9,))
    with pytest.warns(UserWarning, match="every gradient of '1', '2', '3' and 2 more was zero"):
        dropinf.energies(model, [batch], lambda model, batch: cross_entropy(model[0], batch))


@pytest.mark.parametrize("kind", [dropinf.Dropout, dropinf.Sketch], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_by_energy_are_exact(case, kind):
    """Both modes beside gradients of one example, at the coordinates and weights of the plan."""
    model, batch = build(case, torch.float64)
    energies = dropinf.energies(model, [batch], case.loss_fn)
    plan = Plan.make(model, kind(r=9, seed=3, energies=energies))
    assert any(isinstance(slot.scale, torch.Tensor) and len(slot.scale) for slot in plan.slots)
    truth = torch.zeros(len(batch[0]), plan.width, dtype=torch.float64)
    for b, row in enumerate(truth):
        model.zero_grad()
        case.loss_fn(model, example(batch, b)).sum().backward()
        for slot in plan.slots:
            grad = model.get_parameter(slot.name).grad
            if grad is None:
                continue
            values = grad.flatten()[slot.index] * slot.scale
            if slot.entry_map is None:
                row[slot.entries] += values
            else:
                at = slot.entry_map.entry + slot.offset
                row.index_add_(0, at, values * slot.entry_map.sign)
    model.zero_grad()
    for mode in ("activations", "grads"):
        with dropinf.capture(model, plan, mode) as tap:
            rows = tap.rows(case.loss_fn(model, batch))
        torch.testing.assert_close(rows, truth, rtol=1e-10, atol=1e-10 * truth.abs().max().item())


def linear_batch(size=8):
    torch.manual_seed(0)
    return nn.Linear(6, 4), (torch.randn(size, 6), torch.randint(4, (size,)))


def test_what_energies_refuses():
    model, (x, label) = linear_batch()
    with pytest.raises(ValueError, match="energies: the loader is empty"):
        dropinf.energies(model, [], cross_entropy)
    with pytest.raises(ValueError, match="energies: examples must be a whole number from 1, got 0"):
        dropinf.energies(model, [(x, label)], cross_entropy, examples=0)
    with pytest.raises(ValueError, match="energies: per must be 'example', got 'token'"):
        dropinf.energies(model, [(x, label)], cross_entropy, per="token")
    with pytest.raises(ValueError, match="energies: every gradient was zero"):
        dropinf.energies(model, [(x, label)], lambda m, b: 0 * cross_entropy(m, b))
    with pytest.raises(TypeError, match=r"energies: the loader must be .* got NoneType"):
        dropinf.energies(model, None, cross_entropy)
    with pytest.raises(TypeError, match="energies: a Dataset gives examples, not batches; give "):
        dropinf.energies(model, torch.utils.data.TensorDataset(x, label), cross_entropy)
    some = dropinf.energies(model, [(x, label)], cross_entropy, examples=np.int64(5))
    assert some == dropinf.energies(model, [(x, label)], cross_entropy, examples=5)
    x[5, 2] = float("nan")
    with pytest.raises(ValueError, match="energies: the loss or gradient of example 5 "):
        dropinf.energies(model, [(x[:3], label[:3]), (x[3:], label[3:])], cross_entropy)
    with pytest.raises(ValueError, match="energies: a loss or gradient among examples 0 to 7"):
        dropinf.energies(model, [(x, label)], cross_entropy, mode="grads")


# Adam.


def trained(kind=torch.optim.AdamW, steps=3, **options):
    model, (x, label) = linear_batch()
    model = nn.Sequential(model, nn.Linear(4, 4))
    optimizer = kind(model.parameters(), lr=1e-3, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model, (x, label)).mean().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    "kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam]
)
def test_of_adam(kind):
    model, optimizer = trained(kind, betas=(0.9, 0.7))
    energies = dropinf.energies_from_adam(optimizer, model)
    for name, p in model.named_parameters():
        v = optimizer.state[p]["exp_avg_sq"].double() / (1 - 0.7**3)
        assert_near(energies, name, v.reshape(sides(p.shape)))
    Plan.make(model, Dropout(r=5, energies=energies))


def test_of_adam_what_had_no_gradient_has_no_energy():
    model, optimizer = trained()
    model.append(nn.Linear(4, 4))
    optimizer.add_param_group({"params": list(model[2].parameters())})
    energies = dropinf.energies_from_adam(optimizer, model)
    assert not energies["2.weight"][0].any() and energies["1.weight"][0].all()


def test_what_energies_from_adam_refuses():
    model, optimizer = trained()
    p = model[0].weight

    class Wrapped:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    def refuses(error, match, optimizer=optimizer, model=model):
        with pytest.raises(error, match=match) as raised:
            dropinf.energies_from_adam(optimizer, model)
        assert "\n" not in str(raised.value)

    refuses(TypeError, "got SGD; measure energies", torch.optim.SGD(model.parameters()))
    refuses(TypeError, "got SGD; measure", Wrapped(torch.optim.SGD(model.parameters())))
    assert dropinf.energies_from_adam(Wrapped(optimizer), model) == dropinf.energies_from_adam(
        optimizer, model
    )
    refuses(ValueError, "no state yet", torch.optim.Adam(model.parameters()))
    refuses(
        ValueError,
        "no parameter of this model; give .* or, if it trains flattened",
        model=nn.Linear(2, 2),
    )
    good = optimizer.state[p]["exp_avg_sq"]
    for bad in (float("nan"), float("inf"), -1.0):
        optimizer.state[p]["exp_avg_sq"] = good.clone()
        optimizer.state[p]["exp_avg_sq"][1, 1] = bad
        refuses(ValueError, "exp_avg_sq of '0.weight' must be finite and not negative")
    for bad in (None, [1.0], good.to(torch.int8), good.to(torch.complex64), good.to("meta")):
        optimizer.state[p]["exp_avg_sq"] = bad
        refuses(ValueError, "exp_avg_sq of '0.weight' must be a tensor of floating-point numbers")
    optimizer.state[p]["exp_avg_sq"] = good
    for bad in (None, torch.tensor(0.0), torch.tensor(float("nan")), -2, torch.ones(2)):
        optimizer.state[p]["step"] = bad
        refuses(ValueError, "step of '0.weight' must be a number from 1, got")
    optimizer.state[p]["step"] = torch.tensor(3.0)
    for param in model.parameters():
        optimizer.state[param]["exp_avg_sq"] = torch.zeros_like(param)
    refuses(ValueError, "every gradient was zero, .*; measure where the model has something")
    optimizer.state[p]["exp_avg_sq"] = good[:2]
    refuses(ValueError, r"'0.weight' is sharded or flattened, Tensor of shape \(2, 6\)")
