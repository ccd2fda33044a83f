"""dattri 0.3 with dropout compression.

Its random projections replaced, while TRAKAttributor, TracIn and DVEmb work:

    with dropinf.integrations.dattri.projection("dropout"):
        attributor = TRAKAttributor(task, m, projector_kwargs={"proj_dim": 512})
        attributor.cache(train_loader)
        scores = attributor.attribute(test_loader)

By energy, which keeps more of the scores at the same proj_dim: `projection("dropout", energies)`,
with those of `dropinf.energies`, or the mean square [P] of some of dattri's own gradients.

dattri has no argument for a projection of one's own, so `projection` replaces the function by which
those modules make one, and puts it back. DVEmb works with factorization_type="none": the factorised
ones of dattri 0.3 project both sides of a layer with one seed, so that sampled inputs and outputs
go together and products are biased, which is refused. All TRAKAttributors, and all TracIns, of one
`projection` share their projector_kwargs, as dattri 0.3 has them share those of its module.

The attributor replaced, which computes each example's row inside one batched backward pass:

    from dropinf.integrations.dattri import DropinfAttributor

    attributor = DropinfAttributor(task, dropinf.Dropout(r=1024))
    attributor.cache(train_loader)
    scores = attributor.attribute(train_loader, test_loader)  # [n, m], as dattri's
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from dropinf.compression import Compression, DropoutProjector, Energies, Plan
from dropinf.integrations.batching import batched_outputs, check_first, first_alone
from dropinf.integrations.versions import tested
from dropinf.rows import RowStore, collect
from dropinf.scoring import scores, self_influence
from dropinf.solvers import Cholesky, Solver

with tested("dattri", "0.3"):
    from dattri.algorithm import dvemb, tracin, trak
    from dattri.algorithm.base import BaseAttributor
    from dattri.task import AttributionTask

_NAME = "DropinfAttributor"


@contextmanager
def projection(
    proj_type: str = "dropout", energies: Energies | Tensor | None = None
) -> Iterator[None]:
    """While open, TRAKAttributor, the TracIn and the DVEmb attributors project by dropout.

    An attributor belongs to the `projection` it was made in: one made inside is refused by dattri
    outside, and one made outside is refused inside, so that no scores mix two projections.

    Args:
        proj_type: "dropout" or "sketch", see `dropinf.DropoutProjector`. Dimension, seed and device
            are those of dattri's projector_kwargs, whose proj_type must not be given.
        energies: to draw by, as of `dropinf.DropoutProjector`, for all checkpoints alike; of the
            parameters in the attributor's layer_name, in that order, if it has one.

    Raises:
        ImportError: dattri is not like its releases, as its main branch, whose attributors take
            typed parameters for projector_kwargs.
        ValueError: in a call of the attributor: it was made outside, has a proj_type of its own, or
            is a DVEmbAttributor with factors; or what `dropinf.DropoutProjector` refuses.
    """
    made: dict[Any, DropoutProjector] = {}  # dattri asks for one a batch
    own_type = proj_type
    wanted = proj_type if energies is None else _with_energies(proj_type, energies)

    def random_project(
        feature: Tensor | dict[str, Tensor],
        feature_batch_size: int,
        proj_dim: int,
        proj_max_batch_size: int,
        proj_seed: int = 0,
        proj_type: str = "normal",
        *,
        device: str | torch.device = "cpu",
    ) -> Callable[..., Tensor]:
        if proj_type != wanted:
            raise ValueError(
                f"projection: the attributor's proj_type is {proj_type!r}, not {wanted!r}; make it "
                "inside of `with projection(...)`, and without proj_type in its projector_kwargs"
            )
        parts = list(feature.values()) if isinstance(feature, dict) else [feature]
        grad_dim = sum(part.numel() for part in parts) // feature_batch_size
        key = (grad_dim, proj_dim, proj_seed, own_type, str(device), parts[0].dtype)
        if key not in made:
            made[key] = DropoutProjector(*key, energies=energies)

        def project(feature: Tensor | dict[str, Tensor], ensemble_id: int = 0) -> Tensor:
            return made[key].project(feature, ensemble_id=ensemble_id)

        return project

    with ExitStack() as stack:
        with tested("dattri", "0.3"):
            for module in (trak, tracin, dvemb):
                # Attributors take them, and of trak and tracin write projector_kwargs into them.
                defaults = {**module.DEFAULT_PROJECTOR_KWARGS, "proj_type": wanted}
                for name, value in (
                    ("DEFAULT_PROJECTOR_KWARGS", defaults),
                    ("random_project", random_project),
                ):
                    stack.enter_context(mock.patch.object(module, name, value))
            patch = mock.patch.object(dvemb.DVEmbAttributor, "_setup_projectors", _refuse_factors)
            stack.enter_context(patch)
        yield


def _with_energies(proj_type: str, energies: Energies | Tensor) -> str:
    """proj_type with what tells these energies from others; they are checked."""
    size = energies.numel() if isinstance(energies, Tensor) else getattr(energies, "size", 1)
    return DropoutProjector(size, 1, proj_type=proj_type, energies=energies).proj_type


def _refuse_factors(attributor: dvemb.DVEmbAttributor, batch_size: int) -> None:
    raise ValueError(
        f"projection: DVEmbAttributor with factorization_type={attributor.factorization_type!r} "
        "projects both sides of a layer with one seed, which is biased for sampled coordinates; "
        'use factorization_type="none"'
    )


class DropinfAttributor(BaseAttributor):
    """dropinf's influence with dattri's protocol: an AttributionTask, `cache` and `attribute`.

    scores[i, q] = Σ_l g_q,l · (F_l + λ_l)⁻¹ · g_i,l, with g_i the gradient of the task's loss
    function and g_q that of its target function, averaged over the task's checkpoints. Its sign is
    that of dattri's influence functions; the matrix is that of `dropinf.scores`, transposed.
    """

    def __init__(
        self,
        task: AttributionTask,
        compression: Plan | Compression,
        solver: Callable[[], Solver] = Cholesky,
        *,
        layer_name: str | Sequence[str] | None = None,
        batch_of_one: bool = True,
        mode: str = "activations",
        device: str | torch.device = "cpu",
        check: bool = True,
    ) -> None:
        """
        Args:
            task: its functions must call its model, once for an example.
            compression: which coordinates to keep, or a plan for the task's model.
            solver: makes the solver of one checkpoint, such as `lambda: Cholesky(damping=0.01)`.
            layer_name: names of parameters, as in dattri, or of layers to track, with a
                compression; None for all.
            batch_of_one: whether the task's functions take a batch of one example, as dattri's
                influence functions call them, or an example without batch dimension, as its
                TRAKAttributor does.
            mode: see `dropinf.capture`.
            device: where the batches go; the model is there.
            check: as of `dropinf.collect`, and compare the first example of a loader with the
                task's function alone: in `cache`, and of a target function of its own the first
                time that it is called.

        Raises:
            ValueError: layer_name matches no trainable parameter, or comes with a plan.
        """
        self.task, self.make_solver, self.mode = task, solver, mode
        self.batch_of_one, self.device, self.check = batch_of_one, device, check
        if not isinstance(compression, Plan):
            compression = Plan.make(task.get_model(), compression, include=layer_name)
        elif layer_name is not None:
            raise ValueError(
                f"{_NAME}: a plan has its layers, got layer_name={layer_name!r} as well; give a "
                "compression with layer_name, or a plan of Plan.make(..., include=layer_name)"
            )
        self.plan = compression
        self.solvers: list[Solver] = []  # one a checkpoint, fitted on `stores`
        self.stores: list[RowStore] = []
        self._cached: DataLoader | None = None
        self._checked: list[Callable[..., Tensor]] = []  # functions whose rows were checked

    def cache(self, full_train_dataloader: DataLoader) -> None:
        """Collect the rows of the full training set at each checkpoint, and fit the solvers."""
        _in_order(full_train_dataloader)
        self._cached = None
        loss = self.task.get_loss_func(flatten=False)
        self.stores = [
            self._rows(i, full_train_dataloader, loss, self.check) for i in self._checkpoints()
        ]
        self._checked = [loss]
        self.solvers = [self.make_solver().fit(store) for store in self.stores]
        self._cached = full_train_dataloader

    def attribute(self, train_dataloader: DataLoader, test_dataloader: DataLoader) -> Tensor:
        """[n, m] influence of each training example on each test example.

        Args:
            train_dataloader: the one of `cache`, or a part of its data, of which rows are made.
            test_dataloader: of the queries.

        Raises:
            RuntimeError: `cache` was not called.
            ValueError: a loader shuffles.
        """
        self._need_cache("attribute")
        _in_order(train_dataloader)
        _in_order(test_dataloader)
        loss = self.task.get_loss_func(flatten=False)
        target = self.task.get_target_func(flatten=False)
        mean: Any = 0
        for i in self._checkpoints():
            check = self.check and target not in self._checked
            queries = self._rows(i, test_dataloader, target, check)
            self._checked.append(target)
            same = train_dataloader is self._cached
            store = self.stores[i] if same else self._rows(i, train_dataloader, loss, False)
            mean = mean + scores(queries, store, self.solvers[i]).T / len(self.stores)
        return mean

    def self_attribute(self) -> Tensor:
        """[n] influence of each training example on itself, for dattri's mislabel detection."""
        self._need_cache("self_attribute")
        parts = [self_influence(self.stores[i], self.solvers[i]) for i in self._checkpoints()]
        return torch.stack(parts).mean(0)

    def _checkpoints(self) -> range:
        return range(len(self.task.get_checkpoints()))

    def _need_cache(self, call: str) -> None:
        if self._cached is None:
            raise RuntimeError(f"{_NAME}.{call}: call cache(full_train_dataloader) first")

    def _rows(
        self, checkpoint: int, loader: DataLoader, function: Callable[..., Tensor], check: bool
    ) -> RowStore:
        self.task.get_param(checkpoint, layer_split=True)  # loads it into the model, copies nothing
        model = self.task.get_model()
        params = dict(model.named_parameters())

        def one(*example: Tensor) -> Tensor:
            if self.batch_of_one:
                example = tuple(t.unsqueeze(0) for t in example)
            return function(params, example)

        alone = []
        if check:  # outside of the capture, which is not to see a pass of one example
            batch = [t.to(self.device) for t in next(iter(loader))]
            alone.append(first_alone(one, batch))

        def losses(model: nn.Module, batch: Any) -> Tensor:
            outputs = batched_outputs(_NAME, model, one, [t.to(self.device) for t in batch])
            if alone:
                check_first(_NAME, outputs, alone.pop())
            return outputs

        return collect(
            model, loader, losses, self.plan, mode=self.mode, progress=False, check=check
        )


def _in_order(loader: DataLoader) -> None:
    if isinstance(loader.sampler, RandomSampler):
        raise ValueError(
            f"{_NAME}: the loader shuffles, so that scores could not be told to examples; "
            "make it with shuffle=False"
        )
