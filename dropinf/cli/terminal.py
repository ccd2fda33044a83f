"""What a command says: its result on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dropinf.rows import passes_watched
from dropinf.text_table import printable

_DELAY = 0.5  # seconds, before a bar appears


@dataclass(frozen=True)
class Terminal:
    """Where a command says what it found.

    Attributes:
        command: "dropinf topk", with which each line on stderr begins.
        quiet: whether to leave out progress and notes.
        as_json: whether the result is one JSON object.
    """

    command: str
    quiet: bool = False
    as_json: bool = False

    @property
    def progress(self) -> bool:
        """Whether to show bars, which are for who looks on."""
        return not self.quiet and sys.stderr.isatty()

    @contextlib.contextmanager
    def passes(self, label: str) -> Iterator[None]:
        """Inside, a bar for each pass over the rows of a store that takes a while."""
        if not self.progress:
            yield
            return
        from tqdm import tqdm

        number = 0

        @contextlib.contextmanager
        def bar(num_rows: int) -> Iterator[Callable[[int], object]]:
            nonlocal number
            number += 1
            name = label if number == 1 else f"{label}, pass {number}"
            how = {"unit": "row", "leave": False, "delay": _DELAY}
            with tqdm(total=num_rows, desc=name, file=sys.stderr, **how) as shown:
                yield shown.update

        with passes_watched(bar):
            yield

    @contextlib.contextmanager
    def printing(self) -> Iterator[None]:
        """Inside, what is printed is the result; beside one JSON object it goes to stderr."""
        if not self.as_json:
            yield
            return
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere if self.quiet else sys.stderr),
        ):
            yield

    def note(self, sentence: str) -> None:
        """A sentence beside the result."""
        if not self.quiet:
            self.say(sentence)

    def say(self, sentence: str) -> None:
        """A sentence that is not left out."""
        print(printable(f"{self.command}: {sentence}"), file=sys.stderr)

    def show_json(self, facts: dict[str, Any]) -> None:
        """The result for programs, of what has printed that for people."""
        if self.as_json:
            self.show(facts, "")

    def show(self, facts: dict[str, Any], text: object) -> None:
        """The result: for programs, and for people."""
        if self.as_json:
            print(json.dumps(_finite(facts), allow_nan=False, default=str))
        else:
            print(text)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
