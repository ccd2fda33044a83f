"""Jobs of a function: what it may give, and what is refused."""

import sys

import pytest
import torch

import dropinf
from dropinf.jobs import Job, prepare

MODULE = """
import torch
from torch.utils.data import DataLoader

def loss_fn(model, x):
    return model(x).square().sum(1)

def parts():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    data = list(torch.randn(7, 4).double())
    return model, DataLoader(data, batch_size=3), DataLoader(data[:2], batch_size=2), loss_fn

def three():
    model, train, _, loss = parts()
    return model, train, loss

def mapping():
    model, train, queries, loss = parts()
    return {"model": model, "train": train, "queries": queries, "loss_fn": loss,
            "texts": [f"text {i}" for i in range(7)], "query_texts": ["one", "two"]}

def named():
    model, _, _, loss = parts()
    batches = [{"x": torch.randn(2, 4).double(), "key": ["a", "b"]}]
    return {"model": model, "train": batches, "loss_fn": lambda m, b: loss(m, b["x"]),
            "ids": "key", "texts": {"b": "second", "a": "first"}}

class Inside:
    entry = staticmethod(three)

def fails():
    raise KeyError("no data\\nat all")

def wrong(): return 3
def two(): return parts()[:2]
def other(): return {**mapping(), "losses": 1}
def no_model(): return (None, *parts()[1:])
def no_module(): return (dict, *parts()[1:])
def no_loss(): return (*parts()[:3], 5)
def once(): return (parts()[0], iter(parts()[1]), loss_fn)
def no_texts(): return {**mapping(), "texts": 5}
def no_keys(): return {**named(), "texts": ["first", "second"]}
def no_ids(): return {**mapping(), "texts": {0: "first"}}
value = 5
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """`mine` in the working directory, which is not on the path."""
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("entry", ["mine:parts", "mine:three", "mine:mapping", "mine:Inside.entry"])
def test_entries(entry):
    job = Job.of(entry=entry, compression="Full")
    ready = prepare(job)
    plan = job.plan(ready.model)
    store = dropinf.collect(
        ready.model, ready.train.loader, ready.loss_fn, plan, ids=ready.train.ids, progress=False
    )
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    for x, row in zip(torch.randn(7, 4).double(), store.rows, strict=True):
        y = 2 * model(x)  # of the squares
        truth = torch.cat([torch.outer(y, x).flatten(), y]).detach()
        assert (row - truth).norm() <= 1e-12 * truth.norm()
    assert store.ids.tolist() == list(range(7))
    assert (ready.queries is None) == (entry in ("mine:three", "mine:Inside.entry"))
    if entry == "mine:mapping":
        assert ready.train.texts[ready.train.position(4)] == "text 4"
        assert ready.queries.texts == ["one", "two"]
    assert ready.train.spread(3) is ready.train.loader


def test_texts_by_ids():
    job = Job.of(entry="mine:named", compression="Full")
    ready = prepare(job)
    store = dropinf.collect(
        ready.model,
        ready.train.loader,
        ready.loss_fn,
        job.plan(ready.model),
        ids=ready.train.ids,
        progress=False,
    )
    assert [ready.train.texts[ready.train.position(i)] for i in store.ids] == ["first", "second"]
    with pytest.raises(KeyError):
        ready.train.position("c")


WRONG = {
    "mine": "entry must be module:function, got 'mine'",
    "nowhere:parts": "entry nowhere:parts cannot be imported: ModuleNotFoundError: No module named",
    "mine:nothing": "entry mine:nothing cannot be imported: AttributeError: module 'mine' has no",
    "mine:value": "entry mine:value is no function but int",
    "mine:fails": "entry mine:fails failed: KeyError: 'no data\\nat all'",
    "mine:wrong": "entry mine:wrong must give (model, train_loader, loss_fn), (model, train_loader",
    "mine:two": "entry mine:two must give ",
    "mine:other": "entry mine:other gives 'losses'; it may give model, train, queries, loss_fn,",
    "mine:no_model": "entry mine:no_model gives no 'model'; it may give model, train, queries, lo",
    "mine:no_module": "entry mine:no_module: the model must be a torch.nn.Module, got type",
    "mine:no_loss": "entry mine:no_loss: loss_fn must be a function, got int",
    "mine:once": "entry mine:once: train must be a loader that can be gone through again, such as",
    "mine:no_texts": "entry mine:no_texts: texts must be a sequence or a mapping by ids, got int",
    "mine:no_keys": "entry mine:no_keys: texts must be a mapping by ids where ids are given, and",
    "mine:no_ids": "entry mine:no_ids: texts must be a mapping by ids where ids are given, and",
}


@pytest.mark.parametrize("entry", WRONG)
def test_wrong_entries(entry):
    with pytest.raises(ValueError) as error:
        prepare(Job.of(entry=entry))
    assert str(error.value).startswith(WRONG[entry]) and "\n" not in str(error.value)
