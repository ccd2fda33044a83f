"""A call of `sampled_outer` that every backend takes."""

import torch

good = {
    "x": torch.zeros(2, 3, 4),
    "dy": torch.zeros(2, 3, 5),
    "o_idx": torch.zeros(6, dtype=torch.int32),
    "i_idx": torch.zeros(6, dtype=torch.int32),
}
