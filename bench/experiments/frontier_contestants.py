"""The contestants of frontier.py, each from its training pass to its scores.

A peer is called as its documentation calls it, on the whole training set, with its own inverse.
What can be made once for a model (random matrices, compiled functions) is made outside of what is
timed. A damping is relative, to the mean eigenvalue of what it is added to, for all alike; None is
what the package does if it is told nothing.
"""

import logging
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from quality_contestants import FULL, plan_of
from quality_tasks import Task, loader
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, default_collate

import dropinf
from dropinf import solvers
from dropinf.tools.measuring import LeftOut
from dropinf.tools.microbenchmark.peers import only_trainable

MEASURED = 64  # training examples of which energies are measured
LINEAR_LAYERS = 3  # of the task's model
DROPOUT = "Dropout"
# As many numbers of every layer, as dattri and Bergson keep; otherwise a layer's share goes by its
# size.
EQUAL = {"Dropout, equal shares": dropinf.Dropout, "LoGra, equal shares": dropinf.LoGra}
OURS = (
    DROPOUT,
    "Dropout by energy",
    "Dropout and shares by energy",
    "Sketch",
    "LoGra",
    *EQUAL,
    FULL,
)


class Outcome(NamedTuple):
    """Scores [m, n], and the bytes that are kept of the training set for later queries."""

    scores: Tensor
    num_bytes: int


Call = Callable[[float | None], Outcome]  # of a damping
Maker = Callable[[Task, nn.Module, int, int], Call]  # of the side of a layer's square, and a seed


def ours(name: str) -> Maker:
    """dropinf with `name`, r = 3 side² over all layers if it has one; energies are of the call."""

    def make(task: Task, model: nn.Module, side: int, seed: int) -> Call:
        first = TensorDataset(*task.train[:MEASURED])

        def measured() -> dropinf.Energies:
            return dropinf.energies(model, loader(first), task.loss_fn, examples=len(first))

        def call(damping: float | None) -> Outcome:
            if name in EQUAL:
                plan = dropinf.Plan.make(model, EQUAL[name](r=side**2, seed=seed))
            else:
                plan = plan_of(model, name, LINEAR_LAYERS * side**2, seed, measured)
            store, asked = (
                dropinf.collect(
                    model, loader(data), task.loss_fn, plan, progress=False, check=False
                )
                for data in (task.train, task.queries)
            )
            solver = solvers.Cholesky() if damping is None else solvers.Cholesky(damping=damping)
            scores = dropinf.scores(asked, store, solver.fit(store))
            return Outcome(scores, store.rows.nbytes)

        return call

    return make


def trak(task: Task, model: nn.Module, side: int, seed: int) -> Call:
    """One model, its projector for CPUs with a matrix that is made once; no damping by default."""
    need("traker")
    from trak import TRAKer
    from trak.projectors import BasicProjector

    class Kept(BasicProjector):
        def free_memory(self) -> None:
            pass

    r = LINEAR_LAYERS * side**2
    parameters = sum(p.numel() for p in model.parameters())
    projector = Kept(parameters, r, seed, "normal", "cpu", block_size=r)
    state = model.state_dict()

    def call(damping: float | None) -> Outcome:
        with tempfile.TemporaryDirectory() as folder:
            traker = TRAKer(
                model,
                "image_classification",
                train_set_size=len(task.train),
                save_dir=folder,
                device="cpu",
                use_half_precision=False,
                logging_level=logging.CRITICAL,
                projector=projector,
            )
            traker.load_checkpoint(state, model_id=0)
            for batch in loader(task.train):
                traker.featurize(batch, num_samples=len(batch[0]))
            kept = traker.saver.current_store
            if damping is not None:
                gradients = torch.as_tensor(kept["grads"])
                mean = float((gradients**2).sum()) / r
                traker.score_computer.lambda_reg = damping * mean
            traker.finalize_features()
            traker.start_scoring_checkpoint(
                "queries", state, model_id=0, num_targets=len(task.queries)
            )
            for batch in loader(task.queries):
                traker.score(batch, num_samples=len(batch[0]))
            num_bytes = traker.saver.current_store["features"].nbytes
            return Outcome(torch.tensor(traker.finalize_scores("queries")).T, num_bytes)

    return call


class WithLoss(nn.Module):
    """A model that takes its batch as keywords, the form that dattri hands on whole."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, label: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=cross_entropy(self.model(x), label))


def dattri_logra(task: Task, model: nn.Module, side: int, seed: int) -> Call:
    need("dattri")
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask

    # dattri compiles its compression for each layer; torch would give up after eight.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    wrapped = WithLoss(model)
    loaders = [DataLoader(data, 200, collate_fn=keywords) for data in (task.train, task.queries)]
    made = LoGraAttributor(
        AttributionTask(
            loss_func=lambda model, batch, device: model(**batch).loss,
            model=wrapped,
            checkpoints=wrapped.state_dict(),
        ),
        hessian="eFIM",
        proj_dim=side**2,
        offload="none",
        cache_dir=(folder := tempfile.TemporaryDirectory()).name,
    )
    made.sparsifier_kwargs["proj_seed"] = seed

    def call(damping: float | None) -> Outcome:
        made.damping = damping
        with only_trainable(model, model[0].bias):  # no weight gradient is formed twice
            made.cache(loaders[0])
            scores = made.attribute(*loaders)
        num_bytes = 4 * made.total_proj_dim * len(task.train)
        return Outcome(scores.detach().T, num_bytes)

    call.folder = folder  # which goes when nothing holds it
    return call


def keywords(examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return dict(zip(("x", "label"), default_collate(examples), strict=True))


class Sequences(nn.Module):
    """A model for Bergson, which takes inputs of three dimensions only: one position each."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.device = model, torch.device("cpu")

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x[:, None])[:, 0]


def bergson(unit_norm: bool) -> Maker:
    """Its collector in memory, its matrix and its inverse of that.

    With unit norm, as its queries are by default, both sides get the root of the inverse and the
    score is a cosine; without, the influence function.
    """

    def make(task: Task, model: nn.Module, side: int, seed: int) -> Call:
        need("bergson")
        from bergson import GradientProcessor, IndexConfig, InMemoryCollector
        from bergson.hessians.inversion import invert_psd_matrix
        from bergson.process_grads import normalize_and_aggregate_grads, precondition_flat_grads
        from datasets import Dataset

        wrapped = Sequences(model)

        def collected(data: TensorDataset, with_matrix: bool) -> InMemoryCollector:
            collector = InMemoryCollector(
                model=wrapped,
                data=Dataset.from_dict({"at": range(len(data))}),
                cfg=IndexConfig(run_path="", projection_dim=side),
                processor=GradientProcessor(projection_dim=side, projection_seed=seed),
                skip_hessians=not with_matrix,
            )
            start = 0
            for batch in loader(data):
                at = list(range(start, start := start + len(batch[0])))
                with only_trainable(wrapped, model[0].bias), collector.with_batch():
                    losses = task.loss_fn(wrapped, batch)
                    losses.sum().backward()
                collector.process_batch(at, losses=losses)
            collector.teardown()
            return collector

        def call(damping: float | None) -> Outcome:
            with redirect_stdout(StringIO()):
                train, asked = collected(task.train, True), collected(task.queries, False)
            given = {} if damping is None else {"damping_factor": damping}
            power = -0.5 if unit_norm else -1.0
            matrices = train.processor.hessians
            inverse = {
                name: invert_psd_matrix(H, power=power, **given) for name, H in matrices.items()
            }
            names = list(matrices)
            rows, queries = (
                torch.cat([kept.gradients[name] for name in names], 1).float()
                for kept in (train, asked)
            )
            num_bytes = rows.nbytes
            queries = precondition_flat_grads(queries, inverse, names)
            if unit_norm:
                rows = precondition_flat_grads(rows, inverse, names)
                queries, rows = (
                    normalize_and_aggregate_grads(
                        {"all": some}, ["all"], unit_normalize=True, device=torch.device("cpu")
                    )["all"]
                    for some in (queries, rows)
                )
            return Outcome(queries @ rows.T, num_bytes)

        return call

    return make


def kronfluence(task: Task, model: nn.Module, side: int, seed: int) -> Call:
    """EK-FAC; its scores make the gradients of the training set anew for every set of queries.

    Its heuristic damping is a tenth of the mean eigenvalue; here the tenth is the damping. Without
    one it adds 1e-8. Labels are sampled from the model for its factors, which the seed fixes.
    """
    need("kronfluence")
    import copy

    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import ScoreArguments
    from kronfluence.task import Task as Losses

    class Classification(Losses):
        def compute_train_loss(self, batch, model, sample=False):
            x, label = batch
            logits = model(x)
            if sample:
                with torch.no_grad():
                    label = torch.multinomial(logits.softmax(-1), 1).flatten()
            return cross_entropy(logits, label, reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    losses = Classification()

    def call(damping: float | None) -> Outcome:
        torch.manual_seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            analyzer = Analyzer(
                "frontier",
                prepare_model(copy.deepcopy(model), losses),
                losses,
                cpu=True,
                disable_tqdm=True,
                log_level=logging.ERROR,
                output_dir=folder,
            )
            analyzer.fit_all_factors("ekfac", task.train, per_device_batch_size=200)
            num_bytes = sum(f.stat().st_size for f in Path(folder).rglob("*.safetensors"))
            arguments = ScoreArguments() if damping is None else ScoreArguments(damping_factor=None)
            scale = "kronfluence.factor.config.HEURISTIC_DAMPING_SCALE"
            with mock.patch(scale, damping):
                analyzer.compute_pairwise_scores(
                    "all",
                    "ekfac",
                    task.queries,
                    task.train,
                    per_device_query_batch_size=len(task.queries),
                    per_device_train_batch_size=200,
                    score_args=arguments,
                )
            return Outcome(analyzer.load_pairwise_scores("all")["all_modules"], num_bytes)

    return call


def need(package: str) -> None:
    """Raise LeftOut if the package is missing."""
    try:
        version(package)
    except PackageNotFoundError:
        raise LeftOut(
            f"{package} is not installed; pip install -c constraints.txt --no-deps {package}, and "
            "what it imports"
        ) from None


EKFAC = "Kronfluence EK-FAC"
PEERS: dict[str, Maker] = {
    "dattri LoGra": dattri_logra,
    "TRAK": trak,
    "Bergson": bergson(unit_norm=False),
    "Bergson, unit norm": bergson(unit_norm=True),
    EKFAC: kronfluence,
}
CONTESTANTS: dict[str, Maker] = {**{name: ours(name) for name in OURS}, **PEERS}
WITHOUT_R = (EKFAC, FULL)  # which keep no r numbers of an example
