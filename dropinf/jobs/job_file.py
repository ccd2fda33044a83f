"""A job as a TOML file: read, and written with a comment for each key."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dropinf.whole_files import appearing

_HEAD = """\
# A job of dropinf. A key that is commented out shows an example; without it, the default is taken.
# Relative paths are relative to this file.
"""


def read(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no TOML.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            raise ValueError(
                f"{path}: Python before 3.11 needs tomli for TOML; pip install 'dropinf[cli]'"
            ) from None
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no job file {path}") from None
    except (ValueError, OSError, RecursionError) as error:  # TOMLDecodeError is a ValueError
        raise ValueError(f"{path} cannot be read as TOML: {error}") from None


def write(path: Path, keys: Iterable[tuple[Mapping[str, Any], Any]]) -> None:
    """Write the values of keys, each with its metadata; see `Job`."""
    lines, section = [_HEAD.rstrip()], ""
    for about, value in keys:
        if about["section"] != section:
            section = about["section"]
            lines += ["", f"[{section}]"]
        text = about["about"]
        if about.get("choices"):
            text += f": {', '.join(map(str, about['choices']))}"
        lines += textwrap.wrap(text, 98, initial_indent="# ", subsequent_indent="# ")
        if value is not None and about.get("path"):
            value = _from(path, value)
        sign = "# " if value is None else ""
        lines.append(f"{sign}{about['name']} = {_toml(about['example'] if sign else value)}")
    with appearing(path, replace=True) as new:
        new.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _from(file: Path, path: str) -> str:
    """A relative path as it is from where a file is."""
    return path if os.path.isabs(path) else os.path.relpath(path, file.parent)


def _toml(value: Any) -> str:
    """As TOML writes it: strings are those of JSON, but for one sign."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)
