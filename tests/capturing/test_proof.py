"""The proof: collect and verify compare rows with plain autograd, and find what is wrong."""

import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import CASES, Flipping, Transformer, build, cross_entropy, squares
from torch import nn

import dropinf
from dropinf import Dropout, Full, Plan, ProofError, RowStore, collect, verify
from dropinf.capturing import alignment, keeping, owner_rules, proof
from dropinf.capturing.entries import Entries
from dropinf.capturing.rowmap import RowMap
from dropinf.rows.batches import Batches
from dropinf.rows.checks import Checks

case_of = {case.name: case for case in CASES}
COMPRESSIONS = [
    Dropout(r=30),
    Full(),
    dropinf.Sketch(r=20),
    dropinf.LoGra(r=16),
    dropinf.Gaussian(r=16),
]


def transformer(dtype=torch.float64, n=5):
    case = case_of["transformer"]
    model, (ids,) = build(case, dtype)
    return model, [(ids[:n],)], case.loss_fn


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_right_rows_are_proved(case, dtype):
    """In train mode too, whose dropout is that of the pass; buffers and random states stay."""
    model, batch = build(case, dtype)
    model.train()

    def loss_fn(model, batch):
        return case.loss_fn(model, batch).to(torch.promote_types(dtype, torch.float32))

    plan = Plan.make(model, Dropout(r=30))
    before = [b.clone() for b in model.buffers()]
    found = verify(model, batch, loss_fn, plan, example=1)
    assert found.examples == 1 and len(found.layers) > 0.5 * len(plan.blocks)
    assert found.largest <= {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=str)
def test_every_compression(compression):
    model, (batch,), loss_fn = transformer()
    found = verify(model, batch, loss_fn, Plan.make(model, compression))
    assert found.examples == 1 and found.largest < 1e-10


class Kernel(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(Flipping.apply(self.first(x))))


@pytest.fixture
def declared():
    dropinf.keeps_examples(Flipping)
    yield
    keeping._KNOWN.discard(f"{Flipping.__module__}.{Flipping.__qualname__}")


@pytest.mark.filterwarnings("ignore:rows. a backward pass")
def test_a_declaration_that_is_not_true(declared):
    model, batch = Kernel().double(), (torch.randn(6, 5).double(), torch.randint(3, (6,)))
    plan = Plan.make(model, Full())
    for example in (0, 5):  # whose loss reaches a later row, and an earlier one
        with pytest.raises(ProofError, match=r"loss of example \d alone .*'first'.*mode='grads'"):
            verify(model, batch, cross_entropy, plan, example=example)
    with pytest.raises(ProofError, match="'first'"):
        collect(model, [batch] * 3, cross_entropy, plan, progress=False)


@torch.library.custom_op("dropinf_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


doubled.register_autograd(lambda ctx, dy: 2 * dy)


@pytest.mark.parametrize(
    "declare",
    [
        lambda: dropinf.keeps_examples(doubled),
        lambda: dropinf.keeps_examples(torch.ops.dropinf_tests.doubled),
        lambda: dropinf.keeps_examples(torch.ops.dropinf_tests.doubled.default),
    ],
    ids=["as defined", "by name", "an overload"],
)
def test_a_declared_op(declare, monkeypatch):
    monkeypatch.setattr(keeping, "_KNOWN_OPS", set())
    declare()
    model = nn.Linear(5, 4)
    plan = Plan.make(model, Full())
    with dropinf.capture(model, plan) as tap:
        tap.rows(doubled(model(torch.randn(6, 5))).square().sum(1))
    assert set(plan.paths.values()) == {"closed form"}


def test_an_undeclared_kernel_is_taken_by_passes():
    model, batch = Kernel().double(), (torch.randn(6, 5).double(), torch.randint(3, (6,)))
    with pytest.warns(UserWarning, match=r"6 losses, for first.weight \(Flipping, which is not"):
        found = verify(model, batch, cross_entropy, Plan.make(model, Full()))
    assert found.layers == {"first", "last"}


def plant(monkeypatch, what):
    """A fault in one rule or step."""
    if what == "a rule of the table":  # softmax, as if it kept the batch in whatever dimension
        monkeypatch.setitem(alignment.RULES, "Flip", lambda call, out: [out])
    elif what == "a token is lost":
        split = RowMap.split
        monkeypatch.setattr(
            RowMap,
            "split",
            lambda *args: ((rows, x[:, 1:], dy[:, 1:]) for rows, x, dy in split(*args)),
        )
    elif what == "a scale":
        sample = Entries.sample
        monkeypatch.setattr(
            Entries,
            "sample",
            lambda self, form, targets, x, dy, owners: sample(
                self, form, targets, x, dy * 1.01, owners
            ),
        )
    else:  # what a parameter gets by itself is counted twice
        add = Entries.add_gradient

        def twice(*args):
            add(*args)
            add(*args)

        monkeypatch.setattr(Entries, "add_gradient", twice)


class Reversed(nn.Module):
    """Goes through the batch in the other order, and has a parameter that meets all of it."""

    def __init__(self):
        super().__init__()
        self.body, self.scale = Transformer(), nn.Parameter(torch.ones(23))

    def forward(self, ids):
        return torch.einsum("btv,v->btv", self.body(ids.flip(0)).flip(0), self.scale)


@pytest.mark.filterwarnings("ignore:rows. a backward pass", "ignore:collect")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "what", ["a rule of the table", "a token is lost", "a scale", "a leaf is counted twice"]
)
def test_a_planted_fault_is_found(what, dtype, monkeypatch):
    case = case_of["transformer"]._replace(model=lambda: Reversed().eval())
    model, batch = build(case, dtype)

    def loss_fn(model, batch):
        return case.loss_fn(model, batch).to(torch.promote_types(dtype, torch.float32))

    plan = Plan.make(model, Dropout(r=40))
    assert verify(model, batch, loss_fn, plan).examples == 1
    plant(monkeypatch, what)
    plan = Plan.make(model, Dropout(r=40))  # of which nothing is known yet
    if what == "a scale" and dtype == torch.bfloat16:
        return  # 1 % is bfloat16's own rounding
    with pytest.raises(ProofError, match=r"(?s)layer '.*path: "):
        collect(model, [batch] * 3, loss_fn, plan, progress=False)


def test_the_plain_pass_shares_no_code_with_the_rows(monkeypatch):
    """It would not see a fault in what it is made of."""
    for module, names in ((Entries, ("sample", "pull", "add")), (owner_rules, ("elementwise",))):
        for name in names:
            monkeypatch.setattr(module, name, None)
    model, (batch,), loss_fn = transformer()
    plan = Plan.make(model, Full())
    losses, (row,) = proof.plain_rows(model, plan, lambda: loss_fn(model, batch), 2, [1.0])
    grads = torch.autograd.grad(loss_fn(model, batch)[2], list(model.parameters()))
    named = dict(zip((n for n, _ in model.named_parameters()), grads, strict=True))
    right = torch.cat([named[s.name].flatten()[s.index] * s.scale for s in plan.slots])
    assert torch.equal(row, right) and torch.equal(losses, loss_fn(model, batch).detach())


def test_a_fault_in_a_small_layer():
    """Of a thousandth of the gradient: what is off is measured by the layer, not by all of it."""
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    plan = Plan.make(model, Full())
    plain = torch.tensor([1e3] * 3 + [1.0] * 2)
    row = plain * torch.tensor([1.0] * 3 + [1.005] * 2)
    with pytest.raises(ProofError, match="layer '1' are not"):
        proof.compare(plan, row, plain, 1e-6, proof.Proof(), {})


# When collect compares.


def test_batches_that_are_compared(monkeypatch):
    """The first and powers of two: 6 of 100 batches, at some 1.9 batches each, 13 of 10,000."""
    seen = [n for n in range(100) if Checks._is_due(fake(all_layers=True), n)]
    assert seen == [0, 4, 8, 16, 32, 64]
    assert sum(Checks._is_due(fake(all_layers=True), n) for n in range(10_000)) == 13
    checks, due = fake(all_layers=False), 0
    for n in range(10_000):
        if Checks._is_due(checks, n):
            due += 1
            checks.proof.examples += 1
    assert 13 < due <= 0.01 * 10_000 / 1.5 + 1


@pytest.mark.parametrize("world_size", range(1, 6))
def test_batches_that_ranks_compare(world_size):
    """Beyond the first of each rank no more of them all than of one process, and on all in turn."""
    few = range(1000)
    ranks = [fake(True, rank, world_size) for rank in range(world_size)]
    seen = [[n for n in few if Checks._is_due(checks, n)] for checks in ranks]
    assert all(numbers[0] == 0 for numbers in seen)
    counts = [len(numbers) - 1 for numbers in seen]
    assert max(counts) - min(counts) <= 1
    powers = [e for e in range(2, 14) if -(-(2**e) // world_size) < 1000]
    assert sum(counts) == len(powers)


class fake:
    def __init__(self, all_layers, rank=0, world_size=1):
        self._rank, self._size = rank, world_size
        self.proof = proof.Proof(layers={"a", "b"} if all_layers else {"a"})
        self._batches = type("B", (), {"plan": type("P", (), {"blocks": [1, 2]})})


def test_the_store_says_what_was_compared(tmp_path):
    model, batches, loss_fn = transformer()
    plan = Plan.make(model, Dropout(r=20))
    store = collect(model, batches * 5, loss_fn, plan, path=tmp_path / "rows", progress=False)
    for found in (store, RowStore.load(tmp_path / "rows")):
        assert found.proof.examples == 2  # batches 0 and 4
        assert found.proof.layers == {block.name for block in plan.blocks}
        assert 0 < found.proof.largest < 1e-12
        assert "compared with autograd on 2 examples, " in repr(found)
    plain = collect(model, batches, loss_fn, plan, progress=False, check=False)
    assert plain.proof.examples == 0 and "not compared with autograd" in repr(plain)
    assert torch.equal(plain.rows, store.rows[:5])


def test_tokens():
    """The sum of an example's rows is its gradient."""
    model, batches, loss_fn = transformer()
    plan = Plan.make(model, Dropout(r=20))
    store = collect(model, batches * 5, loss_fn, plan, per="token", progress=False)
    assert store.proof.examples == 2 and store.proof.largest < 1e-12


def test_random_losses_are_said_not_to_be_compared():
    """Random by a generator of its own, which nobody can put back."""
    generator = torch.Generator()

    def loss_fn(model, batch):
        noise = torch.rand(len(batch[0]), generator=generator)
        return squares(model, batch) * (1 + noise)

    model, batch = nn.Linear(5, 3), (torch.randn(4, 5),)
    with pytest.warns(UserWarning, match="gives other losses in a second call"):
        store = collect(model, [batch], loss_fn, Plan.make(model, Full()), progress=False)
    assert store.proof.examples == 0


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: float(torch.rand(()))])
def test_random_states_are_put_back(draw):
    """A loss that draws has the same draws again, and what comes after draws as without a proof."""

    def loss_fn(model, batch):
        return squares(model, batch) * (1 + draw())

    model, batch = nn.Linear(5, 3), (torch.randn(4, 5),)
    plan = Plan.make(model, Full())
    after = []
    for check in (True, False):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is random, so that examples may be mixed
            rows = collect(model, [batch[:1]] * 1, loss_fn, plan, progress=False, check=False)
            verify(model, batch, loss_fn, plan) if check else loss_fn(model, batch)
        after.append((rows.rows, draw()))
    assert torch.equal(after[0][0], after[1][0]) and after[0][1] == after[1][1]


def test_what_a_second_pass_draws_is_put_back():
    """Also where it draws more than the first, and moves buffers further."""
    model = nn.BatchNorm1d(1)
    before = proof.Snapshot(model)
    model.running_mean += 1
    with before.again():
        assert model.running_mean == 0
        first = draws()
        model.running_mean -= 1
    assert model.running_mean == 1 and draws() == first


def draws():
    return random.random(), np.random.rand(), float(torch.rand(()))


def test_batch_norm_keeps_its_statistics():
    """In train mode a second forward pass would move them."""
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).train()
    batch = (torch.randn(6, 5), torch.randint(3, (6,)))
    plan = Plan.make(model, Full())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert verify(model, batch, cross_entropy, plan).examples == 1
        assert int(model[1].num_batches_tracked) == 1
        assert collect(model, [batch], cross_entropy, plan, progress=False).proof.examples == 1
    assert int(model[1].num_batches_tracked) == 2


def test_a_loss_that_is_not_finite_is_not_compared():
    model = nn.Linear(5, 3)
    plan = Plan.make(model, Full())
    batch = (torch.randn(4, 5), torch.randint(3, (4,)))
    batch[0][::2] = torch.nan
    options = {"progress": False, "on_nonfinite": "skip"}
    for good in ([False, True, False, True], [False] * 4):
        # Plain autograd itself multiplies the other examples' NaN by zero.
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            store = collect(model, [batch], cross_entropy, plan, **options)
        assert store.valid.tolist() == good and store.proof.examples == 0
        batch[0][:] = torch.nan


def test_examples_of_a_loss_that_is_not_finite_are_not_compared():
    """Their rows are zeros, and autograd's are not."""
    model, x = nn.Linear(5, 3), torch.randn(4, 5)
    bad = torch.tensor([0.0, torch.inf, torch.inf, torch.inf])
    store = collect(
        model,
        [(x,)],
        lambda model, batch: squares(model, batch) + bad,
        Plan.make(model, Full()),
        progress=False,
        on_nonfinite="skip",
    )
    assert store.valid.tolist() == [True, False, False, False] and store.proof.examples == 1


@pytest.mark.parametrize("other", [0, 2])
def test_a_row_that_another_loss_reaches(other):
    plan = Plan.make(nn.Linear(1, 1), Full())
    rows = torch.zeros(3, 2)
    rows[[1, other]] = 1.0
    tap = SimpleNamespace(plan=plan, rows=lambda losses, loss_scale: rows)
    with pytest.raises(ProofError, match=f"example 1 alone reaches row {other}"):
        proof.alone_in_its_row(tap, torch.ones(3), rows, 1)


def test_bad_examples():
    model, (batch,), loss_fn = transformer()
    with pytest.raises(ValueError, match="example 5 is not in a batch of 5"):
        verify(model, batch, loss_fn, Plan.make(model, Full()), example=5)


# Examples run singly where passes cost more.


class Slow(nn.Module):
    """A parameter without a rule under a deep body, so that a pass for each loss is dear."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))
        self.body = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))

    def forward(self, x):
        return self.body(torch.einsum("bi,i->bi", x, self.scale))


@pytest.mark.parametrize("mixing", [False, True])
def test_examples_run_singly_where_that_is_cheaper(mixing):
    torch.manual_seed(0)
    model, sizes = Slow().double(), []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    batches = [(torch.randn(12, 64).double(),) for _ in range(5)] + [(torch.randn(7, 64).double(),)]

    def loss_fn(model, batch):
        y = model(*batch)
        return (y - y.mean(0) if mixing else y).square().sum(1)

    plan = Plan.make(model, Dropout(r=50))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        store = collect(model, batches, loss_fn, plan, progress=False)
    plain = collect(model, batches, loss_fn, plan, mode="grads", check=False, progress=False)
    torch.testing.assert_close(store.rows, plain.rows, rtol=1e-10, atol=1e-10)
    told = " ".join(str(w.message) for w in said)
    assert "backward pass for each of the 12 losses" in told
    assert ("times the time of examples run singly" in told) == (not mixing)
    singly = sizes.count(1)
    assert singly < 6 if mixing else singly >= 12  # of the check alone, or of batches too


@pytest.mark.parametrize("alone", [1.0, 2.0])
def test_examples_run_singly_if_that_took_less(alone):
    batches = SimpleNamespace(
        places=[0],
        batch_dim=0,
        per="example",
        keep_graph=False,
        tap=SimpleNamespace(sharded=False),
        _said=True,
        _seconds={True: alone, False: 1.5},
    )
    singly = Batches._singly(batches, (torch.randn(3, 2),))
    assert singly is None if alone > 1.5 else [len(one[0]) for one in singly] == [1, 1, 1]


def test_gradients_of_parameters_in_the_loss():
    """collect takes the batch again with all left to autograd, and goes on so."""

    def meta(model, batch):
        losses = []
        for x in batch[0]:
            inner = model(x).square().sum()
            grads = torch.autograd.grad(inner, list(model.parameters()), create_graph=True)
            fast = {
                n: p - 0.1 * g for (n, p), g in zip(model.named_parameters(), grads, strict=True)
            }
            losses.append(torch.func.functional_call(model, fast, (x,)).sum())
        return torch.stack(losses)

    model, batch = nn.Linear(4, 3).double(), (torch.randn(5, 4).double(),)
    plan = Plan.make(model, Full())
    with pytest.warns(UserWarning, match=r"gradient of '\w+' itself.*from here on"):
        rows = collect(model, [batch, batch], meta, plan, progress=False).rows
    with dropinf.capture(model, plan, closed=False) as tap:
        assert torch.equal(tap.rows(meta(model, batch)), rows[:5])
    right = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(one, list(model.parameters()),
                                                                retain_graph=True)])
            for one in meta(model, batch)
        ]
    )  # fmt: skip
    torch.testing.assert_close(rows[5:], right)
