"""Markdown tables, a figure and the sentences of what sources.py recorded."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pages
from pages import new_figure, row, rows_of, save_figure

FLOOR = "BM25"


class Found:
    """The records, by what they are of."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.settings, self.records = data["settings"], data["records"]
        (self.model,) = (x for x in self.records if x["stage"] == "model")
        shares = [x for x in self.records if x["stage"] == "share"]
        self.by_key: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
        for record in shares:  # masks of a method and r together
            self.by_key.setdefault((record["method"], record["r"]), []).append(record)
        methods = list(dict.fromkeys(method for method, _ in self.by_key))
        ordered = sorted(self.by_key, key=lambda key: (methods.index(key[0]), key[1] or 0))
        self.by_key = {key: self.by_key[key] for key in ordered}
        self.chance = {k: shares[0][f"chance_{k}"] for k in self.settings["ks"]}

    def share(self, key: tuple[str, int | None], k: int) -> float:
        """Mean over masks."""
        return statistics.fmean(x[f"share_{k}"] for x in self.by_key[key])

    def errors(self, key: tuple[str, int | None], k: int) -> tuple[float, float]:
        """Standard errors over queries, of one mask, and over masks (0 where there is none)."""
        records = self.by_key[key]
        masks = [x[f"share_{k}"] for x in records]
        over_masks = statistics.stdev(masks) / len(masks) ** 0.5 if len(masks) > 1 else 0.0
        return statistics.fmean(x[f"error_{k}"] for x in records), over_masks

    def of_source(self, key: tuple[str, int | None], k: int, source: int) -> float:
        return statistics.fmean(x[f"sources_{k}"][source] for x in self.by_key[key])

    def compared(self, k: int) -> list[tuple[str, tuple[str, int | None], float, float]]:
        """Each source, the best method but BM25 for it, its share and BM25's."""
        others = [key for key in self.by_key if key[0] != FLOOR]
        found = []
        for number, source in enumerate(self.settings["sources"]):
            best = max(others, key=lambda key: self.of_source(key, k, number))
            floor = self.of_source((FLOOR, None), k, number)
            found.append((source, best, self.of_source(best, k, number), floor))
        return found


def write_report(data: dict[str, Any], page: Path, figures: Path) -> None:
    """The page, and its figure."""
    found = Found(data)
    drawn = draw(found, figures / "sources.svg")
    link = pages.link(drawn, page)
    lines = [*head(data, found), "", *table(found), "", f"![Share of the top k]({link})", ""]
    lines += ["## By source", "", *by_source(found), "", "## What comes out", ""]
    lines += conclusions(found)
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def head(data: dict[str, Any], found: Found) -> Iterator[str]:
    settings, model = data["settings"], found.model
    sources = settings["sources"]
    yield from pages.head("sources", "Whose texts come first", data)
    yield (
        f"A transformer of {settings['layers']} layers and width {settings['width']} "
        f"({model['parameters']:,} parameters) that predicts the next of "
        f"{settings['vocabulary']:,} byte pairs, trained for {settings['epochs']} epochs on "
        f"{settings['train']} windows of {settings['T']} tokens of each of {len(sources)} "
        f"sources. Its loss is "
        f"{model['loss']:.2f} nats a token on these, and on queries, of other documents, "
        + ", ".join(
            f"{name} {loss:.2f}" for name, loss in zip(sources, model["query_losses"], strict=True)
        )
        + f". It is a weak language model. {settings['queries']} queries of each source."
    )
    yield ""
    yield (
        "Share of the k training windows of highest score that are from the query's own source, "
        f"mean over queries and {settings['masks']} masks; ± is the standard error over queries "
        "of one mask, and then over masks where there are some. r counts coordinates over all "
        f"layers. Scores are of solvers.Cholesky(damping={settings['damping']}), but for the dot "
        "product, the cosine and rows of length 1, which have no inverse."
    )


def table(found: Found) -> Iterator[str]:
    ks = found.settings["ks"]
    yield from rows_of(("method", "r", *(f"top {k}" for k in ks)))
    yield row("chance", "", *(f"{found.chance[k]:.3f}" for k in ks))
    for key in found.by_key:
        yield row(
            key[0], "" if key[1] is None else key[1], *(with_errors(found, key, k) for k in ks)
        )


def with_errors(found: Found, key: tuple[str, int | None], k: int) -> str:
    queries, masks = found.errors(key, k)
    text = f"{found.share(key, k):.3f} ± {queries:.3f}"
    return text if len(found.by_key[key]) == 1 else f"{text}, ± {masks:.3f}"


def shown(found: Found) -> list[tuple[str, int | None]]:
    """A row each: methods without r, and the others at the largest one."""
    largest = max(found.settings["totals"])
    return [key for key in found.by_key if key[1] in (None, largest)]


def by_source(found: Found) -> Iterator[str]:
    k = found.settings["ks"][0]
    yield f"Top {k}, the largest r."
    yield ""
    sources = found.settings["sources"]
    yield from rows_of(("method", *sources))
    for key in shown(found):
        cells = (f"{found.of_source(key, k, number):.2f}" for number in range(len(sources)))
        yield row(named(key), *cells)


def conclusions(found: Found) -> Iterator[str]:
    for k in found.settings["ks"]:
        others = [key for key in found.by_key if key[0] != FLOOR]
        best = max(others, key=lambda key: found.share(key, k))
        dropout = ("Dropout", max(found.settings["totals"]))
        floor = (FLOOR, None)
        yield (
            f"- Top {k}: {named(best)} has the largest share, {found.share(best, k):.3f}; "
            f"{named(dropout)} {found.share(dropout, k):.3f}, {FLOOR} {found.share(floor, k):.3f}, "
            f"chance {found.chance[k]:.3f}."
        )
        below = [key for key in others if found.share(key, k) < found.share(floor, k)]
        yield f"- Top {k}: below {FLOOR}: {'; '.join(together(below)) or 'none'}."
        won = [
            f"{source} ({share:.2f} of {named(key)} against {own:.2f})"
            for source, key, share, own in found.compared(k)
            if own > share
        ]
        yield f"- Top {k}: {FLOOR} is above every other method on {', '.join(won) or 'no source'}."


def named(key: tuple[str, int | None]) -> str:
    return key[0] if key[1] is None else f"{key[0]} at r = {key[1]}"


def together(keys: list[tuple[str, int | None]]) -> list[str]:
    """Each method once, with all its r."""
    sizes: dict[str, list[str]] = {}
    for method, r in keys:
        sizes.setdefault(method, []).extend([] if r is None else [str(r)])
    return [f"{name} at r = {', '.join(r)}" if r else name for name, r in sizes.items()]


def draw(found: Found, path: Path) -> Path:
    """Share against r, a panel for each k; what has no r as lines."""
    from matplotlib import colormaps

    ks, totals = found.settings["ks"], found.settings["totals"]
    figure, panels = new_figure("sources", 1, len(ks), figsize=(9, 4.8))
    methods = list(dict.fromkeys(method for method, r in found.by_key if r is not None))
    without = [key for key in found.by_key if key[1] is None]
    for panel, k in zip(panels, ks, strict=True):
        for number, method in enumerate(methods):
            panel.errorbar(
                # Side by side, so that no error bar hides another.
                [r * 1.04 ** (number - (len(methods) - 1) / 2) for r in totals],
                [found.share((method, r), k) for r in totals],
                [found.errors((method, r), k)[0] for r in totals],
                label=method,
                color=f"C{number}",
                marker="o",
                markersize=3,
                linewidth=1,
            )
        for number, key in enumerate(without):
            color = "black" if key[0] == FLOOR else colormaps["Dark2"](number)
            panel.axhline(found.share(key, k), label=key[0], color=color, linestyle="--")
        panel.axhline(found.chance[k], label="chance", color="grey", linestyle=":")
        panel.set_xscale("log", base=2)
        panel.set_xticks(totals, [str(r) for r in totals])
        panel.minorticks_off()
        panel.set_xlabel("r over all layers")
        panel.set_title(f"share of the top {k} from the query's source", fontsize=10)
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return save_figure(figure, path)
