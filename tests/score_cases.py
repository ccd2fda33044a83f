"""Stores of random rows, and the formula of their scores in float64, written out densely."""

import numpy as np
import torch
from torch import nn

from dropinf import Dropout, Full, Plan, RowStore


def formula(train, queries, sizes, damping):
    """Σ_l q_l (F_l + λ_l)⁻¹ g_l with numpy's explicit inverse, layer by layer."""
    result, start = 0, 0
    for size in sizes:
        G, Q = (np.asarray(a)[:, start : start + size] for a in (train, queries))
        F = sum(np.outer(g, g) for g in G) / len(G)
        λ = damping * sum(g @ g for g in G) / (len(G) * size)
        result = result + Q @ np.linalg.inv(F + λ * np.eye(size)) @ G.T
        start += size
    return torch.from_numpy(result)


def plan_of(*sizes, r=None):
    """One layer of a single parameter of each size."""
    model = nn.Sequential(*(nn.Linear(size, 1, bias=False) for size in sizes))
    return Plan.make(model, Full() if r is None else Dropout(r=r))


def stores(n, m, *sizes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    plan = plan_of(*sizes)
    return tuple(
        RowStore(
            torch.randn(k, plan.width, generator=generator, dtype=torch.float64).to(dtype), plan
        )
        for k in (n, m)
    )
