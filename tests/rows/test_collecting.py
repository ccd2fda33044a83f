"""collect and RowStore: every example's row, in memory or a directory, or nothing at all."""

import re

import pytest
import torch
from cases import CASES, build, cross_entropy, true_rows
from torch import nn
from torch.overrides import _get_current_function_mode
from torch.utils.data import DataLoader, TensorDataset

import dropinf.rows.part_files
from dropinf import Dropout, Full, Plan, RowStore, collect

MLP = CASES[0]


@pytest.fixture
def setup():
    """A float64 MLP, 23 examples, their loader, and a plan."""
    model, _ = build(MLP, torch.float64)
    data = TensorDataset(torch.randn(23, 6, dtype=torch.float64), torch.randint(4, (23,)))
    return model, DataLoader(data, batch_size=5), Plan.make(model, Dropout(r=20))


def gather(model, loader, plan, **options):
    return collect(model, loader, cross_entropy, plan, progress=False, **options)


@pytest.mark.parametrize("mode", ["activations", "grads"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "directory"])
def test_collect(setup, mode, on_disk, tmp_path):
    model, loader, plan = setup
    path = tmp_path / "a" / "rows" if on_disk else None
    store = gather(model, loader, plan, path=path, mode=mode)
    truth = true_rows(MLP, model, loader.dataset.tensors, plan)
    assert len(store) == 23 and store.valid.all() and store.rows.dtype == torch.float64
    torch.testing.assert_close(store.rows, truth, rtol=0, atol=1e-13)
    assert store.num_bytes == truth.numel() * 8
    assert torch.equal(torch.cat([chunk for _, chunk in store.chunks()]), store.rows)
    if on_disk:
        assert sorted(p.name for p in path.iterdir()) == ["part-000000", "plan.json", "store.json"]
        files = ["ids.bin", "journal.jsonl", "part.json", "rows.bin"]
        assert sorted(p.name for p in (path / "part-000000").iterdir()) == files
        assert [p.name for p in path.parent.iterdir()] == ["rows"]
        again = RowStore.load(path)
        assert torch.equal(again.rows, store.rows)
        assert again.plan.fingerprint == Plan.load(path).fingerprint == plan.fingerprint


def test_any_iterable_of_batches(setup):
    """A generator has no length; rows in memory grow."""
    model, loader, plan = setup
    store = gather(model, (batch for batch in loader), plan)
    assert torch.equal(store.rows, gather(model, loader, plan).rows)


def test_loaders_run_outside_of_the_capture(setup):
    """A loader's own functions are not watched: it opens and draws as without a capture."""
    model, loader, plan = setup
    modes = []

    class Noted:
        def __iter__(self):
            modes.append(_get_current_function_mode())
            for batch in loader:
                modes.append(_get_current_function_mode())
                yield batch

    store = gather(model, Noted(), plan)
    assert modes == [None] * (1 + len(loader))
    assert torch.equal(store.rows, gather(model, loader, plan).rows)


def test_many_chunks(setup, tmp_path, monkeypatch):
    model, loader, plan = setup
    monkeypatch.setattr(dropinf.rows.part_files, "CHUNK_BYTES", 4 * plan.width * 8)
    store = gather(model, loader, plan, path=tmp_path / "rows")
    assert [len(chunk) for _, chunk in store.chunks()] == [4, 4, 4, 4, 4, 3]
    assert [start for start, _ in store.chunks()] == [0, 4, 8, 12, 16, 20]
    assert torch.equal(store.rows, gather(model, loader, plan).rows)
    # Writing to the rows changes no file.
    store.rows[0] = 0
    assert RowStore.load(tmp_path / "rows").rows[0].any()


def test_progress_bar(setup, capsys):
    model, loader, plan = setup
    collect(model, loader, cross_entropy, plan)
    bar = capsys.readouterr().err
    assert "collect: 100%" in bar and "23/23" in bar
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d, +[\d.]+ex/s\]", bar)  # time left, examples a second
    collect(model, loader, cross_entropy, plan, progress="train rows")
    assert "train rows: 100%" in capsys.readouterr().err
    gather(model, loader, plan)
    assert capsys.readouterr().err == ""


class Poison(nn.Module):
    """The loss, or only the gradient, of the examples marked in the last input is not finite."""

    def __init__(self, inner, of):
        super().__init__()
        self.inner, self.of = inner, of

    def forward(self, x):
        marked = x[:, -1:] > 1e6
        if self.of == "loss":
            return self.inner(x) + torch.where(marked, torch.nan, 0.0)
        return infinite_gradient(self.inner(torch.where(marked, 0.0, x)), marked)


def infinite_gradient(y, marked):
    """y, whose gradient is infinite where it is marked: that of a root at zero."""
    return y + torch.where(marked, y - y.detach(), 1.0).sqrt() - torch.where(marked, 0.0, 1.0)


@pytest.mark.parametrize("mode, batch_size", [("activations", 5), ("grads", 1)])
@pytest.mark.parametrize("of", ["loss", "gradient"])
def test_nonfinite(setup, of, mode, batch_size, tmp_path):
    model, loader, _ = setup
    model = Poison(model, of)
    plan = Plan.make(model, Dropout(r=20))
    x, label = loader.dataset.tensors
    x = x.clone()
    x[[7, 16], -1] = 1e7
    poisoned = DataLoader(TensorDataset(x, label), batch_size=batch_size)
    path = tmp_path / "rows"
    with pytest.raises(ValueError, match=f"the {of} of example 7 .*on_nonfinite='skip'"):
        gather(model, poisoned, plan, path=path, mode=mode)
    clean = gather(model, loader, plan, mode=mode)
    for store in (
        gather(model, poisoned, plan, mode=mode, on_nonfinite="skip"),
        gather(model, poisoned, plan, mode=mode, on_nonfinite="skip", path=path, resume=True),
        RowStore.load(path),
    ):
        assert (~store.valid).nonzero().flatten().tolist() == [7, 16]
        assert not store.rows[[7, 16]].any()
        rest = store.valid
        torch.testing.assert_close(store.rows[rest], clean.rows[rest], rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "of, choice", [("loss", "skip"), ("gradient", "skip"), ("gradient", "raise")]
)
def test_nonfinite_examples_that_cannot_be_kept_apart(setup, of, choice):
    """In mode="grads" a batch shares one graph, through which NaN reaches the other examples."""
    model, loader, _ = setup
    model = Poison(model, of)
    loader.dataset.tensors[0][7, -1] = 1e7
    plan = Plan.make(model, Dropout(r=20))
    with pytest.raises(ValueError, match=r"examples 5 to 9 .* batches of one"):
        gather(model, loader, plan, mode="grads", on_nonfinite=choice)


def test_only_the_loss_is_not_finite(setup):
    """What is added to a loss has no gradient, so that the row itself is finite."""
    model, loader, plan = setup

    def losses(model, batch):
        return cross_entropy(model, batch) + torch.where(batch[1] == 0, torch.inf, 0.0)

    store = collect(model, loader, losses, plan, progress=False, on_nonfinite="skip")
    assert torch.equal(store.valid, loader.dataset.tensors[1] != 0) and not store.valid.all()
    assert not store.rows[~store.valid].any()


def test_nonfinite_token():
    """Rows are of tokens; the error names the example."""
    model, x = nn.Linear(3, 1), torch.randn(4, 5, 3)
    x[3, 1, 0] = 7.0

    def losses(model, x):
        return infinite_gradient(model(x)[..., 0], x[..., 0] == 7.0).sum(1)

    plan = Plan.make(model, Full())
    with pytest.raises(ValueError, match="the gradient of example 3 "):
        collect(model, x.split(2), losses, plan, per="token", progress=False)


def test_bad_input(setup, tmp_path):
    model, loader, plan = setup
    path = tmp_path / "rows"
    with pytest.raises(ValueError, match="the loader is empty"):
        gather(model, [], plan, path=path)
    with pytest.raises(ValueError, match="the batch holds no example"):
        gather(model, [(torch.zeros(0, 6).double(), torch.zeros(0).long())], plan, path=path)
    with pytest.raises(ValueError, match="got a scalar"):
        collect(model, loader, lambda m, b: cross_entropy(m, b).mean(), plan, path, progress=False)
    with pytest.raises(ValueError, match="on_nonfinite must be 'raise' or 'skip', got 'drop'"):
        gather(model, loader, plan, path=path, on_nonfinite="drop")
    with pytest.raises(ValueError, match="the model"):
        gather(nn.Linear(3, 2), loader, plan, path=path)
    assert not list(tmp_path.iterdir())
    gather(model, loader, plan, path=path)
    with pytest.raises(FileExistsError, match=r"rows exists; load it with RowStore\.load"):
        gather(model, loader, plan, path=path)
    assert len(RowStore.load(path)) == 23  # what was there is whole


def test_parameter_that_never_met_data_is_reported(setup):
    model, loader, _ = setup
    model = nn.ModuleDict({"used": model, "spare": nn.Linear(3, 2).double()})

    def loss_fn(model, batch):
        return cross_entropy(model["used"], batch)

    for mode in ("activations", "grads"):
        with pytest.warns(UserWarning, match=r"no example had a gradient for \['spare.weight', "):
            store = collect(
                model, loader, loss_fn, Plan.make(model, Full()), mode=mode, progress=False
            )
        assert not store.rows[:, -8:].any() and store.rows[:, :-8].any()


def test_rows_whose_sum_is_beyond_float32(setup):
    """They are finite all the same; inf - inf is not."""
    plan = setup[2]
    rows = torch.full((3, plan.width), 3e38)
    assert torch.equal(RowStore(rows, plan).rows, rows)
    rows[1, :2] = torch.tensor([torch.inf, -torch.inf])
    with pytest.raises(ValueError, match="row 1 is not finite"):
        RowStore(rows, plan)


def test_store_of_rows(setup):
    _, _, plan = setup
    rows = torch.randn(4, plan.width)
    assert len(RowStore(rows, plan)) == 4
    with pytest.raises(ValueError, match=r"must be floating point \[n, 40\].*got"):
        RowStore(rows[:, 1:], plan)
    rows[2, 3] = torch.inf
    with pytest.raises(ValueError, match="row 2 is not finite"):
        RowStore(rows, plan)
