"""Rows of a data set on a GPU, and what is made of them: as on the CPU, wherever they are."""

import copy

import on_gpu
import pytest
import torch
import torch.nn.functional as F
from on_gpu import DEVICE, GPU, assert_near, there
from score_cases import stores
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dropinf
from dropinf import Dropout, Plan, RowStore, evaluate, solvers

backend = on_gpu.backend  # the fixture

N, M = 46, 7  # training examples and queries


def model_of(seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 3)
    return nn.Sequential(*layers)


def data(n, seed):
    draws = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(n, 6, generator=draws), torch.randint(3, (n,), generator=draws)
    )


def loader(n=N, seed=1, **options):
    return DataLoader(data(n, seed), 8, **options)


def moving_loss(model, batch):
    """Of batches that a loader gives on the CPU."""
    device = next(model.parameters()).device
    x, label = (t.to(device, non_blocking=True) for t in batch)
    return F.cross_entropy(model(x), label, reduction="none")


def collected(model, plan, given=None, loss_fn=moving_loss, **options):
    return dropinf.collect(
        model, loader() if given is None else given, loss_fn, plan, progress=False, **options
    )


@pytest.fixture
def case(backend):
    """A model on the CPU and there, a plan, and the store of the first."""
    model = model_of()
    plan = Plan.make(model, Dropout(r=20))
    truth = collected(model, plan, backend="reference")
    return copy.deepcopy(model).to(DEVICE), plan, truth


def assert_same_store(store, truth, limit=1e-5):
    assert_near(store.rows, truth.rows, limit)
    assert torch.equal(store.ids, truth.ids) and torch.equal(store.valid, truth.valid)
    assert store.rows.device.type == "cpu"  # where they are kept
    assert store.weights == truth.weights


def test_collect(case):
    """Batches from workers, in pinned memory, which the loss moves."""
    model, plan, truth = case
    given = loader(num_workers=2, pin_memory=GPU)
    store = collected(model, plan, given)
    assert_same_store(store, truth)
    assert store.proof.examples > 1 and len(store.proof.layers) == len(plan.blocks)
    batches = [tuple(there(list(batch))) for batch in loader()]
    assert_same_store(collected(model, plan, batches), truth)
    assert_same_store(collected(model, plan, mode="grads"), truth)


@pytest.mark.filterwarnings("ignore:RowStore.load. .* is not finished:UserWarning")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_collect_into_a_directory(case, tmp_path, dtype):
    """Interrupted, resumed, and once more when all of it is there."""
    model, plan, truth = case
    given = 0

    class Stop(Exception):
        pass

    def stopping(model, batch):
        nonlocal given
        given += 1
        if given == 9:  # comparisons call it as well
            raise Stop
        return moving_loss(model, batch)

    with pytest.raises(Stop), pytest.warns(UserWarning, match="stopped; the first"):
        collected(model, plan, path=tmp_path / "rows", loss_fn=stopping, dtype=dtype)
    some = 0 < len(RowStore.load(tmp_path / "rows")) < N
    assert some
    for _ in range(2):
        store = collected(model, plan, path=tmp_path / "rows", resume=True, dtype=dtype)
    limit = {None: 1e-5, torch.bfloat16: 2e-3, torch.float16: 4e-4, torch.int8: 1e-2}[dtype]
    assert_same_store(store, truth, limit)
    store.verify()


def test_out_of_memory(case, tmp_path):
    """What the device says, and the rows of the batches before are there."""
    model, plan, truth = case
    batches = 0

    def greedy(model, batch):
        nonlocal batches
        batches += 1
        if batches == 9:
            if not GPU:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            torch.empty(1 << 42, device=DEVICE)
        return moving_loss(model, batch)

    with (
        pytest.raises(torch.OutOfMemoryError, match="out of memory"),
        pytest.warns(UserWarning, match="goes on behind them"),
    ):
        collected(model, plan, path=tmp_path / "rows", loss_fn=greedy)
    store = collected(model, plan, path=tmp_path / "rows", resume=True)
    assert_same_store(store, truth)


def test_not_finite(case):
    """Marked on the device, and told by its place."""
    model, plan, truth = case

    def bad(model, batch):
        losses = moving_loss(model, batch)
        return torch.where(batch[0][:, 0].to(losses.device) > 2.0, torch.inf, losses)

    x = data(N, 1).tensors[0]
    invalid = x[:, 0] > 2.0
    assert 0 < invalid.sum() < 5
    store = collected(model, plan, loss_fn=bad, on_nonfinite="skip")
    assert torch.equal(store.valid, ~invalid)
    assert_near(store.rows[store.valid], truth.rows[store.valid])
    at = int(invalid.nonzero()[0])
    with pytest.raises(ValueError, match=f"the loss of example {at} "):
        collected(model, plan, loss_fn=bad)


class Texts(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.out = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, ids):
        return self.out(torch.tanh(self.tokens(ids)))


def test_tokens_and_segments(backend):
    torch.manual_seed(0)
    model = Texts()
    plan, ids = Plan.make(model, Dropout(r=20)), torch.randint(11, (6, 9))
    batches = [{"ids": some, "parts": torch.arange(9).expand(3, 9) // 4} for some in ids.split(3)]

    def loss_fn(model, batch):
        ids = batch["ids"].to(model.out.weight.device)
        return F.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:], reduction="none")

    def padded(model, batch):
        return F.pad(loss_fn(model, batch), (0, 1))

    def whole(model, batch):
        ids = batch["ids"].to(model.out.weight.device)
        return F.cross_entropy(model(ids).mT, ids.roll(-1, 1), reduction="none")

    for given, loss in (({"per": "token"}, loss_fn), ({"per": "segment"}, whole)):
        given = given | ({"segment_ids": "parts"} if given["per"] == "segment" else {})
        truth = collected(model, plan, batches, loss, backend="reference", **given)
        for here in (batches, there(batches)):
            store = collected(copy.deepcopy(model).to(DEVICE), plan, here, loss, **given)
            assert_near(store.rows, truth.rows)
            assert torch.equal(store.origin, truth.origin)


# Solvers, and what they score.

SOLVERS = {
    "Cholesky": lambda: solvers.Cholesky(),
    "Cholesky, bounded": lambda: solvers.Cholesky(max_bytes=1 << 20),
    "Cholesky, float64": lambda: solvers.Cholesky(dtype=torch.float64),
    "Full": lambda: solvers.Full(),
    "Eigen": lambda: solvers.Eigen(),
    "Eigen, rank": lambda: solvers.Eigen(rank=5),
    "CG": lambda: solvers.CG(),
    "LiSSA": lambda: solvers.LiSSA(damping=1.0),
    "DataInf": lambda: solvers.DataInf(),
    "Diagonal": lambda: solvers.Diagonal(),
    "Identity": lambda: solvers.Identity(),
    "cosine": lambda: solvers.Identity(cosine=True),
}
SIZES = {"many rows": (150, 5, (20, 3, 40)), "few rows": (12, 4, (60, 30))}


def placed(store, device):
    return RowStore(store.rows.to(device), store.plan)


@pytest.mark.parametrize("kind", SOLVERS)
@pytest.mark.parametrize("sizes", SIZES)
def test_every_solver(sizes, kind, backend, tmp_path):
    """Rows on the device or the CPU, queries on either: scores are those of the CPU in float64."""
    n, m, widths = SIZES[sizes]
    store, queries = stores(n, m, *widths)
    exact = SOLVERS[kind]().fit(store)
    truth = dropinf.scores(queries, store, exact)
    own = dropinf.self_influence(store, exact)
    store, queries = stores(n, m, *widths, dtype=torch.float32)
    order = truth.topk(3, 1)
    apart = (truth.topk(4, 1).values.diff(dim=1).abs() > 1e-3 * truth.abs().max()).all()
    for where in (DEVICE, "cpu"):
        for asked in (DEVICE, "cpu"):
            train, queries_here = placed(store, where), placed(queries, asked)
            solver = SOLVERS[kind]().fit(train)
            limit = 1e-4 if kind != "LiSSA" else 2e-3  # of solves in float32, as on the CPU
            found = dropinf.scores(queries_here, train, solver)
            assert_near(found, truth, limit)
            values, indices = dropinf.topk(queries_here, train, solver, 3)
            assert_near(values, order.values, limit)
            if apart:
                assert torch.equal(indices.cpu(), order.indices)
            assert_near(dropinf.self_influence(train, solver), own, limit)
            layers = dropinf.scores(queries_here, train, solver, by="layer")
            assert_near(layers.sum(0), truth, limit)
            if kind not in ("Identity", "cosine"):
                dropinf.scores(queries_here, train, solver, relative=True)


@pytest.mark.parametrize("where", ["there", "cpu"])
def test_what_is_made_of_scores(where, backend, tmp_path):
    """Sweeps, ensembles, attributions, means, agreement, measures."""
    device = DEVICE if where == "there" else "cpu"
    n, m, widths = SIZES["many rows"]
    on_cpu = stores(n, m, *widths, dtype=torch.float32)
    train, queries = (placed(store, device) for store in on_cpu)

    def results(train, queries):
        solver = solvers.Cholesky().fit(train)
        other = solvers.Cholesky(damping=1.0).fit(train)
        parts = [(queries, train, solver), (queries, train, other)]
        scores = dropinf.scores(queries, train, solver)
        yield dropinf.choose_damping([0.01, 0.1, 1.0], [(queries, train, solver)], "noise").values
        ensemble = dropinf.ensemble(parts)
        yield ensemble.mean
        yield dropinf.scores(dropinf.mean_query(queries), train, solver)
        attribution = dropinf.attribute(queries, train, solver, k=3)
        yield torch.as_tensor(attribution.top.scores)
        members = evaluate.halves(n, 8).to(scores.device)
        losses = (members.to(scores) @ scores.T).pow(3)
        yield torch.tensor(evaluate.lds(scores, members, losses).value)
        wrong = torch.arange(n, device=scores.device) % 5 == 0
        yield torch.tensor(
            evaluate.mislabeled_auc(dropinf.self_influence(train, solver), wrong).value
        )

    for found, truth in zip(results(train, queries), results(*on_cpu), strict=True):
        assert_near(torch.as_tensor(found).float(), torch.as_tensor(truth).float(), 1e-3)


def test_in_one_call(case):
    model = case[0]
    given = loader(), loader(M, 2), moving_loss
    truth = dropinf.influence(model_of(), *given, Dropout(r=20), progress=False)
    assert_near(dropinf.influence(model, *given, Dropout(r=20), progress=False), truth, 1e-4)
    scores = dropinf.influence(model, *given, progress=False)  # with energies of its own
    assert scores.shape == (M, N) and scores.isfinite().all()


@pytest.mark.parametrize("fisher", ["sampled", "gauss-newton"])
def test_other_fisher_matrices(case, fisher):
    """Of labels that are drawn, the same ones on every device, and of outputs."""
    model = case[0]

    @dropinf.losses.likelihood
    def loss_fn(model, batch):
        x, label = (t.to(next(model.parameters()).device) for t in batch)
        return dropinf.losses.Categorical(model(x), label)

    given = loader(), loader(M, 2), loss_fn, Dropout(r=20)
    options = {"fisher": fisher, "progress": False}
    truth = dropinf.influence(model_of(), *given, **options)
    assert_near(dropinf.influence(model, *given, **options), truth, 1e-3)


def test_between_masks(case):
    """Agreement of two masks whose rows are there, and a table of several."""
    model = case[0]
    parts = []
    for seed in (0, 1):
        plan = Plan.make(model, Dropout(r=20, seed=seed))
        train, queries = collected(model, plan), collected(model, plan, loader(M, 2))
        parts.append((queries, train, solvers.Cholesky().fit(train)))
    on_cpu = dropinf.agreement(parts, 5)
    moved = [tuple(placed(store, DEVICE) for store in part[:2]) for part in parts]
    moved = [(queries, train, solvers.Cholesky().fit(train)) for queries, train in moved]
    assert dropinf.agreement(moved, 5) == pytest.approx(on_cpu, abs=1e-3)
    given = loader(), loader(M, 2), moving_loss
    found = [
        str(dropinf.stability(one, *given, r=[10, 20], masks=2, k=3, progress=False))
        for one in (model, model_of())
    ]
    assert found[0] == found[1]


def test_energies(case):
    """Those of the CPU, but for a level."""
    found, truth = (
        dropinf.energies(one, loader(), moving_loss, 30) for one in (case[0], model_of())
    )
    for name, energy in truth.params.items():
        mine = found.params[name]
        assert abs(mine.shift - energy.shift) <= 1
        for one, other in ((mine.rows, energy.rows), (mine.columns, energy.columns)):
            assert abs(one.astype(int) - other.astype(int)).max() <= 1


def trained(model, kind):
    optimizer = kind(model.parameters())
    for x, y in loader():
        optimizer.zero_grad()
        moving_loss(model, (x, y)).sum().backward()
        optimizer.step()
    return optimizer


OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, 1e-3, weight_decay=0.1),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, 1e-3, amsgrad=True),
    "Adam, fused": lambda p: torch.optim.Adam(p, 1e-3, fused=True),
    "Adam, capturable": lambda p: torch.optim.Adam(p, 1e-3, capturable=GPU),
    "SGD": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=0.1, nesterov=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_updates(backend, kind):
    """Of a store, and collected, on the device: as in float64 on the CPU."""
    model = model_of()
    optimizer = trained(model.to(DEVICE), OPTIMIZERS[kind])
    plan = Plan.make(model, Dropout(r=20))
    store = collected(model, plan)
    on_cpu = copy.deepcopy(model).cpu()
    again = OPTIMIZERS[kind](on_cpu.parameters())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    truth = dropinf.optimizer_updates(collected(on_cpu, plan), again, on_cpu)
    assert_near(dropinf.optimizer_updates(store, optimizer, model).rows, truth.rows, 1e-4)
    gpu_rows = RowStore(store.rows.to(DEVICE), plan)
    found = dropinf.optimizer_updates(gpu_rows, optimizer, model, weights="any")
    assert_near(found.rows, truth.rows, 1e-4)
    assert_near(collected(model, plan, updates=optimizer).rows, truth.rows, 1e-4)
    for compression in (dropinf.Sketch(r=15, s=3), dropinf.Gaussian(r=15)):
        other = Plan.make(model, compression)
        wanted = collected(on_cpu, other, updates=again)
        assert_near(collected(model, other, updates=optimizer).rows, wanted.rows, 1e-4)
    if "Adam" in kind:
        e = dropinf.energies_from_adam(optimizer, model)
        assert Plan.make(model, Dropout(r=20, energies=e)).width == plan.width


def test_saved_solver(case, tmp_path):
    """Fitted there, saved, and read by who has no GPU."""
    _, plan, truth = case
    train = RowStore(truth.rows.to(DEVICE), plan)
    queries = RowStore(truth.rows[:M], plan)
    for number, solver in enumerate((solvers.Cholesky(), solvers.Eigen(), solvers.Diagonal())):
        if not hasattr(solver, "save"):
            continue
        wanted = dropinf.scores(queries, truth, solver.fit(truth), weights="any")
        solver.fit(train).save(tmp_path / str(number))
        again = type(solver).load(tmp_path / str(number))
        assert_near(dropinf.scores(queries, truth, again, weights="any"), wanted, 1e-4)


def test_store_of_rows_there(case, tmp_path):
    """Saved, appended to, sliced, joined."""
    _, plan, truth = case
    store = RowStore(truth.rows.to(DEVICE), plan, ids=[f"a{i}" for i in range(N)])
    store.save(tmp_path / "rows")
    assert torch.equal(RowStore.load(tmp_path / "rows").rows, truth.rows)
    store.append(truth.rows[:2].to(DEVICE), ids=["b0", "b1"])
    assert len(store) == N + 2 and torch.equal(store["b1"].rows.cpu(), truth.rows[1:2])
    assert torch.equal(store.at([0, N]).cpu(), truth.rows[[0, 0]])
    for dtype in (torch.float16, torch.int8, torch.bfloat16):
        kept = RowStore(truth.rows.to(DEVICE), plan, dtype=dtype)
        assert_near(kept.rows, truth.rows, 1e-2)
