"""Tables for people, as text."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def print_table(rows: Sequence[Sequence[str]], right: Collection[int]) -> None:
    """Print rows of cells in aligned columns; the columns in `right` at their right edges."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        aligned = [
            cell.rjust(w) if j in right else cell.ljust(w)
            for j, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        print("  ".join(aligned).rstrip())
