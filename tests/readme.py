"""The README's examples, for the tests that run them."""

import re

from places import ROOT


def blocks():
    """All of its Python."""
    text = (ROOT / "README.md").read_text()
    return [part.split("```")[0] for part in text.split("```python\n")[1:]]


def block(words):
    """The one that has these words."""
    (found,) = (b for b in blocks() if words in b)
    return found


def variants(block):
    """What stands under "# before" and each "# after", with the lines that they share around it."""
    head, *parts = re.split(r"^# (before|after|as before)\b.*\n", block, flags=re.MULTILINE)
    named = list(zip(parts[::2], parts[1::2], strict=True))
    tail = "".join(lines for name, lines in named if name == "as before")
    return [head + lines + tail for name, lines in named if name != "as before"]
