"""Tables for people, as text and HTML; what a terminal would act on, or cannot show, is escaped."""

from __future__ import annotations

import html
import sys
import unicodedata
from collections.abc import Collection, Sequence
from typing import Any

from dropinf.extras import optional

_ABOVE = ("Mn", "Me")  # what stands on the character before it


def printable(text: str) -> str:
    """`text` on one line, its control characters as Python escapes: names come out of files too."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(text: str) -> str:
    """As `printable`, of characters that sys.stdout has."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


def width_of(text: str) -> int:
    """Cells of a terminal that it takes: wide characters two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(
        2 if unicodedata.east_asian_width(c) in "WF" else unicodedata.category(c) not in _ABOVE
        for c in text
    )


class Table:
    """Cells under headings. It prints as aligned columns, and shows itself in a notebook.

    Attributes:
        columns: the headings.
        rows: lists of cells, as text.
        notes: lines below.
    """

    def __init__(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        right: Collection[int] = (),
        notes: Sequence[str] = (),
    ) -> None:
        """`right` are the columns that stand at their right edges."""
        self.columns, self.rows, self.notes = list(columns), [list(row) for row in rows], [*notes]
        self._right = set(right)

    def __str__(self) -> str:
        """As the terminal can show it: in the encoding of sys.stdout."""
        table = [list(map(shown, cells)) for cells in (self.columns, *self.rows)]
        widths = [max(map(width_of, column)) for column in zip(*table, strict=True)]
        lines = []
        for cells in table:
            aligned = []
            for j, (cell, width) in enumerate(zip(cells, widths, strict=True)):
                space = " " * (width - width_of(cell))
                aligned.append(space + cell if j in self._right else cell + space)
            lines.append("  ".join(aligned).rstrip())
        return "\n".join([*lines, *map(shown, self.notes)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The table for a notebook; every cell is escaped."""

        def line(cells: Sequence[str], of: str) -> str:
            return "".join(
                f'<{of} dir="auto"{self._edge(j)}>{html.escape(cell)}</{of}>'
                for j, cell in enumerate(cells)
            )

        body = "\n".join(f"<tr>{line(cells, 'td')}</tr>" for cells in self.rows)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        head = f"<thead><tr>{line(self.columns, 'th')}</tr></thead>"
        return f"<table>\n{head}\n<tbody>\n{body}\n</tbody></table>\n{notes}"

    def _edge(self, column: int) -> str:
        return ' style="text-align: right"' if column in self._right else ""

    def to_pandas(self) -> Any:
        """A pandas.DataFrame of the cells, as text."""
        pandas = optional("pandas", "report", "Table.to_pandas")
        return pandas.DataFrame(self.rows, columns=self.columns)
