"""The C++ side of a capture, which does what is known already without Python."""

from __future__ import annotations

import importlib
from typing import Any

try:
    CPP: Any = importlib.import_module("dropinf._C")
except ImportError:  # its reason is in dropinf.backends()
    CPP = None
