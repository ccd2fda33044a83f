"""The contestants of bench/experiments/quality.py: coordinates, dtypes and energies of theirs."""

import numpy as np
import pytest
import quality
import quality_tasks
import torch
from quality_contestants import BY_ENERGY, CONTESTANTS
from records import Records

import dropinf

pytestmark = pytest.mark.more


@pytest.fixture
def experiment(tmp_path):
    """The tiny regression's, with nothing recorded."""
    (task,) = (t.tiny() for t in quality_tasks.make_tasks() if t.name == "diabetes")
    records = Records(tmp_path / "one.json", {"totals": [64], "seeds": 1}, quality.NAMES)
    return quality.Experiment(task, [], records)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_fewer_bytes(experiment, monkeypatch, dtype):
    """Training rows and queries are kept in that dtype, with Dropout's coordinates."""
    stores, collect = [], dropinf.collect

    def spy(*arguments, **options):
        stores.append(collect(*arguments, **options))
        return stores[-1]

    monkeypatch.setattr(dropinf, "collect", spy)
    name = str(dtype).replace("torch.", "Dropout in ")
    assert name in CONTESTANTS
    compressed = experiment.scores(name, 64, 3)
    plan = dropinf.Plan.make(experiment.model, dropinf.Dropout(total=64, seed=3))
    assert [len(store) for store in stores] == [60, 8]
    assert {store.dtype for store in stores} == {dtype}
    assert {store.plan.fingerprint for store in stores} == {plan.fingerprint}
    exact = experiment.scores("Dropout", 64, 3)
    off = np.abs(compressed - exact).max() / np.abs(exact).max()
    assert 0 < off < 0.1, off


def test_by_energy(experiment, monkeypatch):
    """Energies are measured once, on the first training examples in their order."""
    measured, made, dropout = [], [], dropinf.Dropout

    def energies(model, loader, loss_fn, examples):
        assert model is experiment.model and loss_fn == experiment.task.loss_fn
        measured.append((torch.cat([x for x, _ in loader]), examples))
        return "energies"

    def energetic(total, seed, energies=None, allocation="size"):
        made.append((total, seed, energies, allocation))
        return dropout(total=total, seed=seed)

    monkeypatch.setattr(dropinf, "energies", energies, raising=False)
    monkeypatch.setattr(dropinf, "Dropout", energetic)
    monkeypatch.setattr(quality, "MEASURED", 50)
    for seed in (0, 1):
        for name in ("Dropout", *BY_ENERGY):
            experiment.plan(name, 64, seed)
    ((x, examples),) = measured
    assert examples == 50 and x.equal(experiment.task.train.tensors[0][:50])
    assert made == [
        case
        for seed in (0, 1)
        for case in (
            (64, seed, None, "size"),
            (64, seed, "energies", "size"),
            (64, seed, "energies", "energy"),
        )
    ]
