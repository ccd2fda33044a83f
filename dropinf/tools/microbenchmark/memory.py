"""Peak MB of one call.

python -m dropinf.tools.microbenchmark.memory SETTING CONTESTANT N R D DEVICE
"""

from __future__ import annotations

import os
import sys

import torch

from dropinf.tools.measuring import MALLOC, peak
from dropinf.tools.microbenchmark.formed import Point
from dropinf.tools.microbenchmark.sweep import SETTINGS


def main(setting: str, contestant: str, n: str, r: str, d: str, device: str) -> None:
    """Print the peak of one contestant, in this process of its own."""
    if not MALLOC.items() <= os.environ.items():  # malloc reads them when a process begins
        command = [sys.executable, "-m", "dropinf.tools.microbenchmark.memory", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **MALLOC})
    module, where = SETTINGS[setting], torch.device(device)
    given = module.make(Point(int(n), int(r), int(d)), where)
    print(peak(module.CONTESTANTS[contestant](given), where))


if __name__ == "__main__":
    main(*sys.argv[1:])
