"""The data of bench/experiments/quality.py: what is spoiled is, and nothing else."""

import numpy as np
import pytest
import quality_minilm
import quality_tasks
import torch
from sklearn.datasets import load_diabetes

import dropinf

pytestmark = pytest.mark.more


def test_text():
    train, queries, garbled = quality_tasks.text_windows(n=50, m=10)
    clean, _, _ = quality_tasks.text_windows(n=50, m=10)
    for data in (train, queries):
        x, following = data.tensors
        assert x[:, 1:].equal(following[:, :-1]) and x.shape[1] == quality_tasks.T
        assert x.min() >= 0 and x.max() < quality_tasks.VOCABULARY
    text = "".join(
        "".join(sorted(quality_tasks.topics.values(), key=len, reverse=True)).split("\n")
    )
    readable = ["".join(chr(c + 32) for c in x.tolist()).split("\x7f") for x in train.tensors[0]]
    found = torch.tensor([all(part in text for part in parts) for parts in readable])
    assert int(garbled.sum()) == 10 and found.equal(~garbled)
    assert clean.tensors[0].equal(train.tensors[0])


def test_patients():
    """Found again by their measurements in what scikit-learn gives, read here."""
    x, y = load_diabetes(return_X_y=True)
    order = np.lexsort(x.T)
    train, queries, exchanged = quality_tasks.patients(n=342)
    assert (len(train), len(queries), int(exchanged.sum())) == (342, 100, 68)
    shown = np.concatenate([train.tensors[0], queries.tensors[0]])
    given = np.concatenate([train.tensors[1], queries.tensors[1]])
    true = np.empty(442)
    true[np.lexsort(shown.astype(float).round(5).T)] = y[order]
    right = np.isclose(given, (true - y.mean()) / y.std(ddof=1), atol=1e-5)
    wrong = np.zeros(442, dtype=bool)
    wrong[:342] = exchanged
    assert right[~wrong].all() and right[wrong].mean() < 0.05  # two may have the same target
    assert sorted(given[wrong]) == pytest.approx(
        sorted((true[wrong] - y.mean()) / y.std(ddof=1)), abs=1e-5
    )


def test_squared_losses():
    """As torch's own; of a column and a row, whose difference would be a matrix."""
    output, target = torch.randn(5, 1), torch.randn(5)
    losses = quality_tasks.squared_losses(output, target)
    assert losses.shape == (5,)
    assert losses.mean().item() == pytest.approx(
        torch.nn.functional.mse_loss(output.flatten(), target).item()
    )


def test_a_task_without_its_packages_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(quality_minilm, "LINES", "no_such_package")
    names = [task.name for task in quality_tasks.make_tasks()]
    assert names == ["digits-mlp", "digits-cnn", "chars", "diabetes"]
    said = capsys.readouterr().out
    assert said.startswith("minilm-lora is left out: no ") and "no_such_package; see" in said


@pytest.mark.skipif(bool(quality_minilm.missing_packages()), reason="its packages are not here")
def test_minilm():
    """Labels are those of the files in which the lines stand; what is tracked is LoRA and head."""
    from transformers import AutoTokenizer

    (task,) = (task for task in quality_tasks.make_tasks() if task.name == "minilm-lora")
    tokenizer = AutoTokenizer.from_pretrained(quality_minilm.folder(quality_minilm.MODEL) / "model")
    texts = quality_minilm.folder(quality_minilm.LINES) / "data" / "english"

    def letters(text):
        return "".join(c for c in text.lower() if c.isascii() and c.isalnum())

    files = [letters((texts / f"{name}.yml").read_text()) for name in quality_minilm.CATEGORIES]
    for data, wrong in (task.train, task.spoiled), (task.queries, torch.zeros(50, dtype=bool)):
        lines = [
            letters(tokenizer.decode(ids, skip_special_tokens=True)) for ids in data.tensors[0]
        ]
        there = [line in files[label] for line, label in zip(lines, data.tensors[1], strict=True)]
        there = torch.tensor(there)
        # Accents and the like are lost in the vocabulary; short lines stand inside of others.
        assert there[~wrong].float().mean() > 0.95
        assert not wrong.any() or there[wrong].float().mean() < 0.2
    assert len(task.train) == 240 and int(task.spoiled.sum()) == 48 and len(task.queries) == 50

    model = task.make()
    tracked = [name for name, p in model.named_parameters() if p.requires_grad]
    # 6 layers, queries and values, A and B; and the head's weight and bias.
    assert len([name for name in tracked if "lora_" in name]) == 24 and len(tracked) == 26
    plan = dropinf.Plan.make(model, dropinf.Full())
    assert plan.width == 24 * 4 * 384 + 384 * 5 + 5
    # Training leaves the rest as it was, and padding does not count.
    ids = task.train.tensors[0][:2]
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], 1)
    with torch.no_grad():
        assert torch.allclose(model(ids), model(padded), atol=1e-5)
