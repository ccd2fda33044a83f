"""A quickstart on text: which sentences taught a small language model what it knows."""

from __future__ import annotations

import ast
import re
import sysconfig
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dropinf
from dropinf import solvers
from dropinf.compression import Compression
from dropinf.rows import RowStore

# Topics of Python's own library, whose docstrings are on every machine.
TOPICS = {
    "numbers": ("decimal.py", "_pydecimal.py", "fractions.py", "statistics.py", "random.py"),
    "mail": ("email", "smtplib.py", "imaplib.py", "mailbox.py", "poplib.py"),
    "windows": ("tkinter",),
    "tests": ("unittest", "doctest.py"),
    "files": ("shutil.py", "tarfile.py", "zipfile", "zipfile.py", "pathlib", "pathlib.py", "os.py"),
    "network": ("socket.py", "ssl.py", "urllib", "http", "ipaddress.py", "asyncio"),
}
EACH, ASKED = 200, 20  # sentences of a topic to train on, and to ask about
TOP = 5
R = 256  # coordinates of each layer


class Texts(NamedTuple):
    """Sentences, and the number of each one's topic."""

    train: list[str]
    topics: Tensor  # [n]
    queries: list[str]
    query_topics: Tensor  # [m]


def main(page: Path) -> dict[str, Any]:
    """Train, ask of each held-out sentence what taught it, and count how many share its topic.

    Returns:
        The table, and where the report is.
    """
    texts = load_texts()
    vocabulary = words_of(texts.train)
    torch.manual_seed(0)
    model = LanguageModel(len(vocabulary) + 2)
    train, queries = (encode(some, vocabulary) for some in (texts.train, texts.queries))
    start, topics = time.perf_counter(), len(texts.query_topics.unique())
    fit(model, train)
    print(
        f"{len(texts.train)} sentences of {topics} topics of Python's own documentation; a "
        f"language model of {sum(p.numel() for p in model.parameters()):,} parameters, trained in "
        f"{time.perf_counter() - start:.0f} s.\n{len(texts.queries)} other sentences are asked "
        f"about: how many of the {TOP} that taught most are of the same topic?\n"
    )
    print(f"{'method':38}{'same topic':>12}{'seconds':>10}{'bytes stored':>15}")
    print(f"{'chance':38}{1 / topics:12.2f}")
    loaders = [DataLoader(some, batch_size=64) for some in (train, queries)]
    energies = dropinf.energies(model, loaders[0], loss_fn)
    by_energy = dropinf.Dropout(R, energies=energies, allocation="energy")
    table = []
    for method, compression, solver in (
        (f"gradient dot product, r = {R}", dropinf.Dropout(R), solvers.Identity()),
        (f"Dropout, r = {R}", dropinf.Dropout(R), solvers.Cholesky()),
        ("Dropout, layers' shares by energy", by_energy, solvers.Cholesky()),
    ):
        store, asked, same, seconds = score(texts, model, loaders, compression, solver)
        print(f"{method:38}{same:12.2f}{seconds:10.2f}{store.num_bytes:15,}")
        figures = {"same topic": same, "seconds": seconds, "bytes": store.num_bytes}
        table.append({"method": method, **figures})
    found = dropinf.attribute(asked, store, solver, TOP)
    dropinf.write_report(
        page,
        found,
        texts=texts.train,
        query_texts=texts.queries,
        tokens=shares(model, texts, train, found, asked, solver),
        self_influence=dropinf.self_influence(store, solver),
        title="What taught a language model",
    )
    print(f"\nEach sentence with what taught it, word by word: {page.resolve()}")
    return {"methods": table, "chance": 1 / topics, "report": str(page.resolve())}


def load_texts() -> Texts:
    """First paragraphs of docstrings, as many of each topic, in an order of their own."""
    generator = torch.Generator().manual_seed(0)
    train, queries, topics, query_topics = [], [], [], []
    for number, names in enumerate(TOPICS.values()):
        found = sorted({text for name in names for text in docstrings(name)})
        if len(found) < 3 * ASKED:  # a Python without that module
            continue
        order = torch.randperm(len(found), generator=generator)[: EACH + ASKED].tolist()
        chosen = [found[i] for i in order]
        queries += chosen[:ASKED]
        train += chosen[ASKED:]
        query_topics += [number] * ASKED
        topics += [number] * (len(chosen) - ASKED)
    order = torch.randperm(len(train), generator=generator)
    mixed = [train[i] for i in order.tolist()]
    return Texts(mixed, torch.tensor(topics)[order], queries, torch.tensor(query_topics))


def docstrings(name: str) -> list[str]:
    """Of a module or package of the standard library; none where it is not there."""
    path = Path(sysconfig.get_path("stdlib")) / name
    files = [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))
    found = []
    for file in (file for file in files if file.is_file()):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
                text = " ".join(paragraph.split())
                if 30 <= len(text) <= 200:
                    found.append(text)
    return found


def words_of(texts: list[str]) -> dict[str, int]:
    """Words that are there twice -> 2, 3, ...; 0 is padding, 1 any other word."""
    counts = Counter(word for text in texts for word in split(text))
    return {word: i for i, word in enumerate((w for w in counts if counts[w] > 1), start=2)}


def split(text: str) -> list[str]:
    """Words and signs."""
    return re.findall(r"[a-z]+|\d+|[^\sa-z\d]", text.lower())


def encode(texts: list[str], vocabulary: dict[str, int]) -> Tensor:
    """[n, T] ids, padded behind."""
    ids = [torch.tensor([vocabulary.get(word, 1) for word in split(text)]) for text in texts]
    return nn.utils.rnn.pad_sequence(ids, batch_first=True)


class LanguageModel(nn.Module):
    """A transformer of two layers that predicts the next word."""

    def __init__(self, num_words: int, width: int = 64, length: int = 128) -> None:
        super().__init__()
        self.words = nn.Embedding(num_words, width)
        self.places = nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(width, num_words)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] ids -> [B, T, words] logits of the next ones."""
        T = ids.shape[1]
        x = self.words(ids) + self.places(torch.arange(T, device=ids.device))
        mask = nn.Transformer.generate_square_subsequent_mask(T, device=ids.device)
        return self.head(self.layers(x, mask=mask, is_causal=True))


def loss_fn(model: nn.Module, ids: Tensor) -> Tensor:
    """One loss per sentence, [B]: what dropinf asks of its user."""
    logits, target = model(ids[:, :-1]), ids[:, 1:]
    losses = nn.functional.cross_entropy(
        logits.transpose(1, 2), target, ignore_index=0, reduction="none"
    )
    return losses.sum(1)


def fit(model: nn.Module, data: Tensor, epochs: int = 6) -> None:
    """AdamW on the mean over words; leaves the model in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for ids in DataLoader(data, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            (loss_fn(model, ids).sum() / (ids[:, 1:] > 0).sum()).backward()
            optimizer.step()
    model.eval()


def score(
    texts: Texts,
    model: nn.Module,
    loaders: list[DataLoader],
    compression: Compression,
    solver: solvers.Solver,
) -> tuple[RowStore, RowStore, float, float]:
    """Rows of texts and queries, the share of the same topic, and seconds."""
    start = time.perf_counter()
    plan = dropinf.Plan.make(model, compression)
    store, queries = (
        dropinf.collect(model, loader, loss_fn, plan, progress=False) for loader in loaders
    )
    _, indices = dropinf.topk(queries, store, solver.fit(store), TOP)
    same = float((texts.topics[indices] == texts.query_topics[:, None]).double().mean())
    return store, queries, same, time.perf_counter() - start


def shares(
    model: nn.Module,
    texts: Texts,
    train: Tensor,
    found: dropinf.Attribution,
    asked: RowStore,
    solver: solvers.Solver,
) -> Callable[[int, int], list[tuple[str, float]]]:
    """(query, example) -> the example's words, and the part of the score where each is predicted.

    Of the examples that are shown, whose rows are taken apart into tokens.
    """
    shown = sorted({i for end in (found.top, found.bottom) for row in end.ids for i in row})
    loader = DataLoader(train[shown], batch_size=64)
    tokens = dropinf.collect(model, loader, loss_fn, asked.plan, per="token", progress=False)
    scores = dropinf.scores(asked, tokens, solver)
    example, place = tokens.origin.T
    parts = {i: (example == number) for number, i in enumerate(shown)}

    def of(query: int, i: int) -> list[tuple[str, float]]:
        first, *words = split(texts.train[i])
        values = scores[query, parts[i]][place[parts[i]].argsort()].tolist()
        return [(f"{first} ", 0.0)] + [
            (f"{word} ", value) for word, value in zip(words, values, strict=False)
        ]

    return of
