"""Docstrings of public names: an example, which runs; arguments, shapes and errors."""

import ast
import inspect
import re
import textwrap
import types

import pytest
import torch
from torch import nn

import dropinf

MODULES = [dropinf, dropinf.solvers, dropinf.losses, dropinf.ops, dropinf.evaluate]
SECTION = re.compile(r"^(?:Args|Attributes|Returns|Raises):$", re.M)


def public():
    """name -> what can be called."""
    found = {f"{m.__name__}.{name}": getattr(m, name) for m in MODULES for name in m.__all__}
    return {
        name: each
        for name, each in found.items()
        if callable(each) and not isinstance(each, types.ModuleType)
    }


def code_of(found):
    """The functions behind a name: of a class, what makes one."""
    if not inspect.isclass(found):
        return [inspect.unwrap(found)]
    made = (vars(found).get(name) for name in ("__init__", "__post_init__"))
    return [f for f in made if f and f.__code__.co_filename != "<string>"]  # dataclass's own


def written():
    """(name, what it names, all that is written of it), methods of the public classes too.

    Of a class that is its own docstring and that of what makes one; of a method that of those
    that it overrides too; of any, the docstrings of public names to which its own refers.
    """
    by_name = {name.rpartition(".")[2]: inspect.getdoc(each) for name, each in public().items()}

    def text(*told):
        own = "\n".join(inspect.getdoc(each) or "" for each in told)
        return "\n".join([own, *(by_name.get(name) or "" for name in re.findall(r"`(\w+)`", own))])

    for name, found in public().items():
        yield name, found, text(found, *code_of(found))
        for own in vars(found) if inspect.isclass(found) else ():
            over = [vars(base)[own] for base in found.__mro__ if own in vars(base)]
            over = [getattr(each, "__func__", getattr(each, "fget", each)) for each in over]
            if not own.startswith("_") and inspect.isfunction(over[0]):
                yield f"{name}.{own}", over[0], text(*over)


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


@pytest.mark.parametrize("name", public())
def test_examples(name, shared, tmp_path, monkeypatch):
    found = examples(inspect.getdoc(public()[name]) or "")
    assert found, f"{name} has no example"
    monkeypatch.chdir(tmp_path)
    of_ops = name.startswith("dropinf.ops.") or name.endswith("BackendError")
    others = OTHERS.get(name, of_layers if of_ops else dict)
    for code in found:
        exec(compile(code, name, "exec"), {**shared, **others()})


def missing(found, text):
    """What a docstring should say and does not."""
    if inspect.isclass(found) and issubclass(found, BaseException):
        return []
    signature = inspect.signature(found)
    parameters = signature.parameters.values()
    wanted = {}
    annotations = [signature.return_annotation, *(p.annotation for p in parameters)]
    if any("Tensor" in str(each) for each in annotations):
        wanted["a shape"] = r"\[[^\]]*\]"
    sources = [textwrap.dedent(inspect.getsource(each)) for each in code_of(found)]
    raised = [x for source in sources for x in ast.walk(ast.parse(source)) if type(x) is ast.Raise]
    if any(x.exc is not None and "NotImplemented" not in ast.dump(x.exc) for x in raised):
        wanted["Raises:"] = r"^Raises:$"
    if found in public().values():
        named = (p.name for p in parameters if not str(p).startswith("*"))
        wanted |= {name: rf"(?<!\w){name}(?!\w)" for name in named}
    return [what for what, pattern in wanted.items() if not re.search(pattern, text, re.M)]


@pytest.mark.parametrize("name, found, text", [pytest.param(*p, id=p[0]) for p in written()])
def test_shapes_arguments_and_errors(name, found, text):
    assert not missing(found, text)


def test_what_is_missing_is_found():
    def twice(x: torch.Tensor, times) -> torch.Tensor:
        if times < 0:
            raise ValueError("times must be positive")
        return x * times

    assert missing(twice, "Times a number, of x.") == ["a shape", "Raises:"]
    assert missing(twice, "[B].\n\nRaises:\n    ValueError: times is negative.") == []
    assert "r" in missing(dropinf.Dropout, "[R]")


def test_an_example_that_fails_is_found():
    (code,) = examples(
        "Sums.\n\n    x = 1\n\nMore.\n\n    dropinf.no_such_name()\n\nArgs:\n    x: y."
    )
    with pytest.raises(AttributeError):
        exec(code, {"dropinf": dropinf})
