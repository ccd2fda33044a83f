"""The ops: tensors in, tensors out. Each checks its arguments, picks the backend and calls it.

No op has a derivative: while grad mode is on, as it is not in a backward pass, an input that
requires grad is refused with a ValueError.

An index out of range is an IndexError, and a sign that is not -1, 0 or 1 a ValueError. The kernels
of a GPU cannot raise without a wait: there the entry is NaN.
"""

from dropinf.ops.convolution import sampled_conv
from dropinf.ops.dispatch import BackendError, backends, is_native
from dropinf.ops.embedding import sampled_embedding
from dropinf.ops.gather import gather_grads
from dropinf.ops.layerwise import DampedCholesky, cholesky_solve, damped_cholesky, gram, unpack
from dropinf.ops.norm import sampled_norm
from dropinf.ops.outer import factored_outer, sampled_outer
from dropinf.ops.products import row_products
from dropinf.ops.topk import score_topk

__all__ = [
    "BackendError",
    "DampedCholesky",
    "backends",
    "cholesky_solve",
    "damped_cholesky",
    "factored_outer",
    "gather_grads",
    "gram",
    "is_native",
    "row_products",
    "sampled_conv",
    "sampled_embedding",
    "sampled_norm",
    "sampled_outer",
    "score_topk",
    "unpack",
]
