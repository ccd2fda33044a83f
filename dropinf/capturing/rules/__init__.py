"""What torch functions do with their parameters: closed forms, one file a kind of layer."""

from dropinf.capturing.rules.composites import COMPOSITES, opened
from dropinf.capturing.rules.forms import Bias, Form, RefusedError, Role, outer
from dropinf.capturing.rules.layers import ELEMENTWISE, FORMS

__all__ = [
    "COMPOSITES",
    "ELEMENTWISE",
    "FORMS",
    "Bias",
    "Form",
    "RefusedError",
    "Role",
    "opened",
    "outer",
]
