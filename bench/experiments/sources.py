"""Whose texts come first: one small language model, six sources, each query's own source.

    python bench/experiments/sources.py [--quick] [--out FILE.json]

A transformer is trained on windows of texts of six kinds (`texts.py`). Queries are windows of other
documents. Of the k = 10 and 50 training windows of highest score, the share from the query's own
source, for every method, r (over all layers) and mask; beside them chance, BM25 and minus the
training window's own loss, which knows no query.

Rows of all masks are computed out of whole gradients collected once (`whole_rows`). Every result
goes to --out at once, so that the same command goes on where it was ended.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))

import texts
import torch
from command import files_of, parser_of
from models import NextToken, losses
from quality_contestants import BY_ENERGY, COMPRESSIONS
from records import Records
from sources_report import write_report
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from whole_rows import rows_under

import dropinf
from dropinf import evaluate, solvers
from dropinf.extras import optional

SETTINGS = {
    "train": 250,  # windows of each source
    "queries": 20,
    "T": 48,  # tokens
    "vocabulary": 1000,
    "width": 48,
    "layers": 2,
    "epochs": 12,
    "totals": [64, 256, 1024, 4096],
    "ks": [10, 50],
    "masks": 3,
    "threads": 1,
}
QUICK = {
    **SETTINGS,
    **{"train": 20, "queries": 4, "T": 16, "vocabulary": 300, "width": 16, "epochs": 2},
    **{"totals": [32, 64], "ks": [3, 5], "masks": 2},
}
NAMES = ("stage", "method", "r", "mask")
PACKAGES = ("tokenizers", "gensim", "chatterbot-corpus", "bm25s")
DAMPING = 0.1  # relative, of every solve
MEASURED = 64  # training windows, of all sources, that make the energies
BATCH = 32

COMPRESSED = {
    **{name: COMPRESSIONS[name] for name in ("Dropout", "Sketch", "Gaussian", "LoGra")},
    "Dropout by energy": BY_ENERGY["Dropout by energy"],
}
UNIT = "Dropout, rows of length 1"  # the coordinates of Dropout, without an inverse
WHOLE: dict[str, Callable[[], solvers.Solver]] = {  # by whole gradients
    "whole gradient": lambda: solvers.Cholesky(DAMPING),
    "dot product": solvers.Identity,
    "cosine": lambda: solvers.Identity(cosine=True),
}
BM25, LOSS = "BM25", "loss"


def main(arguments: list[str] | None = None) -> None:
    given = parser_of(__doc__).parse_args(arguments)
    settings = {"quick": given.quick, "damping": DAMPING, "measured": MEASURED}
    settings |= QUICK if given.quick else SETTINGS
    torch.set_num_threads(settings["threads"])
    files = files_of("sources", given)
    documents = texts.load()
    settings["sources"] = list(documents)
    records = Records(files.json, settings, NAMES, PACKAGES)
    records.save()
    experiment = Experiment(documents, settings)
    for key in wanted(settings):
        if key not in records:
            records.add(key, **experiment.result(key))
            print(*key, flush=True)
    records.save()
    write_report(records.data, files.page, files.figures)
    print(files)


def wanted(settings: dict[str, Any]) -> Iterator[tuple]:
    yield ("model", "", None, None)
    for method in (LOSS, *WHOLE):
        yield ("share", method, None, None)
    names = (*COMPRESSED, UNIT)
    for mask, method, r in itertools.product(range(settings["masks"]), names, settings["totals"]):
        yield ("share", method, r, mask)
    yield ("share", BM25, None, None)


class Experiment:
    """The texts as windows of tokens, and what is made of them when it is asked for."""

    def __init__(self, documents: dict[str, list[str]], settings: dict[str, Any]) -> None:
        self.settings = settings
        apart = {
            name: split(some, settings["queries"], seed)
            for seed, (name, some) in enumerate(documents.items())
        }
        self.tokenizer = tokenizer_of(
            [text for train, _ in apart.values() for text in train], settings["vocabulary"]
        )
        self.train, self.labels = self._windows([apart[n][0] for n in apart], settings["train"])
        self.asked, self.asked_labels = self._windows(
            [apart[n][1] for n in apart], settings["queries"]
        )

    def _windows(self, sources: list[list[str]], count: int) -> tuple[TensorDataset, Tensor]:
        found = [windows(self.tokenizer, some, self.settings["T"] + 1, count) for some in sources]
        ids = torch.cat(found)
        labels = torch.arange(len(found)).repeat_interleave(count)
        return TensorDataset(ids[:, :-1], ids[:, 1:]), labels

    @cached_property
    def model(self) -> nn.Module:
        """AdamW on all training windows."""
        settings = self.settings
        torch.manual_seed(0)
        model = NextToken(*(settings[n] for n in ("vocabulary", "T", "width", "layers")))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        for _ in range(settings["epochs"]):
            for batch in DataLoader(self.train, batch_size=BATCH, shuffle=True):
                optimizer.zero_grad()
                loss_fn(model, batch).mean().div(settings["T"]).backward()
                optimizer.step()
        return model.eval()

    @cached_property
    def whole(self) -> tuple[dropinf.RowStore, dropinf.RowStore]:
        """Whole gradients of training windows and queries."""
        plan = dropinf.Plan.make(self.model, dropinf.Full())
        return tuple(
            dropinf.collect(self.model, DataLoader(some, BATCH), loss_fn, plan, progress=False)
            for some in (self.train, self.asked)
        )

    @cached_property
    def energies(self) -> dropinf.Energies:
        """Of windows of all sources: every 20th or so, as their order is by source."""
        step = max(1, len(self.train) // MEASURED)
        some = TensorDataset(*self.train[::step])
        return dropinf.energies(self.model, DataLoader(some, BATCH), loss_fn, examples=len(some))

    def losses_of(self, some: TensorDataset) -> Tensor:
        model = self.model  # which is trained if it was not
        with torch.no_grad():
            return torch.cat([loss_fn(model, batch) for batch in DataLoader(some, BATCH)])

    def result(self, key: tuple) -> dict[str, Any]:
        stage, method, r, mask = key
        if stage == "model":
            return self.about_model()
        scores = self.scores(method, r, mask)
        result = {}
        for k in self.settings["ks"]:
            found = evaluate.recall(scores, (self.asked_labels, self.labels), k)
            by_source = found.share.each.view(len(self.settings["sources"]), -1).mean(1)
            result |= {
                f"share_{k}": round(found.share.value, 5),
                f"error_{k}": round(found.share.error, 5),  # over queries
                f"sources_{k}": [round(float(share), 4) for share in by_source],
                f"chance_{k}": round(found.chance, 5),
            }
        return result

    def about_model(self) -> dict[str, Any]:
        """Nats a token, of training windows and of each source's queries."""
        T, sources = self.settings["T"], len(self.settings["sources"])
        asked = (self.losses_of(self.asked) / T).view(sources, -1).mean(1)
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "loss": round(float(self.losses_of(self.train).mean() / T), 4),
            "query_losses": [round(float(loss), 4) for loss in asked],
        }

    def scores(self, method: str, r: int | None, mask: int | None) -> Tensor:
        """[m, n]."""
        if method == BM25:
            asked, train = (
                self.tokenizer.decode_batch(some.tensors[0].tolist())
                for some in (self.asked, self.train)
            )
            return evaluate.bm25(asked, train)
        if method == LOSS:
            return -self.losses_of(self.train).expand(len(self.asked), -1)
        store, queries = self.whole
        if method in WHOLE:
            return dropinf.scores(queries, store, WHOLE[method]().fit(store))
        if method in BY_ENERGY:
            compression = COMPRESSED[method](r, mask, self.energies)
        else:
            compression = COMPRESSED["Dropout" if method == UNIT else method](r, mask)
        plan = dropinf.Plan.make(self.model, compression)
        store, queries = (rows_under(plan, some) for some in (store, queries))
        solver = solvers.Identity(cosine=True) if method == UNIT else solvers.Cholesky(DAMPING)
        return dropinf.scores(queries, store, solver.fit(store))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """[B], summed over a window's tokens."""
    x, label = batch
    return losses(model(x), label)


def split(documents: list[str], queries: int, seed: int) -> tuple[list[str], list[str]]:
    """Documents for training, and as many others as queries, in a random order."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [documents[i] for i in order]
    return shuffled[queries:], shuffled[:queries]


def tokenizer_of(some: list[str], vocabulary: int) -> Any:
    """Byte pairs, of the first 20,000 characters of each document.

    Raises:
        ImportError: tokenizers is not installed; says which extra has it.
    """
    tokenizers = optional("tokenizers", "transformers", "sources.py")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text[:20000] for text in some), trainer)
    return tokenizer


def windows(tokenizer: Any, documents: list[str], size: int, count: int) -> Tensor:
    """[count, size] ids: the first window of each document, then the second of each, and so on.

    Raises:
        ValueError: there are not so many.
    """
    whole = []
    for text in documents:
        ids = tokenizer.encode(text[: 20 * size * (1 + count // len(documents))]).ids
        whole.append([ids[at : at + size] for at in range(0, len(ids) - size + 1, size)])
    found = [each[turn] for turn in range(count) for each in whole if turn < len(each)]
    if len(found) < count:
        raise ValueError(f"windows: {len(found)} of {size} tokens, not {count}; ask for fewer")
    return torch.tensor(found[:count])


if __name__ == "__main__":
    main()
