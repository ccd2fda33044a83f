"""Times of calls that alternate: CUDA events around loops, and around replays of CUDA graphs.

A loop calls with i = 0, 1, 2, ...; a contestant takes input set i modulo their number, so that the
sets together are larger than the cache. In rehearsals, on the CPU, a clock stands for events.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dropinf.tools import measuring

Loop = Callable[[int], object]


class Bench:
    """A device to time on; in a rehearsal the CPU, with tiny sizes.

    Attributes:
        quick: whether contestants that say little are left out, see `gpu.run --quick`.
    """

    def __init__(self, rehearsal: bool, quick: bool = False) -> None:
        self.rehearsal, self.cuda, self.quick = rehearsal, not rehearsal, quick
        self.device = "cpu" if rehearsal else "cuda"
        self.loop_seconds = 0.0005 if rehearsal else 0.03
        self.rounds = 2 if rehearsal else 5

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        """One call, all that it launched included."""
        return measuring.seconds_of(call, self.cuda)

    def eager(self, call: Loop) -> Callable[[], float]:
        """A loop of calls; it gives the seconds of one."""
        return measuring.loop_of(call, self.loop_seconds, self.cuda, least=2)

    def graph(self, call: Loop) -> Callable[[], float]:
        """A CUDA graph of calls, replayed; it gives the seconds of one. No host time is in it.

        Raises:
            RuntimeError: the call cannot be captured.
        """
        if not self.cuda:
            raise RuntimeError("no CUDA graphs on the CPU")
        call(0)
        once = self.seconds(lambda: call(0))
        count = max(2, min(50, round(self.loop_seconds / max(once, 1e-7))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(count):
                call(i)
        graph.replay()
        return lambda: self.seconds(graph.replay) / count

    def alternate(
        self, loops: dict[str, Callable[[], float]], seconds_left: Callable[[], float]
    ) -> dict[str, list[float]]:
        """Seconds of each in every round; fewer rounds where time runs out, one at least."""
        return measuring.alternate(loops, self.rounds, lambda: seconds_left() >= 0)

    def healthy(self) -> bool:
        """Whether the device still computes: an illegal access ends it for this process."""
        try:
            return bool((torch.ones(8, device=self.device) + 1).sum().item() == 16)
        except RuntimeError:
            return False

    @contextmanager
    def peak_bytes(self, found: list[int]) -> Iterator[None]:
        """Append the most memory that was allocated inside, above what was before; None on CPU."""
        if not self.cuda:
            yield
            return
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield
        torch.cuda.synchronize()
        found.append(torch.cuda.max_memory_allocated() - before)

    def forget(self) -> None:
        """Give cached memory back."""
        if self.cuda:
            torch.cuda.empty_cache()

    def num_sets(self, num_bytes: int, most: int = 16) -> int:
        """How many input sets of which `num_bytes` are touched exceed twice the L2 cache."""
        if not self.cuda:
            return 2
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        return min(most, max(2, -(-2 * cache // max(1, num_bytes))))

    def launches(self, call: Loop) -> int | None:
        """Kernels, copies and fills that one call launches."""
        if not self.cuda:
            return None
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            call(0)
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        return sum(
            event.device_type == on_device and not event.name.startswith("Activity Buffer")
            for event in profiled.events()
        )


def spread(values: list[float]) -> dict[str, float]:
    return dict(zip(("median", "min", "max"), measuring.spread(values), strict=True))


def ceilings(bench: Bench) -> dict[str, float]:
    """What this card does at best: copies, bf16 products; and what a launch costs."""
    tiny = bench.rehearsal
    n = 1 << 20 if tiny else 1 << 30
    source, target = (torch.randint(0, 255, (n,), device=bench.device).byte() for _ in range(2))
    side = 128 if tiny else 8192
    a, b = (torch.randn(side, side, device=bench.device).bfloat16() for _ in range(2))
    one = torch.zeros(1, device=bench.device)
    calls: dict[str, Loop] = {
        "copy": lambda i: target.copy_(source),
        "matmul": lambda i: torch.mm(a, b),
        "launch": lambda i: one.add_(1),
    }
    loops = {}
    for name, call in calls.items():
        call(0)
        loops[name] = bench.eager(call)
    if bench.cuda:
        loops["launch in a graph"] = bench.graph(calls["launch"])
    times = {k: statistics.median(v) for k, v in bench.alternate(loops, lambda: 1.0).items()}
    found = {
        "copy_gb_per_s": 2 * n / times["copy"] / 1e9,
        "bf16_matmul_tflop_per_s": 2 * side**3 / times["matmul"] / 1e12,
        "launch_us": times["launch"] * 1e6,
    }
    if bench.cuda:
        found["launch_in_graph_us"] = times["launch in a graph"] * 1e6
    return found


def relative_error(out: Tensor, exact: Tensor) -> float:
    """‖out - exact‖ / ‖exact‖; NaN stays NaN."""
    difference = (out.double() - exact.double()).norm()
    return (difference / exact.double().norm().clamp_min(1e-300)).item()
