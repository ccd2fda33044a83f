"""What should come out of quality.py, and whether it does, computed from its records."""

import statistics
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

MEASURES = {"rho": "rho", "auc": "AUC", "lds": "LDS"}
NOISE = 2  # standard errors of a difference of means
DENSE = ("Gaussian", "Rademacher", "SJLT", "FJLT")  # need the whole gradient of each example
BOUNDED = (  # in time, so they
    "Sketch",
    "FactoredDropout",
    "LoGra",
    "Dropout by energy",
    "Dropout and shares by energy",
)
TIME_BOUND = 2  # times Dropout's at equal r
FEWER_BYTES = ("Dropout in bfloat16", "Dropout in float16", "Dropout in int8")
NOT_ASKED = "not asked"  # the word of a comparison that a claim makes a condition for


class Cell(NamedTuple):
    """One comparison: its figures, and "within", "above", "below" or `NOT_ASKED`.

    None if not measured.
    """

    text: str
    word: str | None


class Case(NamedTuple):
    """Comparisons of one kind, one for each r."""

    dataset: str
    compared: str
    cells: list[Cell]


class Claim(NamedTuple):
    """A sentence, the words of which every comparison must come to one, and the comparisons."""

    text: str
    wanted: tuple[str, ...]
    totals: list[int]
    cases: list[Case]

    def holds(self, case: Case) -> bool | None:
        words = [cell.word for cell in case.cells]
        return None if None in words else all(word in self.wanted for word in words)

    @property
    def verdict(self) -> str:
        words = Counter(cell.word for case in self.cases for cell in case.cells)
        if None in words or not words:
            return "not measured in full"
        counts = ", ".join(f"{count} {word}" for word, count in words.most_common())
        return f"{'holds' if set(words) <= set(self.wanted) else 'does not hold'} ({counts})"


class Measured:
    """The records, by what they are of."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.totals = data["settings"]["totals"]
        self.records = data["records"]
        present = {r["dataset"] for r in self.records if r["stage"] == "score"}
        self.datasets = [name for name in data["settings"]["datasets"] if name in present]

    def values(self, dataset: str, compression: str, r: int, measure: str) -> list[float]:
        """One for each seed, by seed."""
        records = sorted(self._of("score", dataset, compression, r), key=lambda x: x["seed"])
        return [record[measure] for record in records]

    def times(self, dataset: str, compression: str, r: int) -> dict[str, list[float]] | None:
        return next(self._of("time", dataset, compression, r), None)

    def _of(self, *wanted: Any) -> Iterable[dict[str, Any]]:
        names = ("stage", "dataset", "compression", "r")
        return (x for x in self.records if tuple(x[name] for name in names) == wanted)


def claims(measured: Measured) -> list[Claim]:
    totals, small = measured.totals, measured.totals[:2]
    every = tuple(MEASURES)
    return [
        Claim(
            "Sketch with s = 4 is within noise of Gaussian at every r",
            ("within",),
            totals,
            compare(measured, totals, "Sketch", "Gaussian", every),
        ),
        Claim(
            f"Sketch with s = 4 is above Dropout at small r ({' and '.join(map(str, small))})",
            ("above",),
            small,
            compare(measured, small, "Sketch", "Dropout", every),
        ),
        Claim(
            "Dropout is above the grid (FactoredDropout) in rho at equal r",
            ("above",),
            totals,
            compare(measured, totals, "Dropout", "FactoredDropout", ("rho",)),
        ),
        Claim(
            "Dropout is above LoGra in rho at equal r",
            ("above",),
            totals,
            compare(measured, totals, "Dropout", "LoGra", ("rho",)),
        ),
        Claim(
            "Dropout by energy is within noise of Gaussian or above at every r",
            ("within", "above"),
            totals,
            compare(measured, totals, "Dropout by energy", "Gaussian", every),
        ),
        Claim(
            "Dropout by energy is above Dropout where Gaussian is",
            ("above", NOT_ASKED),
            totals,
            compare(measured, totals, "Dropout by energy", "Dropout", every, above_if="Gaussian"),
        ),
        Claim(
            "Rows of Dropout kept in bfloat16, float16 and int8 are within noise of float32",
            ("within",),
            totals,
            [
                case
                for name in FEWER_BYTES
                for case in compare(measured, totals, name, "Dropout", every)
            ],
        ),
        Claim(
            f"{', '.join(BOUNDED)} collect within {TIME_BOUND} x Dropout's time at equal r "
            f"({', '.join(DENSE)} need the whole gradient)",
            ("within",),
            totals,
            [
                Case(
                    dataset,
                    f"{name} / Dropout, time",
                    [bounded(measured.times(dataset, name, r)) for r in totals],
                )
                for dataset in measured.datasets
                for name in BOUNDED
            ],
        ),
    ]


def compare(
    measured: Measured,
    totals: list[int],
    mine: str,
    other: str,
    measures: tuple[str, ...],
    above_if: str | None = None,
) -> list[Case]:
    """`mine` minus `other` in each measure of each dataset; `above_if` where that one is above."""
    cases = []
    for dataset in measured.datasets:
        for measure in measures:
            cells = []
            for r in totals:
                a, b, condition = (
                    measured.values(dataset, name, r, measure)
                    for name in (mine, other, above_if or other)
                )
                cell = difference(a, b, paired=mine in FEWER_BYTES)
                if above_if and cell.word:
                    cell = on_condition(cell, difference(condition, b).word, above_if)
                cells.append(cell)
            cases.append(Case(dataset, f"{mine} - {other}, {MEASURES[measure]}", cells))
    return cases


def difference(a: list[float], b: list[float], paired: bool = False) -> Cell:
    """mean(a) - mean(b), its standard error for independent seeds, and what that comes to.

    Paired values have their coordinates in common, seed by seed. Their standard error, which is
    that of the differences, is smaller than the noise, which is what independent seeds would have.
    """
    if min(len(a), len(b)) < 2 or (paired and len(a) != len(b)):
        return Cell("not measured", None)
    gap = statistics.fmean(a) - statistics.fmean(b)
    error = sum(statistics.variance(x) / len(x) for x in (a, b)) ** 0.5
    word = "within" if abs(gap) < NOISE * error else "above" if gap > 0 else "below"
    if paired:
        error = statistics.stdev(x - y for x, y in zip(a, b, strict=True)) / len(a) ** 0.5
        return Cell(f"{gap:+.4f} ± {error:.4f}, {word}", word)
    return Cell(f"{gap:+.3f} ± {error:.3f}, {word}", word)


def on_condition(cell: Cell, word: str | None, name: str) -> Cell:
    """The cell where `name` is "above"; elsewhere its figures alone."""
    if word is None:
        return Cell("not measured", None)
    return cell if word == "above" else Cell(f"{cell.text} ({name} is {word})", NOT_ASKED)


def bounded(times: dict[str, list[float]] | None) -> Cell:
    """Whether the median ratio of the rounds is within the bound."""
    if times is None:
        return Cell("not measured", None)
    word = "within" if statistics.median(times["ratio"]) <= TIME_BOUND else "above"
    return Cell(f"{spread(times['ratio'])}, {word}", word)


def spread(values: list[float]) -> str:
    """Median (smallest to largest)."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"
