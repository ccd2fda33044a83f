"""bench/experiments/frontier.py in its tiny size, its contestants, and what it concludes."""

import numpy as np
import pytest
import scipy.stats
import torch
from bench_runs import assert_second_run_changes_the_date_alone, run_quick

pytest.importorskip("sklearn")

import frontier
import frontier_contestants as contestants
import frontier_report as report

from dropinf.tools.measuring import LeftOut

pytestmark = pytest.mark.more


@pytest.fixture(scope="module")
def tiny():
    """The task, its model, and uncompressed scores [m, n] by torch.autograd in float64."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    task = frontier.the_task(quick=True)
    model = task.trained()
    torch.set_num_threads(before)
    exact = task.trained().double()

    def gradients(data):
        """For each parameter [n, P]."""
        rows = []
        for x, label in data:
            loss = torch.nn.functional.cross_entropy(exact(x.double()), label)
            rows.append(torch.autograd.grad(loss, list(exact.parameters())))
        return [torch.stack([g.flatten() for g in each]) for each in zip(*rows, strict=True)]

    rows, queries = gradients(task.train), gradients(task.queries)
    scores = 0
    for at in range(0, len(rows), 2):  # weight and bias are one layer
        G, Q = (torch.cat(some[at : at + 2], 1) for some in (rows, queries))
        n, P = G.shape
        damping = 0.1 * (G * G).sum() / (n * P)
        inner = G @ G.T / n + damping * torch.eye(n)
        scores = scores + (Q @ G.T - Q @ G.T @ G @ torch.linalg.solve(inner, G).T / n) / damping
    return task, model, scores.numpy()


def rho(a, b):
    return np.mean([scipy.stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])


@pytest.mark.parametrize("name", contestants.CONTESTANTS)
def test_contestants(tiny, name):
    """Queries in rows, more is better, and the damping reaches the inverse."""
    task, model, truth = tiny
    try:
        call = contestants.CONTESTANTS[name](task, model, 12, 0)
    except LeftOut as reason:
        pytest.skip(str(reason))
    scores, num_bytes = call(0.1)
    scores = scores.double().numpy()
    assert scores.shape == truth.shape and num_bytes > 0
    if name == contestants.FULL:
        assert np.allclose(scores, truth, rtol=1e-3, atol=1e-4 * np.abs(truth).max())
    if name not in (
        *contestants.WITHOUT_R,
        "LoGra",
        "LoGra, equal shares",
    ):  # whose squares are cut to a layer's size
        assert num_bytes == 4 * len(task.train) * 3 * 12**2
    assert rho(scores, truth) > 0.25
    near, far = (call(damping).scores.double().numpy() for damping in (0.01, 100.0))
    assert rho(near, far) < 0.999
    if name in contestants.OURS or name.startswith("Bergson"):
        assert np.array_equal(call(None).scores.double().numpy(), scores)  # 0.1 is the default


def test_quick_run(tmp_path):
    path = tmp_path / "frontier.json"
    data = run_quick("frontier", path)
    settings, records = data["settings"], data["records"]
    assert sum(x["stage"] == "half" for x in records) == settings["task"]["halves"]
    scored = [x for x in records if x["stage"] == "score"]
    wanted = [
        (name, 3 * side**2, seed)
        for name in contestants.OURS
        if name != contestants.FULL
        for side in settings["sides"]
        for seed in range(settings["seeds"])
    ]
    found = [(x["contestant"], x["r"], x["seed"]) for x in scored]
    assert len(found) == len(set(found)) and set(wanted) <= set(found)
    for record in scored:
        assert len(record["even"]) == len(record["odd"]) == len(settings["dampings"])
    for record in (x for x in records if x["stage"] == "time"):
        assert len(record["ratio"]) == settings["rounds"] and min(record["ratio"]) > 0
    points = report.points_of(data)
    page = path.with_suffix(".md").read_text()
    for point in points:
        assert f"| {point.tuned:.3f}" in page
    assert_second_run_changes_the_date_alone("frontier", path)


def test_a_damping_is_judged_on_the_other_queries():
    record = {"even": [0.1, 0.5, 0.4], "odd": [0.2, 0.0, 0.3]}
    value, chosen = report.tuned(record)  # 1 by even, judged 0.0; 2 by odd, judged 0.4
    assert value == pytest.approx(0.2) and chosen == [1, 2]
    assert report.default(record) == pytest.approx(0.15)


def test_no_inverse_without_a_damping():
    record = {"even": [None, 0.3], "odd": [None, 0.5]}
    assert report.default(record) is None
    assert report.tuned(record) == (pytest.approx(0.4), [1, 1])


def planted(name, r, value, error, ratio, num_bytes):
    return report.Point(name, r, value, value, error, 0, 6, ratio, (ratio, ratio), num_bytes)


def test_what_is_concluded():
    points = [
        planted("Dropout", 48, 0.4, 0.01, 1.0, 100),
        planted("Dropout and shares by energy", 48, 0.5, 0.01, 1.5, 100),
        planted("dattri LoGra", 48, 0.45, 0.01, 2.0, 100),
        planted("TRAK", 48, 0.41, 0.01, 3.0, 100),
        planted(contestants.EKFAC, 1000, 0.49, 0.0, 20.0, 400),
    ]
    text = "\n".join(report.conclusions(points))
    cheap = "Dropout 48 0.400; Dropout and shares by energy 48 0.500."
    assert f"cheaper in time and higher in LDS than: {cheap}" in text
    assert "in bytes and higher in LDS than: Dropout and shares by energy 48 0.500." in text
    assert (
        "Dropout at the same r is, in LDS, within noise of TRAK 48; below dattri LoGra 48" in text
    )
    assert "energy at the same r is, in LDS, above dattri LoGra 48, TRAK 48." in text
    assert "0.490 at 20.0 times the time and 0.00 MB; it is passed by none" in text


def test_a_peer_that_is_missing_is_said_to_be():
    data = {
        "settings": {
            **frontier.QUICK,
            "quick": True,
            "task": frontier.the_task(True).description(),
        },
        "machine": {"cores": 1, "cpu": "none", "system": "none"},
        "versions": {},
        "runs": [{"commit": "0" * 40, "date": "2026-01-01"}],
    }
    text = "\n".join(report.head(data, [planted("Dropout", 48, 0.4, 0.01, 1.0, 100)]))
    assert "not installed" in text and "TRAK" in text.split("not installed")[1]
