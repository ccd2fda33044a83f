"""Updates of rows against steps of torch's own optimizers, one example at a time, in float64."""

import copy

import numpy as np
import pytest
import torch
from optimizer_cases import LR, OPTIMIZERS, loss_fn, steps, trained
from torch import nn

import dropinf
from dropinf import Dropout, FactoredDropout, Full, Gaussian, Sketch, optimizer_updates
from dropinf.solvers import Cholesky, Identity


def kept(steps, plan):
    """At the plan's coordinates and scale."""
    return torch.cat([steps[s.name].flatten(1)[:, s.index] * s.scale for s in plan.slots], 1)


def collect(model, data, plan):
    return dropinf.collect(model, [data], loss_fn, plan, progress=False)


@pytest.mark.parametrize("compression", [Dropout(r=9), FactoredDropout(r=9), Full()], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_updates_are_steps(kind, compression):
    model, optimizer, data = trained(kind)
    plan = dropinf.Plan.make(model, compression)
    store = collect(model, data, plan)
    updates = optimizer_updates(store, optimizer, model)
    truth = kept(steps(model, optimizer, data), plan)
    torch.testing.assert_close(updates.rows, truth, rtol=0, atol=1e-9 * truth.abs().max().item())
    assert updates.plan is plan and updates.weights == store.weights
    found = dropinf.scores(store, updates, Identity().fit(updates))
    torch.testing.assert_close(found, store.rows @ truth.T, rtol=0, atol=1e-8 * found.abs().max())


@pytest.mark.parametrize("kind", ["Adam", "Adam, few steps", "momentum"])
def test_linear(kind):
    """The step of a gradient that m and v do not notice: the rise of θ' with it, over lr."""
    model, optimizer, data = trained(kind)
    plan = dropinf.Plan.make(model, Full())
    store = collect(model, data, plan)
    updates = optimizer_updates(store, optimizer, model, linear=True)
    if kind == "momentum":
        assert torch.equal(updates.rows, store.rows)
        return
    β2, eps = optimizer.param_groups[0]["betas"][1], optimizer.param_groups[0]["eps"]
    key = "max_exp_avg_sq" if "few" in kind else "exp_avg_sq"
    v = torch.cat([optimizer.state[p][key].flatten() for p in model.parameters()]).numpy()
    truth = store.rows.numpy() / (np.sqrt(v / (1 - β2**6)) + eps)
    np.testing.assert_allclose(updates.rows, truth, rtol=1e-12)


def test_invalid_rows_and_kept_dtypes():
    """Rows are as many, with their ids; an invalid one stays zeros; Accelerate's is taken."""
    model, optimizer, data = trained("AdamW")
    plan = dropinf.Plan.make(model, Dropout(r=9))
    store = collect(model, data, plan)
    valid = torch.ones(9, dtype=torch.bool)
    valid[3] = False
    ids = [f"text {i}" for i in range(9)]
    marked = dropinf.RowStore(store.rows.float(), plan, valid, ids=ids, dtype=torch.float16)
    wrapped = type("AcceleratedOptimizer", (), {"optimizer": optimizer})()
    updates = optimizer_updates(marked, wrapped, model)
    assert updates.ids == ids and torch.equal(updates.valid, valid)
    assert not updates.rows[3].any() and updates.rows.dtype == torch.float32
    truth = optimizer_updates(store, optimizer, model).rows[valid].float()
    torch.testing.assert_close(updates.rows[valid], truth, rtol=0, atol=1e-2)


def test_refuses():
    model, optimizer, data = trained("Adam")
    store = collect(model, data, dropinf.Plan.make(model, Dropout(r=9)))
    parameters = list(model.parameters())
    sharded = copy.deepcopy(optimizer)
    sharded.param_groups[0]["params"] = parameters
    sharded.state = {
        p: {**optimizer.state[p], "exp_avg": optimizer.state[p]["exp_avg"].flatten()[:2]}
        for p in parameters
    }
    heavy = torch.optim.SGD(parameters, lr=LR, momentum=0.9)
    for given, said in (
        (torch.optim.RMSprop(parameters), "RMSprop is not known; Adam, AdamW and SGD of torch"),
        (torch.optim.Adam(parameters), "has no 'exp_avg' of '0.weight'; give it as it is after"),
        (heavy, "has no 'momentum_buffer' of '0.weight'"),
        (torch.optim.SGD(parameters, lr=LR, maximize=True), "maximize=True; give losses to min"),
        (torch.optim.Adam(parameters[1:]), "does not have '0.weight'; give the one that trained"),
        (sharded, "'0.weight' or its state is sharded; gather the whole state"),
    ):
        with pytest.raises(ValueError, match=f"optimizer_updates: .*{said}"):
            optimizer_updates(store, given, model)
    for other in (nn.Linear(5, 6), nn.Sequential(nn.Linear(4, 6))):
        with pytest.raises(ValueError, match=r"has no parameter '0.weight' of shape \[6, 5\]"):
            optimizer_updates(store, optimizer, other)
    for compression in (Sketch(r=9), Gaussian(r=9), dropinf.LoGra(r=9)):
        mixed = collect(model, data, dropinf.Plan.make(model, compression))
        with pytest.raises(ValueError, match=r"is made of several coordinates.*under Dropout"):
            optimizer_updates(mixed, optimizer, model)


def test_updates_are_no_queries():
    """Their products are no change of a loss; and an attribution says what its rows are."""
    model, optimizer, data = trained("AdamW")
    store = collect(model, data, dropinf.Plan.make(model, Dropout(r=9)))
    updates = optimizer_updates(store, optimizer, model)
    for solver, said in (
        (Identity(), "product of the query's gradient and the step that the optimizer"),
        (Identity(cosine=True), "cosine of the query's gradient and the step"),
        (dropinf.solvers.Cholesky(), "the example's, preconditioned by the solver"),
    ):
        solver.fit(updates)
        for call in (dropinf.scores, dropinf.topk, dropinf.attribute):
            with pytest.raises(
                ValueError, match=r"the queries are updates \(of AdamW, .*without up"
            ):
                call(updates, updates, solver, **({} if call is dropinf.scores else {"k": 2}))
        assert said in dropinf.attribute(store, updates, solver, 2).facts.unit
        assert len(dropinf.self_influence(updates, solver)) == 9


def test_rows_of_other_weights_are_refused():
    model, optimizer, data = trained("AdamW")
    store = collect(model, data, dropinf.Plan.make(model, Dropout(r=9)))
    truth = optimizer_updates(store, optimizer, model).rows
    with torch.no_grad():
        model[2].bias += 1
    with pytest.raises(ValueError, match="optimizer_updates: the rows were made with weights"):
        optimizer_updates(store, optimizer, model)
    assert torch.equal(optimizer_updates(store, optimizer, model, weights="any").rows, truth)
    with pytest.raises(ValueError, match="weights must be 'same' or 'any', got 'all'"):
        optimizer_updates(store, optimizer, model, weights="all")


def test_sharded_parameters_are_refused():
    """Of fully_shard: the parameter and its state are DTensors."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Linear(5, 2).double()
        plan = dropinf.Plan.make(model, Dropout(r=4))
        store = dropinf.RowStore(torch.randn(3, 8, dtype=torch.float64)[:, : plan.width], plan)
        fully_shard(model, mesh=distributed.init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.randn(3, 5).double()).sum().backward()
        optimizer.step()
        with pytest.raises(ValueError, match="'weight' or its state is sharded; gather"):
            optimizer_updates(store, optimizer, model)
    finally:
        distributed.destroy_process_group()


def test_a_solver_of_updates_refuses_gradients(tmp_path):
    """Also one that was saved; updates themselves are scored by it."""
    model, optimizer, data = trained("Adam")
    store = collect(model, data, dropinf.Plan.make(model, Dropout(r=9)))
    updates = optimizer_updates(store, optimizer, model)
    fitted = Cholesky().fit(updates)
    fitted.save(tmp_path / "solver")
    for solver in (fitted, Cholesky.load(tmp_path / "solver", updates)):
        for call in (
            lambda solver: dropinf.scores(store, store, solver),
            lambda solver: dropinf.topk(store, store, solver, 1),
            lambda solver: dropinf.self_influence(store, solver),
        ):
            with pytest.raises(ValueError, match=r"the solver was fitted on updates \(of Adam"):
                call(solver)
        assert dropinf.scores(store, updates, solver).isfinite().all()
    assert Cholesky().fit(store).updates is None
