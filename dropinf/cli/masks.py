"""What other draws of the coordinates say: stability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

import dropinf
from dropinf.cli.app import command
from dropinf.cli.collecting import measured, prepared
from dropinf.cli.job_options import takes_job
from dropinf.cli.scoring import K
from dropinf.cli.terminal import Terminal
from dropinf.jobs import Job, Ready
from dropinf.scoring import Stability


@command("dropinf stability job.toml --size 256 --size 1024 --masks 3")
@takes_job
def stability(
    terminal: Terminal,
    job: Job,
    size: Annotated[
        list[float],
        typer.Option(help="An r to try (a rate or total where the job has one); several times."),
    ] = [256, 1024, 4096],  # noqa: B006
    masks: Annotated[int, typer.Option(min=2, help="Seeds of each.")] = 3,
    k: K = 10,
) -> None:
    """At which r another seed gives the same top examples; collects for each size and seed."""
    found = stability_of(terminal, job, prepared(terminal, job), size, masks, k)
    sizes = [
        {"size": size, "width": width, **agreement._asdict()}
        for size, width, agreement in zip(found.sizes, found.widths, found.agreements, strict=True)
    ]
    terminal.show({"sizes": sizes, "masks": masks, "k": k, "smallest": found.smallest()}, found)


def stability_of(
    terminal: Terminal, job: Job, ready: Ready, sizes: Sequence[float], masks: int, k: int
) -> Stability:
    """Of a job that is ready.

    Raises:
        ValueError: it has no queries, or a compression without a seed.
    """
    if ready.queries is None:
        raise ValueError("stability is of queries; name them with --queries")
    energies = measured(terminal, job, ready, job.energies) if job.energies else None
    return dropinf.stability(
        ready.model,
        ready.train.loader,
        ready.queries.loader,
        ready.loss_fn,
        [int(one) if one == int(one) else one for one in sizes],
        masks,
        k,
        compression=job.plan(ready.model, energies).compression,
        **({} if job.damping is None else {"damping": job.damping}),
        progress=terminal.progress,
    )
