"""python -m dropinf bench: results with content, fits, checks that can fail, comparisons."""

import copy
import importlib.metadata
import json
import math
import time

import pytest
import torch

from dropinf.tools import measuring
from dropinf.tools.microbenchmark import check, formed, main, page, passes, sweep
from dropinf.tools.microbenchmark.formed import Point

pytestmark = pytest.mark.more

CPU = torch.device("cpu")
TINY = sweep.Preset(
    {"formed": Point(4, 16, 2000), "passes": Point(2, 16, 32**2)},
    {
        "formed": {"n": (4, 8), "r": (16, 64), "d": (2000, 4000, 8000)},
        "passes": {"n": (2, 4), "r": (16,), "d": (32**2, 64**2)},
    },
    budget=10.0,
    rounds=2,
    loop_seconds=1e-4,
)
FEW = {
    "formed": (formed.FLOOR, formed.OURS, "dropinf Gaussian"),
    "passes": (passes.FLOOR, passes.OURS, "Opacus + index"),
}


def keep(monkeypatch, setting, names):
    module = sweep.SETTINGS[setting]
    few = {name: module.CONTESTANTS[name] for name in names}
    monkeypatch.setattr(module, "CONTESTANTS", few)


@pytest.fixture
def tiny(monkeypatch):
    for setting, names in FEW.items():
        keep(monkeypatch, setting, names)
    monkeypatch.setitem(sweep.PRESETS, "quick", TINY)


def test_results(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    main.run("quick", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["versions"]["torch"] == torch.__version__ and results["machine"]
    for setting, found in results["settings"].items():
        able = [n for n in FEW[setting] if n not in found["left_out"]]
        assert len(found["points"]) == {"formed": 5, "passes": 3}[setting]
        for point in found["points"]:
            assert list(point["ms"]) == able and not point["left_out"]
            assert point["ratio"][found["ours"]] == [1, 1, 1]
            for median, low, high in point["ms"].values():
                assert 0 < low <= median <= high
        assert set(found["peak_mb"]) == set(able)
    text = (tmp_path / "out" / "page.md").read_text()
    assert "| dropinf Gaussian |" in text and "## Compressing inside of a backward pass" in text
    if "Opacus + index" in results["settings"]["passes"]["left_out"]:
        assert "opacus is not installed; pip install 'dropinf[peers]'" in text
    for setting in FEW:
        for variable in "nrd":
            assert f"]({setting}-{variable}.svg)" in text
            assert "<svg" in (tmp_path / "out" / f"{setting}-{variable}.svg").read_text()
    assert main.compare(results, results, lambda: results) == []


@pytest.mark.parametrize(
    "setting, name", [(s, n) for s in FEW for n in sweep.SETTINGS[s].CONTESTANTS]
)
def test_contestants_compute_what_they_should(setting, name, monkeypatch):
    """And one that is off is found: by a half, or, of peers' own maps, in the order of its rows."""
    module = sweep.SETTINGS[setting]
    try:
        module.check(name, CPU)
    except measuring.LeftOut as reason:
        pytest.skip(str(reason))
    right = module.CONTESTANTS[name]

    def wrong(given):
        call = right(given)

        def spoilt():
            out = call()
            if setting == "passes" and name in passes.PEERS:
                return out.roll(1, 0)
            return [1.5 * t for t in out] if isinstance(out, tuple) else 1.5 * out

        return spoilt

    monkeypatch.setattr(module, "CONTESTANTS", {**module.CONTESTANTS, name: wrong})
    with pytest.raises(AssertionError):
        module.check(name, CPU)


@pytest.mark.parametrize("name", ["dropinf Gaussian", "dropinf LoGra"])
def test_projections_must_be_linear(name, monkeypatch):
    """Right norms alone do not pass."""
    right = formed.CONTESTANTS[name]

    def wrong(given):
        call = right(given)
        return lambda: call().abs()

    monkeypatch.setattr(formed, "CONTESTANTS", {**formed.CONTESTANTS, name: wrong})
    with pytest.raises(AssertionError, match="is not linear"):
        formed.check(name, CPU)


def test_dattri_mask_is_drawn_once(monkeypatch):
    """Its best form draws before it is timed; the other form draws in each call."""
    projection = pytest.importorskip("dattri.func.projection")
    drawn, right = [], projection.random_project
    monkeypatch.setattr(
        projection, "random_project", lambda *a, **k: drawn.append(1) or right(*a, **k)
    )
    given = formed.make(Point(4, 16, 2000), CPU)
    for name, times in (("", 0), (", made for each batch", 3)):
        call = formed.CONTESTANTS[f"dattri random_mask{name}"](given)
        drawn.clear()
        for _ in range(3):
            call()
        assert len(drawn) == times


def test_missing_peer_is_named(monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(formed, "version", missing)
    able, left_out = sweep._able(formed, CPU)
    assert formed.OURS in able and "TRAK normal" not in able
    assert left_out["TRAK normal"].startswith(
        "traker is not installed; pip install 'dropinf[peers]'"
    )


def test_over_budget(monkeypatch, tmp_path):
    """What takes too long is left out there and at larger sizes, and the page says so."""

    def slow_from(n, d):
        def contestant(given):
            def call():
                time.sleep(0.2 if given.grads.shape[0] >= n and given.grads.shape[1] >= d else 0)

            return call

        return contestant

    contestants = {formed.OURS: slow_from(0, 10**9), "slow": slow_from(0, 4000)}
    contestants["slow for many"] = slow_from(8, 0)  # which are no part of the sizes that follow
    monkeypatch.setattr(formed, "CONTESTANTS", contestants)
    monkeypatch.setattr(formed, "FLOOR", formed.OURS)
    monkeypatch.setattr(formed, "check", lambda name, device: None)
    monkeypatch.setattr(sweep, "SETTINGS", {"formed": formed})
    monkeypatch.setattr(sweep, "_peaks", lambda *args: {})
    results = sweep.measure("quick", TINY._replace(budget=0.1))
    left = {(p["n"], p["d"]): p["left_out"] for p in results["settings"]["formed"]["points"]}
    assert left.pop((8, 2000)) == {"slow for many": "over budget: 0.2 s"}
    assert left.pop((4, 4000)) == {"slow": "over budget: 0.2 s"}
    assert left.pop((4, 8000)) == {"slow": "over budget: 0.2 s at a smaller size"}
    assert not any(left.values())
    page.write(results, tmp_path)
    text = (tmp_path / "page.md").read_text()
    (fits,) = (
        x for x in text.splitlines() if x.startswith(f"| {formed.OURS} |") and " 2,000 to " in x
    )
    assert fits.endswith(", 2,000 to 8,000 |") and ", 4 to 8 |" in fits
    assert "- slow at n=4, r=16, d=4,000 (over budget: 0.2 s); n=4, r=16, d=8,000 (over" in text


def test_ours_and_the_floor_have_no_budget(monkeypatch):
    """Without them there would be no ratios."""
    keep(monkeypatch, "formed", (formed.FLOOR, formed.OURS, "dropinf FJLT"))
    monkeypatch.setattr(sweep, "SETTINGS", {"formed": formed})
    monkeypatch.setattr(sweep, "_peaks", lambda *args: {})
    results = sweep.measure("quick", TINY._replace(budget=0.0))
    for point in results["settings"]["formed"]["points"]:
        assert list(point["ms"]) == [formed.FLOOR, formed.OURS]
        assert "over budget" in point["left_out"]["dropinf FJLT"]


def test_fit():
    """Powers are found, with how far off the times are."""
    sizes = [10, 100, 1000, 10000]
    line = page.fit(sizes, [3 * x**0.7 for x in sizes])
    assert line.exponent == pytest.approx(0.7) and line.last == pytest.approx(0.7)
    assert line.residual == pytest.approx(1) and (line.low, line.high) == (10, 10000)
    line = page.fit(sizes, [5 + 0.01 * x for x in sizes])
    assert line.exponent < line.last == pytest.approx(math.log10(105 / 15))
    assert line.residual > 1.3


def test_peer_that_does_not_import_is_named(monkeypatch):
    """One of dropinf's own is an error."""

    def broken(given):
        raise ImportError("no torchvision::nms")

    keep(monkeypatch, "formed", (formed.OURS, "TRAK normal"))
    monkeypatch.setitem(formed.CONTESTANTS, "TRAK normal", broken)
    assert sweep._able(formed, CPU) == (
        [formed.OURS],
        {"TRAK normal": "does not import: no torchvision::nms"},
    )
    monkeypatch.setitem(formed.CONTESTANTS, formed.OURS, broken)
    with pytest.raises(ImportError):
        sweep._able(formed, CPU)


def test_missing_cuda_projector_is_named(monkeypatch):
    """With the extra that has it, which is not `peers`."""
    with pytest.raises(
        measuring.LeftOut, match=r"fast_jl is not installed; pip install 'traker\[fast"
    ):
        formed.need("fast_jl", "traker[fast]")


def result(left_out=(), **ms):
    point = {"n": 1, "r": 2, "d": 3, "left_out": dict(left_out)}
    points = [{**point, "ms": {"floor": [2.0, 1.9, 2.1], **ms}}]
    return {
        "preset": "quick",
        "budget": 0.1,
        "settings": {"formed": {"floor": "floor", "points": points}},
    }


OLD = result(**{"dropinf a": [4.0, 3.6, 4.4], "dropinf b": [1.0, 0.9, 1.1], "peer": [1, 1, 1]})


@pytest.mark.parametrize(
    "new, named",
    [
        ({"dropinf a": [4.0, 3.6, 4.4]}, []),
        ({"dropinf a": [5.0, 4.4, 5.6]}, []),  # within both spreads and a quarter
        ({"dropinf a": [6.0, 5.8, 6.2]}, []),  # within the floor's as well
        ({"dropinf a": [8.0, 7.6, 8.4]}, ["dropinf a"]),
        ({"dropinf a": [8.0, 4.0, 9.0]}, []),  # its smallest is as before
        ({"dropinf a": [1.0, 0.9, 1.1], "peer": [9, 9, 9]}, []),  # faster, and a peer
        ({"dropinf b": [2.0, 1.8, 2.2], "dropinf a": [9.0, 8.8, 9.9]}, ["dropinf a", "dropinf b"]),
    ],
)
def test_slower(new, named):
    lines = check.slower(OLD, result(**new))
    assert sorted(line.split(" at ")[0].removeprefix("formed: ") for line in lines) == named


def test_over_budget_is_slower():
    """What has no time any more is named, unless it had none before, or is a peer."""
    late = {"dropinf a": "over budget: 9.0 s", "peer": "over budget: 9.0 s"}
    new = result(late, **{"dropinf b": [1.0, 0.9, 1.1]})
    (line,) = check.slower(OLD, new)
    assert "dropinf a at n=1, r=2, d=3 is left out, over budget: 9.0 s" in line
    assert check.slower(new, new) == []
    # 5 ms are 2.5 floors, and its largest was 2.2: within a quarter.
    assert check.slower(OLD, {**new, "budget": 0.005}) == []


def test_missing_baseline_is_said_before_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "measure", lambda *args: pytest.fail("it was measured"))
    with pytest.raises(ValueError, match=r"nowhere\.json is not there; .* --preset quick --out"):
        main.run("quick", tmp_path, against=tmp_path / "nowhere.json")


@pytest.mark.parametrize("again, status", [(9.0, 1), (4.0, 0)])
def test_slower_in_a_second_measurement_too(again, status, capsys):
    def at(ms):
        return result(**{"dropinf a": [ms, ms, ms]})

    assert len(main.compare(OLD, at(8.0), lambda: at(again))) == status
    said = capsys.readouterr().out
    assert ("dropinf a at n=1" in said) == bool(status)
    assert ("nothing became slower" in said) != bool(status)


def test_slower_machine_is_not_slower():
    new = copy.deepcopy(OLD)
    (point,) = new["settings"]["formed"]["points"]
    point["ms"] = {name: [3 * x for x in ms] for name, ms in point["ms"].items()}
    assert check.slower(OLD, new) == []


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match="of presets 'quick' and 'full'"):
        check.slower(OLD, {**OLD, "preset": "full"})
    other = copy.deepcopy(OLD)
    other["settings"]["formed"]["points"][0]["n"] = 7
    with pytest.raises(ValueError, match="no size in common"):
        check.slower(OLD, other)


def test_gpu_preset_without_one():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="preset 'gpu' needs a CUDA device"):
        sweep.measure("gpu", sweep.PRESETS["gpu"])
