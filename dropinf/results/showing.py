"""Attributions for people: text in a terminal, HTML in a notebook, pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dropinf.extras import optional
from dropinf.results.contents import Contents, Lookup, shortened
from dropinf.text_table import Table, printable, shown

if TYPE_CHECKING:
    from dropinf.results.attribution import Attribution, Ranked

_MOST_QUERIES = 20  # in a table of text


def table_of(
    found: Attribution, texts: Contents | None = None, most: int | None = _MOST_QUERIES
) -> Table:
    """A row for each query and rank, both ends beside each other."""
    lookup = Lookup(texts, "texts")
    columns = ["query", "rank", "top", "score", "bottom", "score"]
    if lookup:
        columns = ["query", "rank", "top", "score", "text", "bottom", "score", "text"]
    few = len(found) if most is None else min(most, len(found))
    rows = []
    for q in range(few):
        for j in range(len(found.top.ids[q])):
            cells = [str(found.query_ids[q]) if j == 0 else "", str(j + 1)]
            for ranked in (found.top, found.bottom):
                example = ranked.ids[q][j]
                cells += ["" if example is None else str(example), score_of(ranked, q, j)]
                if lookup:
                    cells.append("" if example is None else shortened(lookup(example), 40))
            rows.append(cells)
    numbers = [j for j, name in enumerate(columns) if name in ("rank", "score")]
    return Table(columns, rows, numbers, [*_more(found, few), *_made(found)])


def _more(found: Attribution, few: int) -> list[str]:
    return [f"... and {len(found) - few:,} queries more"] if few < len(found) else []


def _made(found: Attribution) -> list[str]:
    """What scores say, and how they were made."""
    return [found.facts.unit, *(f"{what}: {how}" for what, how in found.facts.rows())]


def score_of(ranked: Ranked, q: int, j: int, digits: int = 4) -> str:
    """With its standard error, if there is one."""
    error = "" if ranked.errors is None else f" +- {float(ranked.errors[q, j]):.2g}"
    return f"{float(ranked.scores[q, j]):.{digits}g}{error}"


def as_text(found: Attribution, texts: Lookup, query_texts: Lookup, few: int) -> str:
    """Query by query, the first few: its text, and those of both ends."""
    lines = []
    for q, query in enumerate(found.query_ids[:few]):
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
    return "\n".join(map(shown, [*lines, *_more(found, few), *_made(found)]))


def picture(found: Attribution, images: Lookup, query_images: Lookup, few: int) -> Any:
    """A row of images for each of the first few queries: its own, those of its top and bottom."""
    figures = optional("matplotlib.figure", "report", "show(images=)")
    k = len(found.top.ids[0]) if len(found) else 0
    wide = 1 + 2 * k
    figure = figures.Figure(figsize=(1.1 * wide, 1.4 * max(1, few)), layout="constrained")
    axes = figure.subplots(max(1, few), wide, squeeze=False)
    for row in axes:
        for axis in row:
            axis.set_axis_off()
    for q, query in enumerate(found.query_ids[:few]):
        cells: list[tuple[Any, str]] = []
        if query_images:
            cells.append((query_images(query), f"query {_name(query)}"))
        else:
            place = {"ha": "center", "va": "center", "parse_math": False}
            axes[q][0].text(0.5, 0.5, f"query {_name(query)}", fontsize=8, **place)
            cells.append((None, ""))
        for ranked in (found.top, found.bottom):
            cells += [
                (images(example), f"{_name(example)}\n{score_of(ranked, q, j, 3)}")
                for j, example in enumerate(ranked.ids[q])
            ]
        for axis, (image, title) in zip(axes[q], cells, strict=True):
            if image is not None:
                axis.imshow(_array(image), cmap="gray")
            axis.set_title(title, fontsize=7, parse_math=False)  # ids may have dollar signs
    facts = found.facts
    figure.suptitle(
        "the query; the examples that lower its loss; those that raise it\n"
        + "".join(f"{line}\n" for line in _more(found, few))
        + printable(f"{facts.unit} {facts.compression}, {facts.solver}; {facts.proof}"),
        fontsize=8,
        parse_math=False,
        wrap=True,
    )
    return figure


def _name(id_: Any) -> str:
    return printable(shortened(str(id_), 24))


def _array(image: Any) -> Any:
    """[H, W], or [H, W, 3 or 4] from 0 to 1 or of bytes.

    Raises:
        ValueError: it is no image.
    """
    import numpy as np

    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = image.float() if image.dtype == torch.bfloat16 else image  # numpy has none
    array, channels = np.asarray(image), (1, 3, 4)
    # Where both ends may be the channels, tensors have them first and arrays last.
    first = isinstance(image, Tensor) or array.shape[-1:] not in [(c,) for c in channels]
    if array.ndim == 3 and array.shape[0] in channels and first:
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in channels):
        raise ValueError(
            f"show: an image must be [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels, got "
            f"{list(array.shape)}"
        )
    if array.ndim == 3 and array.dtype.kind == "f" and array.size:
        low, high = array.min(), array.max()
        if low < 0 or high > 1:  # as normalised for a model, or 0 to 255
            array = (array - low) / (high - low if high > low else 1)
    return array
