"""A collection that processes of their own run, to be ended in all ways there are."""

import os
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dropinf import Dropout, Plan, collect
from dropinf.rows import part_writer

NUM_BATCHES, BATCH = 40, 3


class Examples(Dataset):
    """120 examples, some of whose losses are not finite; each takes its time."""

    def __init__(self, seconds=0.0, fails_at=-1, dies_at=-1):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(NUM_BATCHES * BATCH, 5, generator=generator)
        self.x[::17] = torch.nan
        self.seconds, self.fails_at, self.dies_at = seconds, fails_at, dies_at

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        time.sleep(self.seconds)
        if i == self.fails_at:
            raise OSError("the data set is gone")
        if i == self.dies_at:
            os.kill(os.getpid(), 9)
        return self.x[i], i


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def loss_fn(model, batch, log=None):
    """[B]; notes that it ran."""
    if log is not None:
        with Path(log).open("a") as file:
            file.write(f"{int(batch[1][0])}\n")
    return F.mse_loss(model(batch[0]), torch.zeros(len(batch[0]), 3), reduction="none").sum(1)


def gather(path, resume=False, log=None, num_workers=0, seed=None, flush=0.0, **how):
    """Collect into a directory, a flush a batch."""
    part_writer._FLUSH_SECONDS = flush
    made = model()
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    loader = DataLoader(
        Examples(**how),
        BATCH,
        shuffle=seed is not None,
        generator=generator,
        num_workers=num_workers,
    )
    return collect(
        made,
        loader,
        partial(loss_fn, log=log),
        Plan.make(made, Dropout(r=8)),
        path,
        progress=False,
        resume=resume,
        on_nonfinite="skip",
        check=False,
    )


def tensors(n=12, features=5):
    """A small data set."""
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(torch.randn(n, features, generator=generator), torch.arange(n))
