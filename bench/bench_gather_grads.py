"""gather_grads against index + cat, over the gradients of 200 layers."""

import pytest
import torch

from dropinf import ops

L = 200
TO_REACH = {256: {"index + cat": (4, None)}, 4096: {"index + cat": (2, None)}}


@pytest.mark.parametrize("r", TO_REACH)
def bench_gather_grads(timed, r):
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(512, 512, generator=generator) for _ in range(L)]
    indices = [torch.randperm(512 * 512, generator=generator)[:r].sort().values for _ in grads]
    out = torch.empty(L * r)

    def index_cat():
        return torch.cat([g.view(-1)[i] for g, i in zip(grads, indices, strict=True)])

    contestants = {
        "dropinf": lambda: ops.gather_grads(grads, indices, out=out, backend="cpu"),
        "index + cat": index_cat,
    }
    assert torch.equal(contestants["dropinf"](), index_cat())
    timed(contestants, "dropinf", TO_REACH[r])
