"""bench/experiments/mislabeled.py: its quick run, the rows it scores, and what it concludes."""

import importlib.util
import itertools
import statistics
from dataclasses import replace

import mislabeled
import mislabeled_tasks
import numpy as np
import pytest
import quality_minilm
import torch
from bench_runs import assert_second_run_changes_the_date_alone, run_quick
from mislabeled_methods import COMPRESSED, LOSS, WHOLE, Trained, suspicion
from mislabeled_report import Found, conclusions, difference
from quality_contestants import COMPRESSIONS

import dropinf

TASKS = ["digits-cnn", "digits-cnn-fitted"]
if not quality_minilm.missing_packages():
    TASKS.insert(1, "minilm-lora")


@pytest.fixture(scope="module")
def small():
    return Trained.of(mislabeled.tiny(mislabeled_tasks.make_tasks()["digits-cnn"])(0))


@pytest.mark.more
def test_quick(tmp_path):
    """Every result once; a second run changes nothing but the date."""
    path = tmp_path / "quick.json"
    data = run_quick("mislabeled", path)
    page = path.with_suffix(".md").read_text()
    settings = data["settings"]
    assert list(settings["tasks"]) == TASKS and settings["quick"] is True
    for task in TASKS:
        found = [
            (x["method"], x["r"], x["seed"])
            for x in data["records"]
            if (x["stage"], x["task"]) == ("auc", task)
        ]
        contestants = [
            *itertools.product(COMPRESSED, settings["totals"]),
            *((method, None) for method in (*WHOLE, LOSS)),
        ]
        seeds = range(settings["seeds"])
        assert sorted(found, key=str) == sorted(
            ((*c, seed) for c in contestants for seed in seeds), key=str
        )
        assert f"## {task}\n" in page
    assert all(0 <= x["auc"] <= 1 for x in data["records"] if x["stage"] == "auc")
    for record in (x for x in data["records"] if x["stage"] == "seconds"):
        assert min(record["seconds"].values()) > 0
        assert set(record["seconds"]) == {*COMPRESSED, *WHOLE, LOSS, "Dropout, another mask"}
    assert_second_run_changes_the_date_alone("mislabeled", path)


@pytest.mark.parametrize("name", ["Dropout", "Sketch", "LoGra", "Gaussian", "SJLT"])
def test_rows_out_of_whole_gradients_are_those_of_a_collection(small, name):
    plan = dropinf.Plan.make(small.model, COMPRESSIONS[name](96, 3))
    own, made = small.collect(plan, "train").rows, small.with_whole().collect(plan, "train").rows
    assert own.abs().max() > 0
    assert torch.allclose(own, made, rtol=1e-4, atol=1e-5 * own.abs().max())


def test_suspicion_of_both_ways(small):
    """The timed pipelines are those whose AUC is recorded."""
    whole = small.with_whole()
    for method in (*COMPRESSED, *WHOLE, LOSS):
        own, made = (suspicion(of, method, 96, 1) for of in (small, whole))
        assert own.shape == (len(small.task.train),)
        assert np.corrcoef(own, made)[0, 1] > 0.999, method
    loss = suspicion(small, LOSS, None, 0)
    x, label = small.task.train.tensors
    assert torch.allclose(
        loss, torch.nn.functional.cross_entropy(small.model(x), label, reduction="none")
    )


@pytest.mark.more
def test_suspicion_by_autograd(small):
    """Dot product and self-influence against gradients one by one, in float64."""
    model, task = small.model, small.task
    gradients = {}
    for which in ("train", "queries"):
        rows = []
        for x, label in getattr(task, which):
            loss = torch.nn.functional.cross_entropy(model(x[None]), label[None])
            each = torch.autograd.grad(loss, list(model.parameters()))
            rows.append(torch.cat([g.flatten() for g in each]).double())
        gradients[which] = torch.stack(rows)
    dot = -(gradients["train"] @ gradients["queries"].mean(0))
    found = suspicion(small, "dot product", None, 0).double()
    assert torch.allclose(found, dot, rtol=1e-3, atol=1e-4 * dot.abs().max())
    own, at = 0, 0
    for layer in (m for m in model if list(m.parameters())):
        size = sum(p.numel() for p in layer.parameters())
        G = gradients["train"][:, at : at + size]
        at += size
        damping = 0.1 * G.square().sum() / (len(G) * size)
        F = G.T @ G / len(G) + damping * torch.eye(size, dtype=torch.float64)
        own = own + (G * torch.linalg.solve(F, G.T).T).sum(1)
    found = suspicion(small, "whole gradient, self-influence", None, 0).double()
    assert torch.allclose(found, own, rtol=1e-2)


def test_wrong_labels():
    labels = torch.arange(1000) % 7
    given, wrong = mislabeled_tasks.with_wrong_labels(labels, 7, seed=2)
    assert int(wrong.sum()) == 200 and ((given != labels) == wrong).all()
    assert ((given >= 0) & (given < 7)).all() and len(given[wrong].unique()) == 7
    other = mislabeled_tasks.with_wrong_labels(labels, 7, seed=3)[1]
    assert not (other == wrong).all()


def test_agreement_of_masks():
    a = np.array([3.0, 1.0, 4.0, 2.0, 5.0])
    same = mislabeled.agreement_of(np.stack([a, 2 * a]), 2)
    assert same == {"correlation": 1.0, "overlap": 1.0}
    turned = mislabeled.agreement_of(np.stack([a, -a]), 2)
    assert turned == {"correlation": -1.0, "overlap": 0.0}
    half = mislabeled.agreement_of(np.array([[0, 1, 2, 3], [0, 2, 1, 3.0]]), 2)
    assert half == {"correlation": 0.8, "overlap": 0.5}


def planted(dropout, other):
    """Records of one task where Dropout has these AUCs, and every other method those."""
    keys = [*itertools.product(COMPRESSED, [64, 256]), *((m, None) for m in (*WHOLE, LOSS))]
    records = [
        {"stage": "auc", "task": "t", "method": method, "r": r, "seed": seed, "auc": auc}
        for method, r in keys
        for seed, auc in enumerate(dropout if method == "Dropout" else other)
    ]
    return Found({"settings": {"tasks": {"t": {}}, "totals": [64, 256]}, "records": records})


@pytest.mark.parametrize(
    "dropout, other, word",
    [
        ([0.9, 0.91, 0.92], [0.8, 0.81, 0.82], "above"),
        ([0.7, 0.71, 0.72], [0.8, 0.81, 0.82], "below"),
        ([0.7, 0.81, 0.92], [0.8, 0.81, 0.82], "within two standard errors"),
    ],
)
def test_conclusions(dropout, other, word):
    found = list(conclusions(planted(dropout, other), "t"))
    assert len(found) == 9 and all(line.endswith(f", {word}.") for line in found[1:])
    best = max(dropout, other, key=statistics.fmean)
    assert f"{statistics.fmean(best):.3f}; loss {statistics.fmean(other):.3f}." in found[0]


def test_difference():
    a, b = [0.9, 0.8, 0.85], [0.7, 0.75, 0.71]
    gaps = np.subtract(a, b)
    assert difference(a, b) == (f"{gaps.mean():+.3f} ± {gaps.std(ddof=1) / 3**0.5:.3f}, above.")


def test_smallest_stable_r():
    spread = {1: 0.1, 2: 0.01, 3: 0.05, 4: 0.012, 8: 0.011}
    records = [
        {
            "stage": "small",
            "task": "t",
            "method": "Dropout",
            "r": r,
            "seed": 0,
            "aucs": [0.5 - s, 0.5, 0.5 + s],
        }
        for r, s in spread.items()
    ]
    data = {"settings": {"tasks": {}, "small_r": list(spread)}, "records": records}
    assert Found(data).smallest_stable("Dropout") == 4
    records[-1]["aucs"] = [0.1, 0.9]
    assert Found(data).smallest_stable("Dropout") is None


def test_glue_names_its_extra(monkeypatch):
    real = importlib.import_module

    def gone(name, *rest):
        if name == "datasets":
            raise ModuleNotFoundError("no", name="datasets")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", gone)
    with pytest.raises(ImportError, match=r"pip install 'dropinf\[experiments\]'"):
        mislabeled_tasks.text_pairs("mrpc", 0)
    with pytest.raises(SystemExit, match="mrpc"):
        mislabeled.main(["--quick", "--glue", "cola"])


@pytest.mark.parametrize("name", mislabeled_tasks.GLUE)
def test_glue_of_a_file(name, tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("datasets")
    if quality_minilm.missing_packages():
        pytest.skip(f"no {', '.join(quality_minilm.missing_packages())}")
    first, second = mislabeled_tasks.GLUE[name]
    for split, n in (("train", 30), ("validation", 10)):
        pandas.DataFrame(
            {
                first: [f"text number {i} of many" for i in range(n)],
                second: [f"another about {i}" for i in range(n)],
                "label": [i % 2 for i in range(n)],
                "idx": range(n),
            }
        ).to_parquet(tmp_path / f"{split}.parquet")
    task = mislabeled_tasks.text_pairs(name, 0, tmp_path, n=20)
    ids, given = task.train.tensors
    assert ids.shape == (20, mislabeled_tasks.T) and len(task.queries) == 2
    assert int(task.spoiled.sum()) == 4 and set(given.tolist()) == {0, 1}
    assert len({tuple(row.tolist()) for row in ids}) == 20  # both texts are in them
    model = replace(task, epochs=1).trained()
    losses = task.loss_fn(model, task.queries.tensors)
    assert losses.shape == (2,) and losses.isfinite().all()
