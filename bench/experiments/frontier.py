"""LDS against seconds and bytes, of dropinf's ways and of other packages, on one task.

    python bench/experiments/frontier.py [--quick] [--out bench/results/frontier.json]

Of every contestant at every size and seed of its random matrix, for each damping of one small grid
and for the package's own default: the linear datamodeling score (quality.py says what that is), on
the queries with even numbers and on those with odd ones. So a damping can be chosen on one half and
judged on the other. And the processor's time from the model to the scores, as ratios to Dropout's
in the same round, and the bytes kept of the training set.

A package that is missing is left out. Every result goes to --out at once, so that the same command
goes on where it was ended.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import numpy as np
import quality_tasks
import torch
from command import files_of, parser_of
from frontier_contestants import CONTESTANTS, DROPOUT, LINEAR_LAYERS, WITHOUT_R, Call
from frontier_report import write_report
from quality import datamodeling_score, rounded
from quality_tasks import Task
from records import Key, Records
from torch import nn

from dropinf.tools.measuring import LeftOut

# None: what the package does if it is told nothing.
DAMPINGS = [None, 0.01, 0.1, 1.0, 10.0, 100.0]
SETTINGS = {"sides": [4, 8, 16, 24], "dampings": DAMPINGS, "seeds": 3, "rounds": 3, "threads": 1}
QUICK = {"sides": [2, 4], "dampings": [None, 0.1, 1.0], "seeds": 2, "rounds": 1, "threads": 1}
TIMED_DAMPING = 0.1
NAMES = ("stage", "contestant", "r", "seed")  # a retrained half's number is its seed
PACKAGES = ("scipy", "scikit-learn", "dattri", "traker", "bergson", "kronfluence")


def wide_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def the_task(quick: bool) -> Task:
    digits = next(task for task in quality_tasks.small_tasks() if task.name == "digits-mlp")
    about = "scikit-learn's digits, a fifth of the labels wrong; an MLP 64-256-128-10"
    task = replace(digits, name="digits-wide", about=about, make=wide_mlp)
    return task.tiny() if quick else task


def main(arguments: list[str] | None = None) -> None:
    given = parser_of(__doc__).parse_args(arguments)
    settings = {"quick": given.quick, **(QUICK if given.quick else SETTINGS)}
    torch.set_num_threads(settings["threads"])
    warnings.filterwarnings("ignore", category=UserWarning, message="Full backward hook")
    warnings.filterwarnings("ignore", category=FutureWarning, module="kronfluence")
    task = the_task(given.quick)
    settings["task"] = task.description()
    files = files_of("frontier", given)
    records = Records(files.json, settings, NAMES, PACKAGES)
    records.save()
    left_out = Frontier(task, records).run()
    write_report(records.data, files.page, files.figures)
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}")
    print(files)


class Frontier:
    """The task's model and retrained halves, and every contestant on them."""

    def __init__(self, task: Task, records: Records) -> None:
        self.task, self.records = task, records
        self.settings = records.data["settings"]

    def run(self) -> dict[str, str]:
        """Make what is not recorded; which contestants are left out, and why."""
        for half in range(self.task.halves):
            self.once(("half", "", None, half), lambda half=half: {"losses": self.losses_of(half)})
        left_out = {}
        for stage in (self.judge, self.time):  # times behind each other, of the same minutes
            for name in CONTESTANTS:
                try:
                    stage(name)
                except LeftOut as reason:
                    left_out[name] = str(reason)
                print(f"{stage.__name__}: {name} is done", flush=True)
        return left_out

    def judge(self, name: str) -> None:
        seeds = 1 if name in WITHOUT_R else self.settings["seeds"]
        for r, side in self.sizes(name).items():
            for seed in range(seeds):
                self.once(
                    ("score", name, r, seed),
                    lambda side=side, seed=seed: self.judged(name, side, seed),
                )

    def time(self, name: str) -> None:
        for r, side in self.sizes(name).items():
            self.once(("time", name, r, None), lambda side=side: self.times(name, side))

    def once(self, key: Key, make: Callable[[], dict]) -> None:
        if key not in self.records:
            self.records.add(key, **make())

    def sizes(self, name: str) -> dict[int, int]:
        """r over all layers -> the side of a layer's square."""
        if name in WITHOUT_R:
            return {sum(p.numel() for p in self.model.parameters()): 0}
        return {LINEAR_LAYERS * side**2: side for side in self.settings["sides"]}

    def losses_of(self, half: int) -> list[float]:
        return rounded(self.task.query_losses(self.task.trained(half)))

    def judged(self, name: str, side: int, seed: int) -> dict:
        """LDS by damping on even and on odd queries, and bytes."""
        call = self.call(name, side, seed)
        found = {"even": [], "odd": [], "bytes": None}
        for damping in self.settings["dampings"]:
            try:
                outcome = call(damping)
            except torch.linalg.LinAlgError:  # no damping, and more numbers than examples
                found["even"].append(None)
                found["odd"].append(None)
                continue
            scores = outcome.scores.double().numpy()
            found["bytes"] = int(outcome.num_bytes)
            for which, start in (("even", 0), ("odd", 1)):
                found[which].append(self.lds(scores[start::2], self.half_losses[:, start::2]))
        return found

    def lds(self, scores: np.ndarray, losses: np.ndarray) -> float | None:
        """None if scores are not finite, or constant."""
        try:
            return datamodeling_score(scores, self.members, losses)
        except ValueError:
            return None

    def times(self, name: str, side: int) -> dict[str, list[float]]:
        """CPU milliseconds of each round, and the ratio to Dropout's at the second largest size."""
        middle = self.settings["sides"][len(self.settings["sides"]) // 2]
        calls = self.call(name, side, 0), self.call(DROPOUT, middle, 1)
        rounds = [
            [milliseconds(call) for call in calls] for _ in range(1 + self.settings["rounds"])
        ]
        return {
            "ms": rounded(mine for mine, _ in rounds[1:]),  # the first compiles
            "ratio": rounded(mine / dropout for mine, dropout in rounds[1:]),
        }

    def call(self, name: str, side: int, seed: int) -> Call:
        return CONTESTANTS[name](self.task, self.model, side, seed)

    @cached_property
    def model(self) -> nn.Module:
        return self.task.trained()

    @cached_property
    def half_losses(self) -> np.ndarray:
        """[halves, m] query losses of the retrained models."""
        return np.array([half["losses"] for half in self.records.of(stage="half")])

    @cached_property
    def members(self) -> np.ndarray:
        """[halves, n] bool: which training examples a half has."""
        members = np.zeros((self.task.halves, len(self.task.train)), dtype=bool)
        for number, row in enumerate(members):
            row[self.task.half(number).numpy()] = True
        return members


def milliseconds(call: Call) -> float:
    """Of the processor, on one thread: what else the machine does is not in it."""
    start = time.process_time()
    call(TIMED_DAMPING)
    return 1e3 * (time.process_time() - start)


if __name__ == "__main__":
    main()
