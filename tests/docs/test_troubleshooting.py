"""Every message of docs/troubleshooting.md stands in the code."""

import ast
import re

import pytest
from places import PACKAGE, ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
MESSAGES = re.findall(r"^\| `(.+?)` \|", PAGE, re.M)


def strings(path):
    """The string literals of a file, with … for what is put into them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.fixture(scope="module")
def said():
    return {text for path in PACKAGE.rglob("*.py") for text in strings(path)}


def stands_in(message, said):
    return any(message in text for text in said)


@pytest.mark.parametrize("message", MESSAGES)
def test_message(message, said):
    assert stands_in(message, said)


def test_another_message_is_found_out(said):
    assert len(MESSAGES) > 30
    assert not stands_in("rows: need one loss per batch, got …", said)
