"""What a command says: its result on stdout, everything else on stderr."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from typing import Any

from dropinf.text_table import printable


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
        """Whether to show bars."""
        return not self.quiet

    def note(self, sentence: str) -> None:
        """A sentence beside the result."""
        if not self.quiet:
            self.say(sentence)

    def say(self, sentence: str) -> None:
        """A sentence that is not left out."""
        print(printable(f"{self.command}: {sentence}"), file=sys.stderr)

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
