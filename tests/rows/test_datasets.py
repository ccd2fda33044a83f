"""Data sets of the package `datasets`: what a loader of one gives, and what is no loader."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import dropinf
from dropinf import Full, Plan, collect

datasets = pytest.importorskip("datasets", reason="pip install 'dropinf[arrow]'")

X = torch.randn(11, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(11) % 3
NAMES = [f"example {i}" for i in range(11)]
COLUMNS = ["x", "label"]


def dataset():
    columns = {"x": X.numpy(), "label": LABELS.numpy(), "name": NAMES, "note": ["-"] * 11}
    return datasets.Dataset.from_dict(columns)


def model():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def losses(net, batch):
    return nn.functional.cross_entropy(net(batch["x"]), batch["label"], reduction="none")


def gathered(loader, **options):
    net = model()
    plan = Plan.make(net, Full())
    return collect(net, loader, losses, plan, progress=False, **options)


def truth():
    """[n, R] by plain autograd in float64; weight and bias of each output beside each other."""
    net = model().double()
    rows = []
    for x, label in zip(X.double(), LABELS, strict=True):
        net.zero_grad()
        losses(net, {"x": x[None], "label": label[None]}).sum().backward()
        rows.append(torch.cat([net.weight.grad.flatten(), net.bias.grad]))
    return torch.stack(rows)


def near(rows, exact):
    torch.testing.assert_close(rows.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shuffle", [False, True])
def test_columns(shuffle):
    data = dataset().select_columns(COLUMNS).with_format("torch")
    store = gathered(DataLoader(data, 4, shuffle=shuffle))
    assert sorted(store.ids.tolist()) == list(range(11))
    near(store.rows, truth()[store.ids])


def test_ids_of_a_column():
    data = dataset().select_columns([*COLUMNS, "name"]).with_format("torch")
    store = gathered(DataLoader(data.shuffle(seed=3), 4), ids="name")
    assert store.ids != NAMES and sorted(store.ids) == sorted(NAMES)
    near(store.rows, truth()[[NAMES.index(name) for name in store.ids]])


def test_streaming(tmp_path):
    """In order; and gone on with behind a stop."""
    stream = dataset().to_iterable_dataset(num_shards=2).with_format("torch")
    store = gathered(DataLoader(stream, 4), ids="name")
    assert store.ids == NAMES
    near(store.rows, truth())

    def stopping(net, batch):
        if "example 8" in batch["name"]:
            raise KeyboardInterrupt
        return losses(net, batch)

    net = model()
    plan, path = Plan.make(net, Full()), tmp_path / "rows"
    with pytest.raises(KeyboardInterrupt):
        collect(net, DataLoader(stream, 4), stopping, plan, path, progress=False, ids="name")
    store = gathered(DataLoader(stream, 4), path=path, resume=True, ids="name")
    assert store.ids == NAMES and store.finished
    near(store.rows, truth())


def test_split():
    data = dataset().select_columns(COLUMNS).with_format("torch")
    near(gathered(dropinf.split(DataLoader(data, 4))).rows, truth())


@pytest.mark.parametrize(
    "given, words",
    [
        (dataset, r"a datasets.Dataset gives examples, not batches; give torch.utils.data"),
        (lambda: dataset().with_format("torch"), "a datasets.Dataset gives examples"),
        (lambda: dataset().to_iterable_dataset(), "a datasets.IterableDataset gives examples"),
        (
            lambda: dataset().to_iterable_dataset().with_format("torch"),
            "a datasets.IterableDataset gives examples",
        ),
        (lambda: datasets.DatasetDict(train=dataset()), "a datasets.DatasetDict holds several"),
        (lambda: DataLoader(dataset(), 4), "column 'x' of this datasets.Dataset gives lists"),
        (
            lambda: DataLoader(dataset().to_iterable_dataset(), 4),
            "column 'x' of this datasets.IterableDataset gives lists",
        ),
    ],
)
def test_what_is_no_loader(given, words):
    net = model()
    plan = Plan.make(net, Full())
    with pytest.raises(TypeError, match=f"collect: {words}"):
        collect(net, given(), losses, plan, progress=False)
    with pytest.raises(TypeError, match=f"energies: {words}"):
        dropinf.energies(net, given(), losses)


def test_columns_of_numbers_need_no_format():
    data = datasets.Dataset.from_dict({"x": X[:, 0].numpy(), "label": LABELS.numpy()})
    net = nn.Linear(1, 3)
    plan = Plan.make(net, Full())

    def one(net, batch):
        return losses(net, {**batch, "x": batch["x"].float()[:, None]})

    loaders = DataLoader(data, 4), DataLoader(data.with_format("torch"), 4)
    first, other = (collect(net, loader, one, plan, progress=False) for loader in loaders)
    assert torch.equal(first.rows, other.rows)


def test_a_collate_fn_of_ones_own():
    def collate(examples):
        return {
            "x": torch.tensor([e["x"] for e in examples]),
            "label": torch.tensor([e["label"] for e in examples]),
        }

    near(gathered(DataLoader(dataset(), 4, collate_fn=collate)).rows, truth())


def test_rows_out():
    """A Dataset of the rows is over the same memory."""
    data = dataset().select_columns(COLUMNS).with_format("torch")
    store = gathered(DataLoader(data, 4))
    out = datasets.Dataset(store.to_arrow())
    found = out.with_format("torch")
    assert torch.equal(found[:]["row"], store.rows)
    assert found[:]["id"].tolist() == store.ids.tolist()
    values = out.data.table["row"].chunk(0).values
    assert values.buffers()[1].address == store.rows.data_ptr()
