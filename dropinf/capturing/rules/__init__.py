"""What torch functions do with their parameters: closed forms, one file a kind of layer."""

from dropinf.capturing.rules.composites import COMPOSITES, opened
from dropinf.capturing.rules.forms import Form, RefusedError, Role, outer
from dropinf.capturing.rules.layers import ELEMENTWISE, FORMS

__all__ = ["COMPOSITES", "ELEMENTWISE", "FORMS", "Form", "RefusedError", "Role", "opened", "outer"]
