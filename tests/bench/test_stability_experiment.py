"""bench/experiments/stability.py in its tiny size, and the arithmetic of what it concludes."""

import pytest
import stability_report
from bench_runs import assert_second_run_changes_the_date_alone, run_quick


@pytest.mark.more
def test_quick_run(tmp_path):
    pytest.importorskip("sklearn")
    path = tmp_path / "stability.json"
    data = run_quick("stability", path)
    settings = data["settings"]
    for model in settings["models"]:
        for draw in stability_report.DRAWS:
            mine = stability_report.of(data, model, draw)
            assert [x["r"] for x in mine] == settings["r"]
            assert all(0 < x["overlap"][0] < 1 and len(x["auc"]) == 3 for x in mine)
            correlations = [x["correlation"][0] for x in mine]
            assert correlations == sorted(correlations)  # more coordinates agree more
    assert_second_run_changes_the_date_alone("stability", path)


def record(r, overlap, draw="uniform", model="m"):
    """One of 1,000 parameters, all of which r = 1000 keeps."""
    about = {"model": model, "draw": draw, "r": r, "R": r, "parameters": 1000, "layers": 1}
    if r == 1000:
        return {**about, "whole": True}
    measured = {"overlap": [overlap, 0.01], "correlation": [0.5, 0.01], "auc": [0.4, 0.6]}
    return {**about, "whole": False, **measured}


def test_smallest_stable():
    records = [record(3, 0.9), record(16, 0.7), record(64, 0.8), record(256, 0.85)]
    assert stability_report.smallest(records, 0.8)["r"] == 64  # 3 is chance, as 16 is not stable
    assert stability_report.smallest(records[:2], 0.8) is None
    assert stability_report.smallest([record(16, 0.1), record(1000, 1)], 0.8)["whole"]


def test_conclusions():
    uniform = [record(3, 0.2), record(64, 0.5), record(1000, 1)]
    energy = [record(r, o, "by energy") for r, o in ((3, 0.1), (64, 0.515), (1000, 1))]
    settings = {"r": [3, 64, 1000], "k": 10, "level": 0.8, "models": {"m": {"n": 100}}}
    data = {"settings": settings, "records": [*uniform, *energy]}
    text = "\n".join(stability_report.conclusions(data))
    assert "m overlap 0.20 (chance 0.100), rank correlation 0.50, AUC 0.500 ± 0.141" in text
    # .015 is 1.06 standard errors of the difference.
    assert "standard errors in 0 of 2 pairs of a model and an r, and below it in 1." in text
    (line,) = list(stability_report.stable_table(data))[2:]
    assert line == "| m | 1,000 | 1 | the whole gradient alone | the whole gradient alone |"
    energy[1]["overlap"][0] = 0.9
    (line,) = list(stability_report.stable_table(data))[2:]
    assert line.endswith("| 64 (64, 6%) |")
