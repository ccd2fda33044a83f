"""Energies of a model's gradients, measured on some examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import distributed, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, Subset
from typing_extensions import Unpack

from dropinf.compression import Energies, FewOfEach, Plan, fit, tracked
from dropinf.rows.batches import Batches, CaptureOptions, LossFn
from dropinf.rows.loaders import refuse_dataset

_OP = "energies"


def energies(
    model: nn.Module,
    loader: Iterable,
    loss_fn: LossFn,
    examples: int = 64,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    mode: str = "activations",
    **options: Unpack[CaptureOptions],
) -> Energies:
    """E g^2 of a model's coordinates, by which `Dropout` and `Sketch` draw: one short pass.

        e = dropinf.energies(model, loader, loss_fn)
        plan = dropinf.Plan.make(model, dropinf.Dropout(r=1024, energies=e))

    Of a parameter that is a matrix [O, I], the energy of coordinate (o, i) is

        E g_oi^2  =  rows[o] * columns[i],     O + I numbers.

    A linear layer's gradient is g_oi = sum_t dy[t, o] x[t, i], and its mean square is about
    E[dy_o^2] E[x_i^2] up to a factor: exact if dy and x are independent, and there is one position
    or positions do not add up. So rows follow the output gradient, and columns the input. They are
    fitted to the squares at four random coordinates of each row or column (all of a small
    parameter), in the rows of an ordinary capture: no gradient is formed, and what positions add
    up to is in it. A convolution [O, C, *kernel] has output channels x (channels and taps in), an
    embedding tokens x width, packed experts [E, I, O] (experts and inputs) x outputs, a vector a
    number for each element. Several uses of one parameter add up, as in its gradient. A layer whose
    every gradient is zero, such as LoRA's A while B is 0, is named in a warning.

    Args:
        model, loader, loss_fn: as of `collect`.
        examples: how many to take, or all if the loader has fewer: of a DataLoader that goes
            through its data set in order, spread over it, as data are often sorted and the first
            ones alike; of any other loader the first ones.
        include, exclude: parameters to leave out, as in `Plan.make`; a plan may have fewer.
        mode: "activations" or "grads", see `capture`.
        options: batch_dim=, closed= and backend= of `capture`.

    Returns:
        Energies, in integers, which a plan stores. Where torch.distributed is initialised, all
        ranks must call this, and get those of rank 0.

    Raises:
        TypeError: a Dataset was given for a loader.
        ValueError: the loader is empty, or a gradient is not finite, or all of them are zero.
    """
    whole = isinstance(examples, int | np.integer) and not isinstance(examples, bool)
    if not whole or examples < 1:
        raise ValueError(f"{_OP}: examples must be a whole number from 1, got {examples!r}")
    examples = int(examples)  # of numpy's, products may overflow
    if options.get("per", "example") != "example":
        raise ValueError(f"{_OP}: per must be 'example', got {options['per']!r}")
    refuse_dataset(_OP, loader)
    layers, _ = tracked(_OP, model, include, exclude)
    plan = Plan(layers, FewOfEach())
    batches = Batches(model, loss_fn, plan, mode, options, None, 1.0, "skip", op=_OP)
    sums = torch.zeros(plan.width, dtype=torch.float64)
    some, positions = _spread(loader, examples)
    with batches.opened():
        for batch in batches.drawn(some):
            rows, valid = batches.rows(batch)
            rows, valid = rows[: examples - batches.seen], valid[: examples - batches.seen]
            if not valid.all():
                at = batches.seen + int((~valid).nonzero()[0, 0])
                raise ValueError(
                    f"{_OP}: the loss or gradient of example "
                    f"{at if positions is None else positions[at]} (in the loader's order) is not "
                    "finite; mend or remove it"
                )
            for row in rows:  # one by one, as float64 is wide
                sums = sums.to(row.device)
                sums += row.double().square()
            batches.seen += len(rows)
            if batches.seen == examples:
                break
    if not batches.seen:
        raise ValueError(f"{_OP}: the loader is empty; it gave no batch")
    means = (sums / batches.seen).cpu().numpy()
    found = Energies.of(
        _OP,
        {
            slot.name: (slot.shape, *fit(slot.shape, slot.index.numpy(), means[slot.entries]))
            for slot in plan.slots
        },
    )
    if distributed.is_available() and distributed.is_initialized():
        shared = [found]
        distributed.broadcast_object_list(shared)
        (found,) = shared
    found.warn_of_zeros(_OP, layers)
    return found


def _spread(loader: Iterable, examples: int) -> tuple[Iterable, Sequence[int] | None]:
    """A loader of examples all over the data set, and their positions; or itself, and None."""
    batches = loader.batch_sampler if type(loader) is DataLoader else None
    # Its own sampler: that of the loader is another one where batch_sampler= was given.
    if (
        type(batches) is not BatchSampler
        or type(batches.sampler) is not SequentialSampler
        or batches.sampler.data_source is not loader.dataset
        or len(loader.dataset) <= examples
    ):
        return loader, None
    n = len(loader.dataset)
    positions = [i * n // examples for i in range(examples)]
    subset = Subset(loader.dataset, positions)
    some = DataLoader(subset, batch_size=batches.batch_size, collate_fn=loader.collate_fn)
    return some, positions
