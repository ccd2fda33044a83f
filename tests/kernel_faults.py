"""Faults to plant in a copy of the kernels."""

# op: a file of its CUDA kernels, what is in it, and what that becomes, which is seen only where
# there is an order, or more than one chunk of rows, or more than one part of the scores.
FAULTS = {
    "sampled_outer": ("cuda/sampled_outer_staged.cuh", "sums[k] +=", "sums[k] += 2 *"),
    "gram": ("cuda/gram.cu", "total[i][j] += sums[i][j];", "total[i][j] = sums[i][j];"),
    "score_topk": ("cuda/score_topk.cu", "count = call.num_parts * args.k;", "count = args.k;"),
}
