"""One backward pass -> rows [B, R]."""

from dropinf.capturing.checking import check_examples
from dropinf.capturing.modes import capture

__all__ = ["capture", "check_examples"]
