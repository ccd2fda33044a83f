"""Models trained anew on subsets of the examples, by a function of the user's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor

from dropinf.evaluate.estimates import kind, mask_of
from dropinf.evaluate.results_file import ResultsFile
from dropinf.progress import progress_bar

Train = Callable[[Tensor, int], Tensor]


def retrain(
    train: Train,
    members: Tensor,
    path: str | os.PathLike[str] | None = None,
    *,
    seeds: int | Sequence[int] = 1,
    progress: bool | str = True,
) -> Tensor:
    """The losses of the queries by a model trained on each subset, [seeds, h, m] float64.

    With a path every result is on the disk once it is there. After a kill, Ctrl-C or an error of
    `train` the same call goes on behind what is done, and only the training in flight is lost. A
    call with more subsets behind those, or more seeds, trains only what is new.

        losses = dropinf.evaluate.retrain(train_on, members, "halves", seeds=2)  # [2, h, m]

    Args:
        train: train(indices, seed) trains a model on the examples of these indices, int64, sorted,
            and returns the losses [m] of the queries. torch's generators are seeded with `seed`
            before each call; its result must be a function of the two, or going on is not what it
            would have been without a stop.
        members: [h, n] bool, of `halves`, `random_subsets` or `without`.
        path: of a directory, for results; None keeps them in memory alone.
        seeds: that many, 0 and up, or which. All subsets are trained with the first seed before the
            second one begins.
        progress: show a bar with the time left; a string is its label.

    Raises:
        ValueError: an argument or a result of `train` is no such thing, or what is at `path` is
            of other subsets or seeds, or damaged.
        LockedError: another process writes to `path`.
    """
    members = mask_of("retrain", "members", members, ("h", "n"))
    if not members.numel() or not members.any(1).all():
        raise ValueError("retrain: members must have a subset, and each at least one example")
    chosen = _chosen(seeds)
    asked = [(subset, seed) for seed in chosen for subset in range(len(members))]
    done: dict[tuple[int, int], Tensor] = {}
    label = progress if isinstance(progress, str) else "retrain"
    with contextlib.ExitStack() as stack:
        file = None
        if path is not None:
            file = stack.enter_context(ResultsFile(Path(path), members, chosen))
            done = file.done
        bar = stack.enter_context(
            progress_bar(
                total=len(asked), initial=len(done), desc=label, unit="model", disable=not progress
            )
        )
        for subset, seed in asked:
            if (subset, seed) in done:
                continue
            num = next((len(losses) for losses in done.values()), None)
            losses = _trained(train, members[subset].nonzero()[:, 0], seed, num)
            if file is not None:
                file.add(subset, seed, losses)
            done[subset, seed] = losses
            bar.update(1)
    found = torch.stack([done[key] for key in asked])
    return found.view(len(chosen), len(members), -1)


def _trained(train: Train, indices: Tensor, seed: int, num: int | None) -> Tensor:
    """[m] losses; m is `num`, if that is known."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        losses = train(indices, seed)
    real = isinstance(losses, Tensor) and losses.is_floating_point()
    if not real or losses.dim() != 1 or not len(losses) or len(losses) != (num or len(losses)):
        wanted = "[m], one for each query" if num is None else f"[{num}], as before"
        raise ValueError(f"retrain: train must return the losses {wanted}, got {kind(losses)}")
    return losses.detach().to("cpu", torch.float64)


def _chosen(seeds: int | Sequence[int]) -> list[int]:
    if isinstance(seeds, int):
        chosen = list(range(seeds))
    else:
        chosen = list(seeds) if isinstance(seeds, Sequence) else []
    integers = all(isinstance(s, Integral) and 0 <= s < 2**63 for s in chosen)
    if not chosen or not integers or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"retrain: seeds must be a positive number, or different integers from 0, got {seeds!r}"
        )
    return [int(seed) for seed in chosen]
