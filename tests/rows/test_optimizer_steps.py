"""Rows of updates that `collect` makes under any plan, against steps of torch's own optimizers.

The steps are taken on one example at a time in float64, and projected by a dense matrix.
"""

import copy
import math

import numpy as np
import pytest
import torch
from optimizer_cases import OPTIMIZERS, loss_fn, steps, trained
from torch import nn

import dropinf
from dropinf import Dropout, Plan, RowStore, Sketch, optimizer_updates
from dropinf.compression import Kron, SignedSums
from dropinf.rows import Collection

MAPPED = [
    Sketch(r=9),  # of all coordinates: a layer's weight and bias share an entry
    Sketch(r=5, s=2, seed=1),
    Sketch(r=1, s=1),  # a parameter has none
    dropinf.Gaussian(r=7),
    dropinf.Rademacher(r=7),
    dropinf.SJLT(r=7, s=2),
    dropinf.FJLT(r=7),
    dropinf.LoGra(r=9),
    dropinf.LoGra(r=1),  # of a layer, not of each parameter
]


def gather(model, data, plan, size=4, **options):
    batches = list(zip(data[0].split(size), data[1].split(size), strict=True))
    return dropinf.collect(model, batches, loss_fn, plan, progress=False, **options)


def matrix(plan):
    """[P, R]: what a plan makes of each coordinate, parameters one after the other."""
    parts = []
    for block in plan.blocks:
        first = 0  # of the parameter in its layer
        for slot in block.slots:
            P = math.prod(slot.shape)
            own = np.zeros((P, plan.width))
            if isinstance(slot.entry_map, SignedSums):
                scale = np.broadcast_to(np.asarray(slot.scale), len(slot.index))
                for c, j in enumerate(slot.index.tolist()):
                    k = slot.offset + int(slot.entry_map.entry[c])
                    own[j, k] += int(slot.entry_map.sign[c]) * scale[c]
            else:
                projection = slot.entry_map.projection
                if isinstance(projection, Kron):
                    whole = np.kron(projection.A.double(), projection.B.double())
                else:
                    whole = projection.project(torch.eye(projection.P).double()).numpy()
                start = 0 if projection.P == P else first
                own[:, slot.entries] = whole[start : start + P]
            parts.append(own)
            first += P
    return np.concatenate(parts)


def projected(model, optimizer, data, plan):
    """[n, R] the steps of all parameters, through the plan's matrix."""
    taken = steps(model, optimizer, data)
    whole = torch.cat([taken[slot.name].flatten(1) for slot in plan.slots], 1)
    return whole.numpy() @ matrix(plan)


def assert_close(found, truth, of=1e-9):
    truth = torch.as_tensor(truth)
    torch.testing.assert_close(found, truth, rtol=0, atol=of * truth.abs().max().item())


@pytest.mark.parametrize(
    "kind, compression",
    [("Adam", c) for c in MAPPED]
    + [(kind, c) for c in (MAPPED[0], MAPPED[3]) for kind in list(OPTIMIZERS)[1:]],
    ids=str,
)
def test_updates_are_projected_steps(kind, compression):
    model, optimizer, data = trained(kind)
    plan = Plan.make(model, compression)
    store = gather(model, data, plan, updates=optimizer)
    assert_close(store.rows, projected(model, optimizer, data, plan))
    assert store.plan is plan and store.proof.examples and len(plan.paths) == len(plan.slots)
    assert store.weights == gather(model, data, plan).weights
    if compression == MAPPED[0]:
        assert any(slot.entry_map.shares_last for slot in plan.slots)


@pytest.mark.parametrize("piece", [1, 3, 1 << 15])
def test_weights_of_each_coordinate(monkeypatch, piece):
    """Of a draw by energy, before the signed sums; few numbers at a time too."""
    monkeypatch.setattr("dropinf.rows.optimizer_steps._PIECE", piece)
    model, optimizer, data = trained("Adam")
    energies = dropinf.energies_from_adam(optimizer, model)
    plan = Plan.make(model, Sketch(r=5, s=2, energies=energies))
    assert any(len(slot.scale.unique()) > 1 for slot in plan.slots)
    assert_close(
        gather(model, data, plan, updates=optimizer).rows, projected(model, optimizer, data, plan)
    )


@pytest.mark.parametrize("mode", ["activations", "grads"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_as_after_the_fact(kind, mode):
    model, optimizer, data = trained(kind)
    plan = Plan.make(model, Dropout(r=9))
    store = gather(model, data, plan, mode=mode, updates=optimizer, size=1 + 3 * (mode[0] == "a"))
    after = optimizer_updates(gather(model, data, plan), optimizer, model)
    assert_close(store.rows, after.rows, 1e-12)
    assert store.updates == after.updates and store.updates.startswith(type(optimizer).__name__)
    assert torch.equal(store.ids, after.ids) and gather(model, data, plan).updates is None
    assert len(RowStore.join([store[[0]], after[[1]]])) == 2


@pytest.mark.parametrize(
    "options", [{"fused": True}, {"foreach": True}, {"amsgrad": True}], ids=str
)
@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_implementations_of_adam(kind, options):
    model, optimizer, data = trained(kind, **options)
    plan = Plan.make(model, Sketch(r=9))
    store = gather(model, data, plan, updates=optimizer)
    assert_close(store.rows, projected(model, optimizer, data, plan))
    for group in optimizer.param_groups:  # as with capturable=True
        group["betas"] = tuple(torch.tensor(β, dtype=torch.float64) for β in group["betas"])
    again = gather(model, data, plan, updates=optimizer)
    assert torch.equal(again.rows, store.rows) and again.updates == store.updates


@pytest.mark.parametrize("compression", [Dropout(r=9), Sketch(r=9), dropinf.Gaussian(r=7)], ids=str)
def test_invalid_examples_are_zeros(compression):
    model, optimizer, data = trained("AdamW")
    plan = Plan.make(model, compression)
    whole = gather(model, data, plan, updates=optimizer)
    data[0][5, 1] = torch.nan
    store = gather(model, data, plan, updates=optimizer, on_nonfinite="skip")
    good = torch.arange(9) != 5
    assert torch.equal(store.valid, good) and not store.rows[5].any()
    assert_close(store.rows[good], whole.rows[good], 1e-12)
    with pytest.raises(ValueError, match="the loss of example 5"):
        gather(model, data, plan, updates=optimizer)


@pytest.mark.parametrize("dtype, of", [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_kept_dtypes(dtype, of, tmp_path):
    model, optimizer, data = trained("Adam")
    plan = Plan.make(model, Sketch(r=9))
    whole = gather(model, data, plan, updates=optimizer)
    store = gather(model, data, plan, path=tmp_path / "rows", dtype=dtype, updates=optimizer)
    assert store.dtype == dtype and store.updates == whole.updates
    assert_close(store.rows.double(), whole.rows, of)
    single = copy.deepcopy(model).float()
    own = torch.optim.Adam(single.parameters())
    own.load_state_dict(optimizer.state_dict())
    found = gather(single, tuple(t.float() for t in data), plan, updates=own)
    assert found.dtype == torch.float32
    assert_close(found.rows.double(), whole.rows, 1e-6)


def test_resume(tmp_path):
    model, optimizer, data = trained("Adam")
    plan = Plan.make(model, Sketch(r=9))
    whole = gather(model, data, plan, updates=optimizer)

    def stops(model, batch):
        if torch.equal(batch[0], data[0][8:]):
            raise KeyboardInterrupt
        return loss_fn(model, batch)

    batches = list(zip(data[0].split(4), data[1].split(4), strict=True))
    with pytest.warns(UserWarning, match="first 8 rows"), pytest.raises(KeyboardInterrupt):
        dropinf.collect(
            model, batches, stops, plan, tmp_path / "rows", progress=False, updates=optimizer
        )

    def go_on(updates):
        return gather(model, data, plan, path=tmp_path / "rows", resume=True, updates=updates)

    moved, wider = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    moved["state"][3]["exp_avg"] += 1
    wider["param_groups"][0]["eps"] *= 2
    for state in (moved, wider):
        other = torch.optim.Adam(model.parameters())
        other.load_state_dict(state)
        with pytest.raises(ValueError, match=r"with updates='Adam, [0-9a-f]{16}', not 'Adam, "):
            go_on(other)
    with pytest.raises(ValueError, match=r"with updates='Adam, [0-9a-f]{16}', not None"):
        go_on(None)
    same = torch.optim.Adam(model.parameters())
    same.load_state_dict(optimizer.state_dict())
    same.param_groups[0]["lr"] = 7.0  # which no row depends on
    store = go_on(same)
    assert torch.equal(store.rows, whole.rows) and store.updates == whole.updates


def test_the_state_is_that_of_the_beginning():
    model, optimizer, data = trained("Adam")
    plan = Plan.make(model, Dropout(r=9))
    whole = gather(model, data, plan, updates=optimizer)

    def changes(model, batch):
        for p in model.parameters():
            optimizer.state[p]["exp_avg"].add_(1)
        return loss_fn(model, batch)

    changed = dropinf.collect(model, [data], changes, plan, progress=False, updates=optimizer)
    assert_close(changed.rows, whole.rows, 1e-12)


def test_updates_are_no_gradients():
    model, optimizer, data = trained("Adam")
    for compression in (Dropout(r=9), Sketch(r=9)):
        plan = Plan.make(model, compression)
        store, updates = gather(model, data, plan), gather(model, data, plan, updates=optimizer)
        with pytest.raises(ValueError, match="optimizer_updates: the rows are updates already"):
            optimizer_updates(updates, optimizer, model)
        with pytest.raises(ValueError, match=r"join: store 1 has other updates .*'Adam, "):
            RowStore.join([store, updates])
    after = optimizer_updates(gather(model, data, Plan.make(model, Dropout(r=9))), optimizer, model)
    with pytest.raises(ValueError, match="the rows are updates already"):
        optimizer_updates(after, optimizer, model)


def test_refuses():
    model, optimizer, data = trained("Adam")
    plan = Plan.make(model, Sketch(r=9))
    for given, said in (
        (torch.optim.RMSprop(model.parameters()), "RMSprop is not known"),
        ("Adam", "str is not known"),
        (torch.optim.Adam(model.parameters()), "has no 'exp_avg' of '0.weight'"),
    ):
        with pytest.raises(ValueError, match=f"^collect: .*{said}"):
            gather(model, data, plan, updates=given)
    with pytest.raises(ValueError, match=r"go with rows of examples.*per='token'"):
        gather(model, data, plan, updates=optimizer, per="token")
    with pytest.raises(ValueError, match="changes while it trains; collect after training"):
        Collection(model, loss_fn, plan, trained=True, updates=optimizer)
    first = next(model.parameters())
    state, group = optimizer.state[first], optimizer.param_groups[0]
    ((key, moments),) = ((k, v.clone()) for k, v in state.items() if k == "exp_avg_sq")
    state[key][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"collect: 'exp_avg_sq' of '0.weight' is not finite"):
        gather(model, data, plan, updates=optimizer)
    state[key] = moments
    group["eps"], group["weight_decay"] = 0.0, 0.0
    state["exp_avg"].zero_(), state["exp_avg_sq"].zero_()
    data[0][2] = 0.0  # without a gradient of the first weight
    with pytest.raises(ValueError, match=r"the update of example 2 .* is not finite.*give its gro"):
        gather(model, data, plan, updates=optimizer)
    group["amsgrad"] = True
    with pytest.raises(ValueError, match=r"has no 'max_exp_avg_sq' of '0.weight'"):
        gather(model, data, plan, updates=optimizer)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("zero", [0, torch.tensor(0.0)], ids=str)
def test_no_step_yet(zero, linear):
    """As of a state that was made by hand."""
    model, optimizer, data = trained("Adam")
    store = gather(model, data, Plan.make(model, Dropout(r=9)))
    for p in model.parameters():
        optimizer.state[p]["step"] = zero
    with pytest.raises(ValueError, match=r"has taken 0 steps of '0.weight', so that it has no mom"):
        optimizer_updates(store, optimizer, model, linear=linear)


def test_a_parameter_without_gradient():
    """Its first moment moves it: a gradient of zeros, as after the fact."""
    model, optimizer, data = trained("Adam")

    def first(model, batch):
        return model[0](batch[0]).square().sum(1)

    plan = Plan.make(model, Dropout(r=9))
    with pytest.warns(UserWarning, match="'2.bias'.; their entries are steps of no gradient"):
        store = dropinf.collect(model, [data], first, plan, progress=False, updates=optimizer)
    with pytest.warns(UserWarning, match="their entries are zeros"):
        rows = dropinf.collect(model, [data], first, plan, progress=False)
    assert_close(store.rows, optimizer_updates(rows, optimizer, model).rows, 1e-12)
    assert isinstance(model[2], nn.Linear) and store.rows[:, plan.slots[2].entries].any()
