"""Attributions for people: text in a terminal, HTML in a notebook, pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dropinf.extras import optional
from dropinf.results.contents import Contents, Lookup, shortened
from dropinf.text_table import Table, printable

if TYPE_CHECKING:
    from dropinf.results.attribution import Attribution, Ranked

UNIT = (
    "A score is per example, of the summed loss, not divided by n: training without one example "
    "changes the query's loss by about its score / n, up where the score is positive."
)
_MOST_QUERIES = 20  # in a table of text


def table_of(
    found: Attribution, texts: Contents | None = None, most: int | None = _MOST_QUERIES
) -> Table:
    """A row for each query and rank, both ends beside each other."""
    lookup = Lookup(texts, "texts")
    columns = ["query", "rank", "top", "score", "bottom", "score"]
    if lookup:
        columns = ["query", "rank", "top", "score", "text", "bottom", "score", "text"]
    shown = len(found) if most is None else min(most, len(found))
    rows = []
    for q in range(shown):
        for j in range(len(found.top.ids[q])):
            cells = [str(found.query_ids[q]) if j == 0 else "", str(j + 1)]
            for ranked in (found.top, found.bottom):
                example = ranked.ids[q][j]
                cells += ["" if example is None else str(example), score_of(ranked, q, j)]
                if lookup:
                    cells.append("" if example is None else shortened(lookup(example), 40))
            rows.append(cells)
    numbers = [j for j, name in enumerate(columns) if name in ("rank", "score")]
    more = [f"... and {len(found) - shown:,} queries more"] if shown < len(found) else []
    facts = [f"{what}: {how}" for what, how in found.facts.rows()]
    return Table(columns, rows, numbers, [*more, UNIT, *facts])


def score_of(ranked: Ranked, q: int, j: int) -> str:
    """With its standard error, if there is one."""
    error = "" if ranked.errors is None else f" +- {float(ranked.errors[q, j]):.2g}"
    return f"{float(ranked.scores[q, j]):.4g}{error}"


def as_text(found: Attribution, texts: Lookup, query_texts: Lookup) -> str:
    """Query by query: its text, and those of both ends."""
    lines = []
    for q, query in enumerate(found.query_ids):
        own = f"  {shortened(query_texts(query), 200)}" if query_texts else ""
        lines.append(f"query {query}{own}")
        for title, ranked in (("lower its loss", found.top), ("raise it", found.bottom)):
            lines.append(f"  {title}")
            for j, example in enumerate(ranked.ids[q]):
                text = (
                    f"  {shortened(texts(example), 100)}" if texts and example is not None else ""
                )
                lines.append(f"    {score_of(ranked, q, j):>12}  {example}{text}")
        lines.append("")
    return "\n".join(printable(line) for line in [*lines, UNIT])


def picture(found: Attribution, images: Lookup, query_images: Lookup) -> Any:
    """A row of images for each query: its own, those of its top, those of its bottom."""
    figures = optional("matplotlib.figure", "report", "show(images=)")
    k = len(found.top.ids[0]) if len(found) else 0
    wide = 1 + 2 * k
    figure = figures.Figure(figsize=(1.1 * wide, 1.4 * max(1, len(found))), layout="constrained")
    axes = figure.subplots(max(1, len(found)), wide, squeeze=False)
    for row in axes:
        for axis in row:
            axis.set_axis_off()
    for q, query in enumerate(found.query_ids):
        cells: list[tuple[Any, str]] = []
        if query_images:
            cells.append((query_images(query), f"query {query}"))
        else:
            axes[q][0].text(0.5, 0.5, f"query {query}", ha="center", va="center", fontsize=8)
            cells.append((None, ""))
        for ranked in (found.top, found.bottom):
            cells += [
                (images(example), f"{example}\n{float(ranked.scores[q, j]):.3g}")
                for j, example in enumerate(ranked.ids[q])
            ]
        for axis, (image, title) in zip(axes[q], cells, strict=True):
            if image is not None:
                axis.imshow(_array(image), cmap="gray")
            axis.set_title(title, fontsize=7)
    figure.suptitle("the query; the examples that lower its loss; those that raise it", fontsize=9)
    return figure


def _array(image: Any) -> Any:
    """[H, W] or [H, W, 3] of an array, or of a tensor whose channels may come first."""
    import numpy as np

    array = np.asarray(image)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    return array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
