"""Every public name has an example in its docstring, and the examples run."""

import inspect
import re
import types

import pytest
import torch
from torch import nn

import dropinf

MODULES = [dropinf, dropinf.solvers, dropinf.losses, dropinf.ops, dropinf.evaluate]
SECTION = re.compile(r"^(?:Args|Attributes|Returns|Raises):$", re.M)


def public():
    """(name, docstring) of what can be called."""
    for module in MODULES:
        for name in module.__all__:
            found = getattr(module, name)
            if callable(found) and not isinstance(found, types.ModuleType):
                yield f"{module.__name__}.{name}", inspect.getdoc(found) or ""


def examples(docstring):
    """The code before the sections: what is indented there and names dropinf."""
    head = SECTION.split(docstring)[0]
    blocks = re.findall(r"(?:^ {4}.*\n?|^\n(?= {4}))+", head, re.M)
    return [inspect.cleandoc(block) for block in blocks if "dropinf." in block]


class Words(nn.Module):
    """Tokens in, logits [B, T, 9] out, by name; of `out`, others."""

    def __init__(self, out="logits"):
        super().__init__()
        self.table, self.last = nn.Embedding(9, 4), nn.Linear(4, 9 if out == "logits" else 1)
        self.out = out

    def forward(self, input_ids, labels=None):
        numbers = self.last(self.table(input_ids))
        if self.out == "reward":
            return types.SimpleNamespace(logits=numbers.mean(1))
        if self.out == "answer":
            start = numbers[..., 0]
            return types.SimpleNamespace(start_logits=start, end_logits=2 * start)
        return types.SimpleNamespace(logits=numbers)


class MyAttention(torch.autograd.Function):
    pass


@torch.library.custom_op("mine::scan", mutates_args=())
def scan(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@pytest.fixture(scope="module")
def shared():
    """The names that examples may use, as their pages do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))
    data = torch.utils.data.TensorDataset(torch.randn(100, 20), torch.randint(3, (100,)))
    loader = torch.utils.data.DataLoader(data, batch_size=32)
    queries = torch.utils.data.DataLoader(torch.utils.data.Subset(data, range(20)), 32)
    loss_fn = dropinf.losses.classification_loss
    optimizer = torch.optim.Adam(model.parameters())
    for batch in loader:
        optimizer.zero_grad()
        loss_fn(model, batch).mean().backward()
        optimizer.step()

    def rows(seed):
        plan = dropinf.Plan.make(model, dropinf.Dropout(r=64, seed=seed))
        store, asked = (
            dropinf.collect(model, each, loss_fn, plan, progress=False)
            for each in (loader, queries)
        )
        return asked, store, dropinf.solvers.Cholesky().fit(store)

    parts = [rows(seed) for seed in range(2)]
    asked, store, solver = parts[0]
    members = dropinf.evaluate.halves(100, 10)
    return {
        **{"torch": torch, "dropinf": dropinf, "model": model, "loss_fn": loss_fn},
        **{"loader": loader, "train": loader, "queries": queries, "batch": next(iter(loader))},
        **{"plan": store.plan, "store": store, "asked": asked, "solver": solver, "parts": parts},
        **{"energies": dropinf.energies(model, loader, loss_fn), "optimizer": optimizer},
        **{"texts": [f"example {i}" for i in range(100)], "MyAttention": MyAttention},
        **{"x": torch.randn(6, 20), "labels": torch.randint(3, (6,)), "targets": torch.rand(6, 3)},
        **{"logits": torch.randn(6, 3), "outputs": torch.randn(6, 3), "teacher": model},
        **{"scores": torch.randn(20, 100), "own": torch.rand(100)},
        **{"wrong": torch.arange(100) % 5 == 0, "members": members},
        **{"losses": torch.rand(10, 20), "baseline": torch.rand(1, 20)},
        **{"without_one": torch.rand(100, 20), "without_top": torch.rand(20, 20)},
        **{"at_random": torch.rand(4, 20), "train_on": lambda indices, seed: torch.rand(20)},
        **{"sources": torch.arange(100) % 4, "query_sources": torch.arange(20) % 4},
    }


def of_texts(out="logits"):
    ids = torch.randint(9, (6, 5))
    more = {"first": torch.tensor([0] * 6), "last": torch.tensor([3] * 6)}
    return {"model": Words(out), "reference": Words(), "ids": ids, "labels": ids, **more}


def of_layers():
    """What the ops take: of two layers, of an embedding, a convolution and a norm."""
    rows = torch.randn(30, 12)
    matrices = dropinf.ops.gram(rows, [0, 5, 12])
    factors = dropinf.ops.damped_cholesky(matrices, [0, 5, 12], 0.1).factors
    model = nn.Linear(3, 2)
    return {
        **{"x": torch.randn(4, 7, 9), "dy": torch.randn(4, 7, 9), "rows": rows},
        **{"o_idx": torch.arange(6, dtype=torch.int32), "i_idx": torch.arange(6).int()},
        **{"ids": torch.randint(9, (4, 7)), "index": torch.arange(6, dtype=torch.int32)},
        **{"matrices": matrices, "factors": factors, "queries": torch.randn(5, 12)},
        **{"model": model, "loss": model(torch.randn(8, 3)).square().sum()},
    }


def of_a_data_set():
    datasets = pytest.importorskip("datasets", reason="pip install 'dropinf[arrow]'")
    return {"data": datasets.Dataset.from_dict({"text": ["..."] * 100})}


OTHERS = {
    "dropinf.ScoreTable": of_a_data_set,
    **{f"dropinf.losses.{kind}_loss": of_texts for kind in ("causal_lm", "masked_lm", "seq2seq")},
    "dropinf.losses.token_classification_loss": of_texts,
    "dropinf.losses.dpo_loss": of_texts,
    "dropinf.losses.refuse_packed": of_texts,
    "dropinf.losses.reward_loss": lambda: of_texts("reward"),
    "dropinf.losses.question_answering_loss": lambda: of_texts("answer"),
    "dropinf.ops.sampled_conv": lambda: {
        **of_layers(),
        "images": torch.randn(4, 3, 8, 8),
        "dy": torch.randn(4, 9, 6, 6),
    },
}


@pytest.mark.parametrize("name, docstring", [pytest.param(*p, id=p[0]) for p in public()])
def test_examples(name, docstring, shared, tmp_path, monkeypatch):
    found = examples(docstring)
    assert found, f"{name} has no example"
    monkeypatch.chdir(tmp_path)
    of_ops = name.startswith("dropinf.ops.") or name.endswith("BackendError")
    others = OTHERS.get(name, of_layers if of_ops else dict)
    for code in found:
        exec(compile(code, name, "exec"), {**shared, **others()})


def test_an_example_that_fails_is_found():
    (code,) = examples(
        "Sums.\n\n    x = 1\n\nMore.\n\n    dropinf.no_such_name()\n\nArgs:\n    x: y."
    )
    with pytest.raises(AttributeError):
        exec(code, {"dropinf": dropinf})
