"""Faults to plant in a copy of the kernels."""

# op: a file of its CUDA kernels, what is in it, and what that becomes, which is seen only where
# there is an order, or more than one chunk of rows.
FAULTS = {
    "sampled_outer": ("cuda/sampled_outer_staged.cuh", "sums[k] +=", "sums[k] += 2 *"),
    "gram": ("cuda/gram.cu", "total[i][j] += sums[i][j];", "total[i][j] = sums[i][j];"),
}
