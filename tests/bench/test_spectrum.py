"""bench/experiments/spectrum.py in its tiny size, and the arithmetic of what it concludes."""

import json

import numpy as np
import pytest
import quality_tasks
import scipy.stats
import spectrum
import spectrum_report
import torch
from bench_runs import assert_second_run_changes_the_date_alone, run_quick
from records import Records
from score_cases import stores


@pytest.mark.more
def test_quick_run(tmp_path):
    pytest.importorskip("sklearn")
    path = tmp_path / "spectrum.json"
    data = run_quick("spectrum", path)
    settings = data["settings"]
    for task in settings["tasks"]:
        for r in settings["totals"]:
            mine = [x for x in data["records"] if (x["task"], x["r"]) == (task, r)]
            swept = [x for x in mine if x["stage"] == "damping"]
            assert [x["at"] for x in swept] == settings["dampings"]
            assert all(len(x["lds"]) == settings["seeds"] for x in swept)
            conditions = [np.median(x["condition"]) for x in swept]
            assert conditions == sorted(conditions, reverse=True) and conditions[-1] > 1
            picks = {x["at"]: x["dampings"] for x in mine if x["stage"] == "choice"}
            assert list(picks) == list(spectrum_report.CRITERIA[:-1])
            assert all(set(found) <= set(settings["dampings"]) for found in picks.values())
    page = path.with_suffix(".md").read_text()
    fewer = page.partition("## With fewer training examples")[2].partition("\n## ")[0]
    of_task = [line.split(" | ")[1:3] for line in fewer.splitlines() if "| digits-mlp |" in line]
    assert of_task == [["40", "64"], ["40", "256"], ["60", "64"], ["60", "256"]]
    assert_second_run_changes_the_date_alone("spectrum", path)


@pytest.mark.parametrize("change", ["none", "machine", "losses"])
def test_halves_of_quality_are_taken_of_the_same_machine_and_model(change, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    (task,) = (t for t in quality_tasks.make_tasks() if t.name == "digits-mlp")
    task = task.tiny()
    model = task.trained()
    machine = {"cpu": "one"}
    settings = {"quick": False, **spectrum.SETTINGS}
    records = Records(tmp_path / "own.json", settings, spectrum.NAMES)
    records.data["machine"] = machine if change != "machine" else {"cpu": "another"}
    losses = task.query_losses(model) + (0.1 if change == "losses" else 0.0)
    made = [
        {"stage": "model", "dataset": task.name, "losses": losses.tolist()},
        {"stage": "half", "dataset": task.name, "losses": [7.0] * len(task.queries)},
    ]
    quality = tmp_path / "quality.json"
    quality.write_text(json.dumps({"machine": machine, "records": made}))
    monkeypatch.setattr(spectrum, "QUALITY", quality)
    found = spectrum.half_losses(task, model, records)
    if change == "none":
        assert found.tolist() == [[7.0] * len(task.queries)]
    else:
        trained = [task.query_losses(task.trained(half)).numpy() for half in range(task.halves)]
        assert np.allclose(found, trained, rtol=1e-4)


@pytest.mark.parametrize("n, size", [(40, 9), (6, 9)])
def test_condition(n, size):
    store, _ = stores(n, 1, size)
    G = store.rows.double().numpy()
    F = G.T @ G / n
    expected = [np.linalg.cond(F + d * np.trace(F) / size * np.eye(size)) for d in (0.01, 1.0)]
    assert spectrum.condition(store, [0.01, 1.0]) == pytest.approx(expected, rel=1e-6)


def test_condition_is_the_geometric_mean_over_entries():
    store, _ = stores(30, 1, 2, 6)
    alone = [
        np.linalg.cond(F + 0.1 * np.trace(F) / len(F) * np.eye(len(F)))
        for G in (store.rows[:, :2].double().numpy(), store.rows[:, 2:].double().numpy())
        for F in [G.T @ G / 30]
    ]
    expected = (alone[0] ** 2 * alone[1] ** 6) ** (1 / 8)
    assert spectrum.condition(store, [0.1]) == pytest.approx([expected], rel=1e-6)


def test_between_masks():
    scores = torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(0)).double()
    correlation, overlap = spectrum.between_masks(scores, 5)
    for query in range(4):
        rho, common = [], []
        for a, b in ((0, 1), (0, 2), (1, 2)):
            x, y = scores[a, query].numpy(), scores[b, query].numpy()
            rho.append(scipy.stats.spearmanr(x, y).statistic)
            common.append(len(set(np.argsort(-x)[:5]) & set(np.argsort(-y)[:5])) / 5)
        assert correlation[query] == pytest.approx(np.mean(rho))
        assert overlap[query] == pytest.approx(np.mean(common))


def test_what_a_criterion_loses():
    lds = {0.1: [0.5, 0.5], 1.0: [0.6, 0.8], 10.0: [0.9, 0.3]}
    picks = {"noise": [1.0, 0.1], "agreement": [10.0], "always 0.1": [0.1]}
    cell = spectrum_report.Cell("task", 64, lds, {0.1: 0.2, 1.0: 0.3, 10.0: 0.9}, picks)
    assert cell.best == 1.0
    assert cell.lost("noise") == pytest.approx([0.0, 0.3])
    assert cell.lost("agreement") == pytest.approx([-0.3, 0.5])
    assert cell.lost("always 0.1") == pytest.approx([0.1, 0.3])
    others = {name: [1.0] for name in spectrum_report.CRITERIA if name not in picks}
    cell = cell._replace(picks={**picks, **others})
    flat = cell._replace(r=256, lds={**lds, 10.0: [0.9, 0.9]}, overlap=dict.fromkeys(lds, 0.5))
    text = "\n".join(spectrum_report.conclusions([cell, flat]))
    assert "inside of the grid in 1 of 2 cases" in text and "task: 1, 10." in text
    assert "above overlap at the best one in 1 of 2 cases" in text
    # Losses 0.15 and 0.35 at the two r.
    assert "| noise | 0.250 ± 0.100 | 0.350 ± 0.050 | task, r = 256 |" in text
