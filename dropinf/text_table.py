"""Tables for people, as text; what a terminal would act on, or cannot show, is written out."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence


def printable(text: str) -> str:
    """`text` on one line, its control characters as Python escapes: names come out of files too."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def print_table(rows: Sequence[Sequence[str]], right: Collection[int]) -> None:
    """Print rows of cells in aligned columns; the columns in `right` at their right edges."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    shown = [
        [printable(cell).encode(encoding, "backslashreplace").decode(encoding) for cell in cells]
        for cells in rows
    ]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for cells in shown:
        aligned = [
            cell.rjust(w) if j in right else cell.ljust(w)
            for j, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        print("  ".join(aligned).rstrip())
