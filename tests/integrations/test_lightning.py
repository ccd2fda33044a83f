"""lightning: rows from a Trainer, against autograd and dropinf.collect."""

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from lightning_runs import quiet_trainer
from torch import nn
from torch.overrides import _get_current_function_mode

lightning = pytest.importorskip("lightning")

import dropinf  # noqa: E402
import dropinf.rows.batches  # noqa: E402
from dropinf.integrations import versions  # noqa: E402
from dropinf.integrations.lightning import InfluenceCallback  # noqa: E402

# Lightning's advice on loaders, and what it uses of torch's.
pytestmark = pytest.mark.filterwarnings("ignore")


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.5), nn.Linear(9, 3))
        self.truth, self.seen = [], []
        self.plan = None

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        if self.plan is not None:
            self.truth.append(alone(self, batch, self.plan))
        x, label, *_ = batch
        self.seen.append(x)
        return F.cross_entropy(self(x), label)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.05)


def loss_fn(model, batch):
    x, label, *_ = batch
    return F.cross_entropy(model(x), label, reduction="none")


def alone(model, batch, plan):
    """Rows of a batch by autograd, one example at a time, in eval mode."""
    named, rows = dict(model.named_parameters()), []
    training = model.training
    model.eval()
    for x, label in zip(*batch, strict=True):
        loss = F.cross_entropy(model(x[None]), label[None])
        grads = torch.autograd.grad(loss, [named[slot.name] for slot in plan.slots])
        parts = zip(plan.slots, grads, strict=True)
        rows.append(torch.cat([g.flatten()[s.index] * s.scale for s, g in parts]))
    model.train(training)
    return torch.stack(rows)


def data():
    torch.manual_seed(1)
    return torch.utils.data.TensorDataset(torch.randn(7, 6), torch.randint(3, (7,)))


def fit(tmp_path, model, *callbacks, loader=None, **settings):
    if loader is None:
        loader = torch.utils.data.DataLoader(data(), 2, shuffle=True)
    torch.manual_seed(2)
    quiet_trainer(
        tmp_path,
        accelerator="cpu",
        max_epochs=2,
        callbacks=list(callbacks),
        **settings,
    ).fit(model, loader)


def assert_rows(rows, truth):
    assert truth.abs().amax(1).gt(0).all()
    torch.testing.assert_close(rows, truth, rtol=0, atol=2e-6 * truth.abs().max().item())


def same_as_without(tmp_path, model, **settings):
    random, plain = torch.rand(3), Digits()
    fit(tmp_path, plain, **settings)
    assert torch.equal(random, torch.rand(3))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_after(tmp_path, accumulated):
    """The data set's rows in its order, as autograd has them; training as without."""
    model = Digits()
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=20))
    callback = InfluenceCallback(plan, loss_fn, tmp_path / "rows")
    fit(tmp_path, model, callback, accumulate_grad_batches=accumulated)
    same_as_without(tmp_path, model, accumulate_grad_batches=accumulated)
    store = dropinf.RowStore.load(tmp_path / "rows")
    assert torch.equal(store.rows, callback.store.rows)
    assert_rows(store.rows, alone(model, data()[:], plan))
    model.eval()
    whole = dropinf.collect(model, [data()[:]], loss_fn, plan, progress=False)
    assert_rows(store.rows, whole.rows)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_during(tmp_path, accumulated):
    """Rows of each batch with the weights of its step; training as without."""
    model = Digits()
    model.plan = plan = dropinf.Plan.make(model, dropinf.Dropout(r=20))
    callback = InfluenceCallback(plan, loss_fn, when="during")
    fit(tmp_path, model, callback, accumulate_grad_batches=accumulated)
    same_as_without(tmp_path, model, accumulate_grad_batches=accumulated)
    assert_rows(callback.store.rows, torch.cat(model.truth))
    steps = range(8) if accumulated == 1 else [0, 0, 0, 1, 2, 2, 2, 3]
    wanted = [s for s, n in zip(steps, [2, 2, 2, 1] * 2, strict=True) for _ in range(n)]
    assert callback.store.origin[:, 0].tolist() == wanted
    assert (callback.store.origin[:, 1] == -1).all()


def test_training_sees_no_capture(tmp_path, monkeypatch):
    """One capture for the whole training, which is closed when a step runs."""
    made = []

    def counted(*given, **options):
        made.append(dropinf.capture(*given, **options))
        return made[-1]

    class Watched(Digits):
        def training_step(self, batch, batch_idx):
            assert all(p.requires_grad for p in self.parameters())
            assert _get_current_function_mode() is None and not self._forward_pre_hooks
            dropinf.capture(self, plan).__enter__().__exit__(None, None, None)
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr(dropinf.rows.batches, "capture", counted)
    model = Watched()
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=20), include="net.3")  # all else is frozen
    callback = InfluenceCallback(plan, loss_fn, when="during")
    fit(tmp_path, model, callback)
    same_as_without(tmp_path, model)
    assert len(made) == 1
    assert callback.store.proof.examples == 2  # of batches 0 and 4


@pytest.mark.parametrize("workers", [0, 2])
def test_index(tmp_path, workers):
    """The examples of the rows, of a data set that gives its positions."""
    model, (x, labels) = Digits(), data()[:]
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=2))
    numbered = torch.utils.data.TensorDataset(x, labels, torch.arange(7))
    loader = torch.utils.data.DataLoader(numbered, 2, shuffle=True, num_workers=workers)
    path = tmp_path / "rows"
    callback = InfluenceCallback(plan, loss_fn, path, "during", index=lambda batch: batch[2])
    fit(tmp_path, model, callback, loader=loader)
    store = dropinf.RowStore.load(path)
    examples = store.origin[:, 1]
    assert torch.equal(store.ids, examples) and len(store[3]) == 2  # epochs
    assert torch.equal(x[examples], torch.cat(model.seen))
    assert sorted(examples.tolist()) == sorted(2 * [*range(7)])


def test_a_training_that_stops(tmp_path):
    """The rows so far are where they were to be."""

    class Stopping(Digits):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    model, path = Stopping(), tmp_path / "rows"
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=2))
    callback = InfluenceCallback(plan, loss_fn, path, "during")
    with (
        pytest.raises(ZeroDivisionError),
        pytest.warns(
            UserWarning, match=r"the first 7 rows are in .*, and RowStore\.load opens them"
        ),
    ):
        fit(tmp_path, model, callback)
    with pytest.warns(UserWarning, match="is not finished; these are its first 7 rows$"):
        store = dropinf.RowStore.load(path)
    assert store.origin[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3] and store.weights is None


def test_refuses(tmp_path):
    model = Digits()
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=20))
    callback = InfluenceCallback(plan, loss_fn, tmp_path / "rows", "during")
    with pytest.raises(ValueError, match="precision 'bf16-mixed' is not taken"):
        fit(tmp_path, model, callback, precision="bf16-mixed")
    with pytest.raises(ValueError, match="needs one DataLoader with a batch_size, got list"):
        fit(tmp_path, model, InfluenceCallback(plan, loss_fn), loader=[data()[:]])
    callback.loss_fn = lambda model, batch: loss_fn(model, batch).mean()
    with pytest.raises(ValueError, match="need one loss per example"):
        fit(tmp_path, model, callback)
    for index, got in ((lambda b: b[1][:1], r"int64 \(1,\)"), (lambda b: b[0][:, 0], "float32")):
        callback = InfluenceCallback(plan, loss_fn, tmp_path / "rows", "during", index)
        with pytest.raises(ValueError, match=f"an integer for each of 2 examples, got .*{got}"):
            fit(tmp_path, model, callback)
    assert not list(tmp_path.glob("rows*"))
    with pytest.raises(ValueError, match=r"index= goes with when='during'"):
        InfluenceCallback(plan, loss_fn, index=lambda batch: batch[2])
    with pytest.raises(ValueError, match="when must be 'after' or 'during', got 'before'"):
        InfluenceCallback(plan, loss_fn, when="before")


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(versions, "version", lambda package: "2.5.1")
    monkeypatch.delitem(sys.modules, "dropinf.integrations.lightning")
    with pytest.raises(ImportError, match=r"lightning 2\.5\.1 is not supported, tested is 2\.6\.x"):
        importlib.import_module("dropinf.integrations.lightning")
