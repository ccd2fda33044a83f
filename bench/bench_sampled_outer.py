"""sampled_outer against what a user of torch would write, and against the floor of one read."""

import pytest
import torch

from dropinf import ops

# (B, T, I, O): a layer of a 7B-sized model, one sequence.
SHAPE = (1, 2048, 4096, 4096)

# Contestant -> smallest and largest allowed of its time over ours.
TO_REACH = {
    64: {"torch.compile": (1.5, None), "one read of x and dy": (1 / 1.5, None)},
    1024: {"torch.compile": (4, None), "one read of x and dy": (1 / 1.5, None)},
    8192: {
        "torch.compile": (10, None),
        "sampled_addmm": (6, None),
        "dense product + gather": (50, None),
        "grid": (1 / 1.3, None),
        "one read of x and dy": (1 / 1.5, None),
    },
    65536: {"dense product + gather": (20, None)},
}


def products(x, dy, o_idx, i_idx):
    return (x[:, :, i_idx] * dy[:, :, o_idx]).sum(1)


@pytest.mark.parametrize("r", TO_REACH)
def bench_sampled_outer(timed, r):
    B, T, I, O = SHAPE
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(B, T, I, generator=generator), torch.randn(B, T, O, generator=generator)
    at = torch.randperm(O * I, generator=generator)[:r].sort().values
    o_long, i_long = at // I, at % I
    o_idx, i_idx = o_long.int(), i_long.int()

    # The peer's transposed operand is not charged to it.
    dy_t, x_one = dy[0].T.contiguous(), x[0]
    pattern = torch.sparse_coo_tensor(torch.stack([o_long, i_long]), torch.zeros(r), (O, I))
    pattern = pattern.coalesce().to_sparse_csr()
    side = round(r**0.5)  # a grid keeps side x side coordinates
    rows = torch.randperm(O, generator=generator)[:side].sort().values
    columns = torch.randperm(I, generator=generator)[:side].sort().values

    contestants = {
        "dropinf": lambda: ops.sampled_outer(x, dy, o_idx, i_idx, backend="cpu"),
        "sampled_addmm": lambda: torch.sparse.sampled_addmm(pattern, dy_t, x_one, beta=0).values(),
        "dense product + gather": lambda: torch.mm(dy[0].T, x_one)[o_long, i_long],
        "grid": lambda: torch.bmm(
            dy.index_select(2, rows).transpose(1, 2), x.index_select(2, columns)
        ),
        "one read of x and dy": lambda: (x.sum(), dy.sum()),
    }
    if r <= 8192:  # their [B, T, r] products would be gigabytes beyond
        contestants["eager torch"] = lambda: products(x, dy, o_long, i_long)
        compiled = torch.compile(products)
        contestants["torch.compile"] = lambda: compiled(x, dy, o_long, i_long)

    truth = torch.mm(dy[0].double().T, x_one.double())[o_long, i_long]
    for name in (
        "dropinf",
        "sampled_addmm",
        "dense product + gather",
        "eager torch",
        "torch.compile",
    ):
        if name in contestants:
            torch.testing.assert_close(
                contestants[name]().flatten().double(), truth, atol=1e-2, rtol=0
            )
    grid = torch.mm(dy[0].double().T, x_one.double())[rows][:, columns]
    torch.testing.assert_close(contestants["grid"]()[0].double(), grid, atol=1e-2, rtol=0)
    timed(contestants, "dropinf", TO_REACH[r])
