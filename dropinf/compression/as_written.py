"""How compressions are shown: as they are written, without what is left to its default."""

from __future__ import annotations

from dataclasses import fields
from typing import Any


class AsWritten:
    """A dataclass that shows itself as the call that makes it."""

    def __repr__(self) -> str:
        given = [(f.name, getattr(self, f.name)) for f in fields(self) if self._is_given(f)]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given)})"

    def _is_given(self, field: Any) -> bool:
        return bool(getattr(self, field.name) != field.default)
