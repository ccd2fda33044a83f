"""One backward pass -> rows [B, R]."""

from dropinf.capturing.activations import ActivationsTap
from dropinf.capturing.checking import check_examples
from dropinf.capturing.gradients import GradsTap
from dropinf.capturing.modes import capture

__all__ = ["ActivationsTap", "GradsTap", "capture", "check_examples"]
