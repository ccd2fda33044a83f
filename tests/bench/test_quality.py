"""bench/experiments/quality.py in its tiny size: what it measures, records and concludes."""

import itertools
import json
import statistics

import numpy as np
import pytest
import quality
import quality_minilm
import quality_tasks
import scipy.stats
import torch
from bench_runs import run_quick
from quality_contestants import COMPRESSIONS, CONTESTANTS, KEPT

import dropinf

pytestmark = pytest.mark.more

DATASETS = ["digits-mlp", "digits-cnn", "chars", "diabetes"]
if not quality_minilm.missing_packages():
    DATASETS.append("minilm-lora")


@pytest.fixture(autouse=True)
def threads():
    """As many as before; the script takes one."""
    before = torch.get_num_threads()
    yield torch.set_num_threads(1)
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The JSON of a quick run, and its path."""
    path = tmp_path_factory.mktemp("quality") / "quick.json"
    return run_quick("quality", path), path


@pytest.fixture(scope="module")
def truth(quick):
    """The quick MLP: its uncompressed scores [m, n] by torch.autograd in float64, and the task."""
    task = task_named("digits-mlp")
    assert quick[0]["settings"]["datasets"]["digits-mlp"] == task.description()
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # or other rounding trains another model
    model = task.trained().double()
    torch.set_num_threads(before)

    def gradients(data):
        """For each layer [n, P]."""
        rows = []
        for x, label in data:
            loss = torch.nn.functional.cross_entropy(model(x.double()), label)
            rows.append(torch.autograd.grad(loss, list(model.parameters())))
        flat = [torch.stack([g.flatten() for g in each]) for each in zip(*rows, strict=True)]
        return [torch.cat(pair, 1) for pair in zip(flat[::2], flat[1::2], strict=True)]

    scores = 0
    for G, Q in zip(gradients(task.train), gradients(task.queries), strict=True):
        n, P = G.shape
        damping = 0.1 * (G * G).sum() / (n * P)
        inverse_G = torch.linalg.solve(G @ G.T / n + damping * torch.eye(n), G)  # [n, P]
        scores = scores + (Q @ G.T - Q @ G.T @ G @ inverse_G.T / n) / damping
    return scores.numpy(), task


def task_named(name):
    """In its tiny size."""
    return next(task for task in quality_tasks.make_tasks() if task.name == name).tiny()


def of(data, stage, dataset, compression=None):
    return [
        record
        for record in data["records"]
        if (record["stage"], record["dataset"]) == (stage, dataset)
        and compression in (None, record["compression"])
    ]


def spearman(a, b):
    """Mean over rows, by scipy's own function."""
    return np.mean([scipy.stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])


def test_every_result_is_there_once(quick):
    data = quick[0]
    settings = data["settings"]
    assert settings["quick"] is True and list(settings["datasets"]) == DATASETS
    assert data["versions"]["torch"] == torch.__version__ and data["machine"]["cores"]
    assert data["runs"][0]["commit"] and data["runs"][0]["date"].startswith("20")
    for dataset in DATASETS:
        halves = of(data, "half", dataset)
        about = settings["datasets"][dataset]
        assert [h["seed"] for h in halves] == list(range(about["halves"]))
        m = about["m"]
        assert all(len(h["losses"]) == m and min(h["losses"]) > 0 for h in halves)
        scored = [(s["compression"], s["r"], s["seed"]) for s in of(data, "score", dataset)]
        wanted = itertools.product(CONTESTANTS, settings["totals"], range(settings["seeds"]))
        assert sorted(s for s in scored if s[2] is not None) == sorted(wanted)
        assert [s[0] for s in scored if s[2] is None] == ["Full", "gradient dot product"]
        timed = [(t["compression"], t["r"]) for t in of(data, "time", dataset)]
        names = [name for name in CONTESTANTS if name not in KEPT]
        wanted = [*itertools.product(names, settings["totals"]), ("Full", 256)]
        assert sorted(timed) == sorted(wanted)
        for record in of(data, "time", dataset):
            assert len(record["ms"]) == len(record["ratio"]) == about["rounds"]
            assert min(record["ms"] + record["ratio"]) > 0


def test_compressed_scores_come_near_the_whole_gradient(quick):
    """Of the gradient's coordinates, four times as many keep more; all of them keep everything."""
    for dataset in DATASETS:
        (whole,) = of(quick[0], "score", dataset, "Full")
        assert whole["rho"] == 1
        for compression in CONTESTANTS:
            rho = [
                statistics.fmean(s["rho"] for s in scored if s["r"] == r)
                for scored in [of(quick[0], "score", dataset, compression)]
                for r in quick[0]["settings"]["totals"]
            ]
            assert 0 < rho[0] < rho[1] < 1, (dataset, compression)


def test_auc_of_the_whole_gradient(quick, truth):
    """Against a count of pairs, where those count as open whose scores rounding could exchange."""
    scores, task = truth
    mean, spoiled = scores.mean(0), task.spoiled.numpy()
    assert 0 < spoiled.sum() < len(spoiled)
    gaps = mean[~spoiled][:, None] - mean[spoiled][None]
    rounding = 1e-3 * np.abs(scores).max()
    (whole,) = of(quick[0], "score", "digits-mlp", "Full")
    assert (gaps > rounding).mean() - 1e-5 <= whole["auc"] <= (gaps > -rounding).mean() + 1e-5
    assert (np.abs(gaps) < rounding).mean() < 0.02  # so that this says something


def test_lds_of_the_whole_gradient(quick, truth):
    """From the recorded losses, with halves drawn here."""
    scores, task = truth
    halves = of(quick[0], "half", "digits-mlp")
    losses = np.array([h["losses"] for h in halves])
    kept = [task.half(h["seed"]).numpy() for h in halves]
    assert all(len(set(half)) == len(task.train) // 2 for half in kept)
    assert len({tuple(sorted(half)) for half in kept}) == len(kept)
    sums = np.stack([scores[:, half].sum(1) for half in kept], 1)  # [m, halves]
    (whole,) = of(quick[0], "score", "digits-mlp", "Full")
    # Room for one pair of halves of one query that rounding exchanges.
    H, m = len(halves), len(scores)
    assert whole["lds"] == pytest.approx(spearman(sums, -losses.T), abs=12 / (H * (H**2 - 1) * m))


def test_a_half_is_trained_on_its_half_alone(quick, truth):
    """Its losses are those of training on just those examples; another half's differ."""
    task = truth[1]
    first, second = (h["losses"] for h in of(quick[0], "half", "digits-mlp")[:2])
    kept = task.half(0)
    alone = quality_tasks.replace(task, train=torch.utils.data.TensorDataset(*task.train[kept]))
    again = alone.query_losses(alone.trained()).tolist()
    assert np.allclose(first, again, rtol=1e-4) and not np.allclose(second, again, rtol=1e-2)


def test_measures():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (2, 7, 40)).astype(float)  # with ties
    assert quality.rank_correlation(a, b) == pytest.approx(spearman(a, b), abs=1e-5)
    spoiled = np.arange(40) % 4 == 0
    scores = a - 3 * spoiled
    mean = scores.mean(0)
    pairs = [
        (x < y) + 0.5 * (x == y) for x in mean[spoiled] for y in mean[~spoiled]
    ]  # a low score is suspicious
    assert quality.spoiled_auc(scores, spoiled) == pytest.approx(np.mean(pairs), abs=1e-5)
    members = rng.random((12, 40)) < 0.5
    losses = -(members @ scores.T)  # every example lowers the loss by its score
    assert quality.datamodeling_score(scores, members, losses) == 1
    assert quality.datamodeling_score(-scores, members, losses) == -1


@pytest.mark.parametrize("bad", [np.nan, np.inf, None], ids=str)
def test_scores_without_ranks_are_refused(bad):
    a = np.arange(12.0).reshape(3, 4)
    b = a.copy()
    b[1] = 5 if bad is None else bad
    with pytest.raises(ValueError, match="constant or not finite"):
        quality.rank_correlation(a, b)


def test_goes_on_where_it_was_ended(quick, tmp_path, capsys):
    """What is there is kept, what is not is made, and comes out the same."""
    data, _ = quick
    path = tmp_path / "again.json"
    lost = [
        of(data, "half", "digits-mlp")[2],
        *of(data, "score", "digits-mlp", "Dropout")[1:3],
    ]
    path.write_text(json.dumps({**data, "records": [r for r in data["records"] if r not in lost]}))
    arguments = ["--quick", "--compressions", "Dropout", "--datasets", "digits-mlp"]
    quality.main([*arguments, "--out", str(path)])
    assert "digits-mlp: 3 results to make" in capsys.readouterr().out
    again = json.loads(path.read_text())
    assert again["records"][: -len(lost)] == [r for r in data["records"] if r not in lost]
    for made, before in zip(again["records"][-len(lost) :], lost, strict=True):
        assert made.keys() == before.keys()
        for key, value in before.items():
            exact = isinstance(value, str | int | None)
            assert made[key] == (value if exact else pytest.approx(value, rel=1e-4)), key
    assert len(again["runs"]) == 2


@pytest.mark.parametrize("key", ["settings", "versions", "machine"])
def test_results_of_elsewhere_are_refused(quick, tmp_path, key):
    path = tmp_path / "elsewhere.json"
    text = json.dumps({**quick[0], key: {"other": 1}})
    path.write_text(text)
    with pytest.raises(SystemExit, match=f"was made with {key}"):
        quality.main(["--quick", "--out", str(path), "--compressions", "Dropout"])
    assert path.read_text() == text


def test_another_model_is_refused(quick, tmp_path):
    path = tmp_path / "model.json"
    data = json.loads(json.dumps(quick[0]))
    of(data, "model", "digits-mlp")[0]["losses"][0] *= 1.1
    path.write_text(json.dumps(data))
    arguments = ["--quick", "--compressions", "Dropout", "--datasets", "digits-mlp"]
    with pytest.raises(SystemExit, match="other query losses"):
        quality.main([*arguments, "--out", str(path)])


def test_what_is_missing_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "none.json"
    with pytest.raises(SystemExit, match="no \\['Nothing'\\]"):
        quality.main(["--quick", "--out", str(path), "--compressions", "Dropout,Nothing"])
    monkeypatch.setitem(COMPRESSIONS, "Gone", lambda r, seed: dropinf.Gone(r))
    monkeypatch.setattr(quality, "CONTESTANTS", ("Dropout", "Gone"))
    with pytest.raises(AttributeError, match="Gone"):
        quality.main(["--quick", "--out", str(path), "--compressions", "Dropout,Gone"])
    assert not path.exists()


def test_page_and_figures(quick):
    data, path = quick
    page = path.with_suffix(".md").read_text()
    values = [s for s in of(data, "score", "chars", "Dropout") if s["r"] == 256]
    cells = [
        f"{statistics.fmean(v):.3f} ± {statistics.stdev(v):.3f}"
        for v in ([s[measure] for s in values] for measure in ("rho", "auc", "lds"))
    ]
    section = page[page.index("\n## chars\n") :]
    assert f"| 256 | Dropout | {' | '.join(cells)} |" in section
    assert page.startswith("# What compressions keep of influence (--quick")
    for dataset in DATASETS:
        picture = path.with_name(f"quality-{dataset}.svg")
        assert f"({picture.name})" in page and "<svg" in picture.read_text()
