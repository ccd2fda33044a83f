"""The tasks of mislabeled.py: a fifth of the labels is wrong, other ones for each seed."""

from collections.abc import Callable
from pathlib import Path

import quality_minilm
import quality_tasks
import torch
from quality_tasks import Task
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dropinf.extras import optional
from dropinf.tools import demo

# The columns of the two texts.
GLUE = {"mrpc": ("sentence1", "sentence2"), "qnli": ("question", "sentence")}
T = 64  # tokens that a pair of texts is cut or padded to

MakeTask = Callable[[int], Task]  # of a seed


def make_tasks(glue: tuple[str, ...] = (), glue_folder: Path | None = None) -> dict[str, MakeTask]:
    """By name; without those whose packages are missing, which is said."""
    tasks: dict[str, MakeTask] = {
        "digits-cnn": lambda seed: digits("digits-cnn", epochs=20, lr=1e-3, seed=seed),
    }
    missing = quality_minilm.missing_packages()
    if missing:
        print(f"minilm-lora is left out: no {', '.join(missing)}; see docs/developing/measuring.md")
    else:
        tasks["minilm-lora"] = opening_lines
    # Until it fits nearly all it was given, wrong labels too.
    tasks["digits-cnn-fitted"] = lambda seed: digits(
        "digits-cnn-fitted", epochs=150, lr=3e-3, seed=seed
    )
    for name in glue:
        tasks[name] = lambda seed, name=name: text_pairs(name, seed, glue_folder)
    return tasks


def digits(name: str, epochs: int, lr: float, seed: int) -> Task:
    """Images of 8 x 8 pixels and the CNN of quality.py."""
    found = demo.load_digits()
    given, wrong = with_wrong_labels(found.true_labels, 10, seed)
    return Task(
        name,
        f"scikit-learn's digits; three convolutions and two linear layers, {epochs} epochs",
        TensorDataset(found.train.tensors[0], given),
        found.queries,
        wrong,
        make=quality_tasks.cnn,
        epochs=epochs,
        batch_size=64,
        lr=lr,
        seed=seed,
    )


def opening_lines(seed: int) -> Task:
    """Sentences in five categories; the pretrained MiniLM of quality.py with LoRA."""
    return Task(
        "minilm-lora",
        "opening lines of chatterbot-corpus in English in five categories; all-MiniLM-L6-v2 with "
        "LoRA of rank 4 on queries and values and a linear head, 6 epochs",
        *quality_minilm.opening_lines(n=240, m=50, seed=seed),
        make=quality_minilm.SentenceClassifier,
        epochs=6,
        batch_size=16,
        lr=2e-3,
        seed=seed,
    )


def text_pairs(name: str, seed: int, folder: Path | None = None, n: int = 2000) -> Task:
    """MRPC or QNLI of GLUE; the same model, with two categories.

    Args:
        folder: with train.parquet and validation.parquet of GLUE's columns; None downloads them.
        n: training examples at most; a tenth as many queries, of the validation part.

    Raises:
        ImportError: datasets is not installed; says which extra has it.
    """
    datasets = optional("datasets", "experiments", "mislabeled.py --glue")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        quality_minilm.folder(quality_minilm.MODEL) / "model", local_files_only=True
    )
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for split, most in (("train", n), ("validation", n // 10)):
        if folder is None:
            rows = datasets.load_dataset("nyu-mll/glue", name, split=split)
        else:
            rows = datasets.Dataset.from_parquet(str(folder / f"{split}.parquet"))
        order = torch.randperm(len(rows), generator=generator)[:most].tolist()
        rows = rows.select(order)
        ids = tokenizer(
            *(list(rows[column]) for column in GLUE[name]),
            padding="max_length",
            truncation=True,
            max_length=T,
            return_tensors="pt",
        )["input_ids"]
        parts.append((ids, torch.tensor(list(rows["label"]))))
    (ids, labels), queries = parts
    given, wrong = with_wrong_labels(labels, 2, seed)
    return Task(
        name,
        f"{name.upper()} of GLUE; all-MiniLM-L6-v2 with LoRA of rank 4 on queries and values and "
        "a linear head, 3 epochs",
        TensorDataset(ids, given),
        TensorDataset(*queries),
        wrong,
        make=lambda: quality_minilm.SentenceClassifier(categories=2),
        epochs=3,
        batch_size=16,
        lr=1e-3,
        seed=seed,
    )


def with_wrong_labels(labels: Tensor, categories: int, seed: int) -> tuple[Tensor, Tensor]:
    """The labels, of which a fifth is another one, and which these are, [n] bool."""
    generator = torch.Generator().manual_seed(seed)
    n = len(labels)
    wrong = torch.zeros(n, dtype=torch.bool)
    wrong[torch.randperm(n, generator=generator)[: int(demo.FLIPPED * n)]] = True
    others = labels + torch.randint(1, categories, (n,), generator=generator)
    return torch.where(wrong, others % categories, labels), wrong


def share_right(model: nn.Module, data: TensorDataset) -> float:
    """Of the labels as they are given."""
    x, label = data.tensors
    with torch.no_grad():
        return float((model(x).argmax(1) == label).float().mean())
