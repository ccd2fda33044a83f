"""bench/experiments/sources.py: its quick run, its windows, and what it concludes."""

import itertools

import numpy as np
import pytest
import torch
from bench_runs import assert_second_run_changes_the_date_alone, run_quick

pytest.importorskip("tokenizers")

import sources
from sources_report import Found, conclusions

TEXTS = {
    "fruit": [f"apples and pears number {i} are sweet and ripe. " * 6 for i in range(12)],
    "rocks": [f"granite of {i} million years under basalt; " * 6 for i in range(12)],
}
SMALL = {
    **{"train": 6, "queries": 3, "T": 8, "vocabulary": 290, "width": 8, "layers": 1},
    **{"epochs": 1, "ks": [2, 4], "sources": list(TEXTS)},
}


@pytest.fixture(scope="module")
def experiment():
    return sources.Experiment(TEXTS, SMALL)


@pytest.mark.more
def test_quick(tmp_path):
    """Every result once; a second run changes nothing but the date."""
    pytest.importorskip("bm25s")
    path = tmp_path / "quick.json"
    data = run_quick("sources", path)
    settings = data["settings"]
    assert "code" in settings["sources"]
    found = [(x["method"], x["r"], x["mask"]) for x in data["records"] if x["stage"] == "share"]
    masked = itertools.product(
        (*sources.COMPRESSED, sources.UNIT), settings["totals"], range(settings["masks"])
    )
    whole = [(method, None, None) for method in (*sources.WHOLE, sources.LOSS, sources.BM25)]
    assert sorted(found, key=str) == sorted([*masked, *whole], key=str)
    for record in (x for x in data["records"] if x["stage"] == "share"):
        for k in settings["ks"]:
            assert 0 <= record[f"share_{k}"] <= 1
            assert record[f"share_{k}"] == pytest.approx(np.mean(record[f"sources_{k}"]), abs=1e-4)
            assert record[f"chance_{k}"] == pytest.approx(1 / len(settings["sources"]), abs=1e-5)
    assert_second_run_changes_the_date_alone("sources", path)


def test_windows_of_documents_in_turn(experiment):
    """Queries are of other documents than training windows; none is there twice."""
    assert experiment.labels.tolist() == 6 * [0] + 6 * [1]
    assert experiment.asked_labels.tolist() == 3 * [0] + 3 * [1]
    x, label = experiment.train.tensors
    assert x.shape == label.shape == (12, 8) and (x[:, 1:] == label[:, :-1]).all()
    for name, documents in TEXTS.items():
        train, asked = sources.split(documents, 3, seed=0)
        assert len(asked) == 3 and sorted(train + asked) == sorted(documents), name
    short, long = "one two three four five six", " ".join(map(str, range(100)))
    found = sources.windows(experiment.tokenizer, [long, short], 5, 6)
    starts = [experiment.tokenizer.encode(text).ids[:5] for text in (long, short)]
    assert found[:2].tolist() == starts
    assert found[2].tolist() == experiment.tokenizer.encode(long).ids[5:10]
    with pytest.raises(ValueError, match="ask for fewer"):
        sources.windows(experiment.tokenizer, [short], 5, 60)


def test_shares(experiment, monkeypatch):
    """Scores that know the source have all of the top; ones that avoid it none."""
    own = experiment.asked_labels[:, None] == experiment.labels[None]
    monkeypatch.setattr(experiment, "scores", lambda *key: own.double())
    found = experiment.result(("share", "any", None, None))
    assert found["share_2"] == found["share_4"] == 1 and found["sources_2"] == [1, 1]
    one = own.double()
    one[:3] = -one[:3]  # queries of the first source find none of it
    monkeypatch.setattr(experiment, "scores", lambda *key: one)
    found = experiment.result(("share", "any", None, None))
    assert found["share_2"] == 0.5 and found["sources_2"] == [0, 1]
    error = np.std([0, 0, 0, 1, 1, 1], ddof=1) / 6**0.5
    assert found["error_2"] == pytest.approx(error, abs=1e-5) and found["chance_2"] == 0.5


def test_scores_by_autograd(experiment):
    """Dot product and cosine against gradients one by one; the loss is the same for every query."""
    model, gradients = experiment.model, []
    for some in (experiment.train, experiment.asked):
        rows = []
        for x, label in some:
            loss = torch.nn.functional.cross_entropy(model(x[None])[0], label, reduction="sum")
            each = torch.autograd.grad(loss, list(model.parameters()))
            rows.append(torch.cat([g.flatten() for g in each]).double())
        gradients.append(torch.stack(rows))
    train, asked = gradients
    dot = asked @ train.T
    found = experiment.scores("dot product", None, None).double()
    assert torch.allclose(found, dot, rtol=1e-3, atol=1e-4 * dot.abs().max())
    cosine = dot / asked.norm(dim=1)[:, None] / train.norm(dim=1)
    found = experiment.scores("cosine", None, None).double()
    assert torch.allclose(found, cosine, rtol=1e-3, atol=1e-4)
    loss = experiment.scores(sources.LOSS, None, None)
    assert loss.shape == dot.shape and (loss == loss[0]).all() and (loss < 0).all()
    for method in (*sources.COMPRESSED, sources.UNIT):
        found = experiment.scores(method, 100, 0)
        assert found.shape == dot.shape and found.isfinite().all(), method


def planted(shares):
    """Of (method, r) -> its shares by source, the same for both masks and k."""
    records = [{"stage": "model", "method": "", "r": None, "mask": None}]
    for (method, r), by_source in shares.items():
        for mask in (None,) if r is None else (0, 1):
            record = {"stage": "share", "method": method, "r": r, "mask": mask}
            for k in (10, 50):
                record |= {f"share_{k}": float(np.mean(by_source)), f"error_{k}": 0.01}
                record |= {f"sources_{k}": by_source, f"chance_{k}": 0.5}
            records.append(record)
    settings = {"ks": [10, 50], "totals": [64, 256], "sources": ["a", "b"]}
    return Found({"settings": settings, "records": records})


def test_conclusions():
    found = planted(
        {
            ("loss", None): [0.5, 0.5],
            ("Dropout", 64): [0.6, 0.62],
            ("Dropout", 128): [0.7, 0.62],
            ("Dropout", 256): [0.8, 0.9],
            ("Gaussian", 256): [0.9, 0.94],
            ("BM25", None): [0.95, 0.7],
        }
    )
    lines = list(conclusions(found))
    assert lines[0].startswith("- Top 10: Gaussian at r = 256 has the largest share, 0.920;")
    assert "Dropout at r = 256 0.850, BM25 0.825, chance 0.500." in lines[0]
    assert lines[1].endswith("below BM25: loss; Dropout at r = 64, 128.")
    assert lines[2].endswith(
        "BM25 is above every other method on a (0.90 of Gaussian at r = 256 against 0.95)."
    )
    assert len(lines) == 6
    beaten = planted({("Dropout", 256): [0.8, 0.9], ("BM25", None): [0.7, 0.7]})
    lines = list(conclusions(beaten))
    assert lines[1].endswith("below BM25: none.") and lines[2].endswith("on no source.")


def test_errors_over_queries_and_masks():
    found = planted({("Dropout", 64): [0.6, 0.6], ("BM25", None): [0.7, 0.7]})
    assert found.errors(("BM25", None), 10) == (0.01, 0.0)
    for record, share in zip(found.by_key["Dropout", 64], (0.5, 0.7), strict=True):
        record["share_10"] = share
    queries, masks = found.errors(("Dropout", 64), 10)
    assert queries == 0.01 and masks == pytest.approx(np.std([0.5, 0.7], ddof=1) / 2**0.5)
