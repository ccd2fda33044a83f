"""Ranks of torch.distributed in processes of their own, each of which runs the same checks."""

import os
import subprocess
import sys
import traceback
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch.distributed as dist
from places import ROOT


@contextmanager
def refused(kind, *words):
    """On this rank by that error, and none of the words missing."""
    with pytest.raises(kind) as found:
        yield
    assert all(word in str(found.value) for word in words), found.value


def run_rank(rank, world, path, checks):
    """Each check with a path that the ranks share; for `torch.multiprocessing.spawn`."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}/group",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    try:
        for check in checks:
            dist.barrier()
            check(rank, world, f"{path}/{check.__name__}")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # without the interpreter's teardown, in which gloo's threads may abort


def run_alone(checks, world, path):
    """Checks of one file on ranks that no launcher ends when one of them is gone: exit codes."""
    names = ", ".join(check.__name__ for check in checks)
    command = f"import sys; from rank_runs import run_rank; from {checks[0].__module__} import "
    command += f"{names}; run_rank(int(sys.argv[1]), {world}, {str(path)!r}, [{names}])"
    file = checks[0].__code__.co_filename
    paths = [os.path.dirname(file), str(ROOT / "tests"), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", command, str(rank)], env=environment)
        for rank in range(world)
    ]
    # Nobody reaps one before, as they are this process's.
    return [rank.wait(timeout=200) for rank in ranks]
