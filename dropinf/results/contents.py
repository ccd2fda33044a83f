"""What examples hold: texts, images, values, looked up by the ids of their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Contents = Sequence[Any] | Mapping[Any, Any] | Callable[[Any], Any]


class Lookup:
    """The content of an example by its id.

    Args:
        contents: a mapping by id, a function of the id, or a sequence, where the id is a position
            in it, as of rows of a data set in order; None has no contents.
        name: of the argument, for errors.
    """

    def __init__(self, contents: Contents | None, name: str) -> None:
        if isinstance(contents, str | bytes):
            raise ValueError(
                f"{name} must be a sequence, a mapping by id or a function of the id, got a "
                f"{type(contents).__name__}; put it in a list"
            )
        # Of pandas, a Series is indexed by labels.
        self._contents, self._name = getattr(contents, "iloc", contents), name

    def __bool__(self) -> bool:
        return self._contents is not None

    def __call__(self, id_: Any) -> Any:
        """None without contents, and of an id that is None.

        Raises:
            ValueError: there is none for this id.
        """
        contents = self._contents
        if contents is None or id_ is None:
            return None
        if callable(contents) and not hasattr(contents, "__getitem__"):
            return contents(id_)
        if not isinstance(contents, Mapping):
            if isinstance(id_, str):
                raise ValueError(
                    f"{self._name}: ids are strings, so that a sequence does not say whose each "
                    "is; give a mapping by id, or a function of the id"
                )
            if id_ < 0:
                raise self._missing(id_)
        try:
            return contents[id_]
        except (KeyError, IndexError):
            raise self._missing(id_) from None

    def _missing(self, id_: Any) -> ValueError:
        return ValueError(
            f"{self._name} has nothing for id {id_!r}; it must have every example that is shown, "
            "by the ids of the rows"
        )


def shortened(text: str, most: int = 70) -> str:
    """On one line, at most so long."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else f"{line[: most - 3]}..."
