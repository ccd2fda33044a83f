"""What bench/experiments/quality.py concludes, from records with planted values."""

import itertools

import numpy as np
import pytest
import scipy.stats
from quality_claims import BOUNDED, DENSE, FEWER_BYTES, Measured, claims, difference
from quality_contestants import BY_ENERGY, COMPRESSIONS, KEPT
from quality_report import write_report

pytestmark = pytest.mark.more


def planted(values, ratio=1.0):
    """Records of one dataset: `values` maps a compression to its three values at every r."""
    names = ("stage", "dataset", "compression", "r", "seed")
    records = []
    for (name, each), r in itertools.product(values.items(), (64, 256, 1024)):
        for seed, value in enumerate(each):
            key = dict(zip(names, ("score", "d", name, r, seed), strict=True))
            records.append({**key, "rho": value, "auc": value, "lds": value})
        key = dict(zip(names, ("time", "d", name, r, None), strict=True))
        records.append({**key, "ms": [1.0, 2.0, 3.0], "ratio": [ratio, ratio, 9.0]})
    settings = {"totals": [64, 256, 1024], "datasets": {"d": {}}}
    return {"settings": settings, "records": records}


GOOD = {
    "Dropout": [0.50, 0.51, 0.52],
    "Sketch": [0.60, 0.61, 0.62],
    "Gaussian": [0.59, 0.61, 0.63],
    "FactoredDropout": [0.40, 0.41, 0.42],
    "LoGra": [0.42, 0.43, 0.44],
    "Dropout by energy": [0.60, 0.61, 0.62],
    "Dropout and shares by energy": [0.60, 0.61, 0.62],
    "Dropout in bfloat16": [0.50, 0.51, 0.52],
    "Dropout in float16": [0.50, 0.51, 0.52],
    "Dropout in int8": [0.499, 0.509, 0.519],
}


def verdicts(values, ratio=1.0):
    return [claim.verdict for claim in claims(Measured(planted(values, ratio)))]


def test_claims_that_hold():
    assert verdicts(GOOD, ratio=2.0) == [
        "holds (9 within)",
        "holds (6 above)",
        "holds (3 above)",
        "holds (3 above)",
        "holds (9 within)",
        "holds (9 above)",
        "holds (27 within)",
        "holds (15 within)",
    ]


@pytest.mark.parametrize(
    "change, number, verdict",
    [
        ({"Gaussian": [0.70, 0.71, 0.72]}, 0, "does not hold (9 below)"),
        ({"Gaussian": [0.30, 0.31, 0.32]}, 0, "does not hold (9 above)"),
        ({"Sketch": [0.40, 0.51, 0.62]}, 1, "does not hold (6 within)"),
        ({"FactoredDropout": [0.7, 0.71, 0.72]}, 2, "does not hold (3 below)"),
        ({"LoGra": [0.50, 0.51, 0.52]}, 3, "does not hold (3 within)"),
        ({"Gaussian": [0.70, 0.71, 0.72]}, 4, "does not hold (9 below)"),
        ({"Dropout by energy": [0.50, 0.51, 0.52]}, 5, "does not hold (9 within)"),
        ({"Dropout in int8": [0.45, 0.46, 0.47]}, 6, "does not hold (18 within, 9 below)"),
    ],
)
def test_claims_that_do_not(change, number, verdict):
    assert verdicts(GOOD | change)[number] == verdict


@pytest.mark.parametrize(
    "change, number, verdict",
    [
        ({"Gaussian": [0.40, 0.41, 0.42]}, 4, "holds (9 above)"),
        # Where Gaussian is no better than Dropout, nothing is asked of energies.
        ({"Gaussian": [0.50, 0.51, 0.52]}, 5, "holds (9 not asked)"),
        ({"Gaussian": [0.40, 0.41, 0.42]}, 5, "holds (9 not asked)"),
    ],
)
def test_claims_with_a_choice(change, number, verdict):
    assert verdicts(GOOD | change)[number] == verdict


def test_times_that_are_too_long():
    assert verdicts(GOOD, ratio=2.01)[-1] == "does not hold (15 above)"


def test_a_claim_without_its_records_is_not_judged():
    without = {name: v for name, v in GOOD.items() if name != "Sketch"}
    found = verdicts(without)
    assert [found[i] for i in (0, 1, 7)] == 3 * ["not measured in full"]
    assert found[2].startswith("holds")
    without = {name: v for name, v in GOOD.items() if name != "Gaussian"}
    assert verdicts(without)[4:6] == 2 * ["not measured in full"]


def test_standard_error():
    """Against Welch's statistic, difference over standard error."""
    a, b = [0.3, 0.32, 0.37, 0.29], [0.25, 0.31, 0.28]
    error = (np.mean(a) - np.mean(b)) / scipy.stats.ttest_ind(a, b, equal_var=False).statistic
    assert difference(a, b).text == f"{np.mean(a) - np.mean(b):+.3f} ± {error:.3f}, within"


def test_paired_differences():
    """Seed by seed, whatever the order of the records; what is noise is that of `difference`."""
    a, b = [0.30, 0.39, 0.50], [0.31, 0.40, 0.52]
    error = scipy.stats.sem(np.subtract(a, b))
    cell = difference(a, b, paired=True)
    assert cell.text == f"{np.mean(a) - np.mean(b):+.4f} ± {error:.4f}, within"
    far = difference(a, [x - 1 for x in b], paired=True)
    assert far.word == "above" == difference(a, [x - 1 for x in b]).word
    assert difference(a, b[:2], paired=True).word is None
    data = planted(GOOD)
    turned = sorted(
        data["records"], key=lambda x: -(x["seed"] or 0) * (x["compression"] == "Dropout in int8")
    )
    mixed = {**data, "records": turned}
    assert claims(Measured(mixed))[6] == claims(Measured(data))[6]


def test_claims_know_every_contestant():
    assert {"Dropout", *BOUNDED, *DENSE} == {*COMPRESSIONS, *BY_ENERGY}
    assert tuple(KEPT) == FEWER_BYTES


def test_a_page_says_what_was_not_measured(tmp_path):
    data = planted({name: GOOD[name] for name in ("Dropout", "LoGra")})
    data["settings"] |= {"quick": False, "damping": 0.1, "seeds": 3, "threads": 1}
    about = {"about": "x", "n": 1, "spoiled": 1, "m": 1, "epochs": 1, "batch_size": 1, "lr": 1}
    about |= {"halves": 1, "rounds": 3}
    data["settings"]["datasets"]["d"] = about
    data |= {"machine": {"cpu": "c", "cores": 1, "system": "s"}, "versions": {"torch": "t"}}
    data["runs"] = [{"date": "2026-01-01", "commit": "abc"}]
    write_report(data, tmp_path / "page.md", tmp_path / "figures")
    page = (tmp_path / "page.md").read_text()
    assert "at every r: not measured in full" in page and "LoGra in rho at equal r: holds" in page
    assert "(figures/quality-d.svg)" in page and (tmp_path / "figures/quality-d.svg").exists()
