"""What torch functions do with their parameters: closed forms, one file a kind of layer."""

from dropinf.capturing.rules.composites import COMPOSITES, opened
from dropinf.capturing.rules.forms import Bias, Form, RefusedError, Role, outer
from dropinf.capturing.rules.layers import ELEMENTWISE, FORMS
from dropinf.capturing.rules.norms import norm_sums

__all__ = [
    "COMPOSITES",
    "ELEMENTWISE",
    "FORMS",
    "Bias",
    "Form",
    "RefusedError",
    "Role",
    "norm_sums",
    "opened",
    "outer",
]
