"""The eigenvalues and eigenvectors of every layer's F_l: any damping, any rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dropinf import ops
from dropinf.compression import LayerPlan
from dropinf.rows import (
    PART_BYTES,
    RowStore,
    device_of,
    mark_invalid,
    products,
    ranks_together,
    solved_for,
    valid_rows,
)
from dropinf.solvers.base import Solver
from dropinf.solvers.damping import Damping
from dropinf.solvers.factor_file import FileTensor, Spill
from dropinf.solvers.gauss_newton import columns_of
from dropinf.solvers.number_range import check_squares
from dropinf.solvers.room import Room, within
from dropinf.user_warning import warn_user

_ROUNDING = 8 * torch.finfo(torch.float64).eps


class _Pairs(NamedTuple):
    """F_l = V diag(s) Vᵀ of one layer, as far as it is kept."""

    block: LayerPlan
    s: Tensor  # [k] float64, rising
    V: Tensor | FileTensor  # [r, k] float64, in a file transposed and flat
    mean_diagonal: float  # of F_l, all of it

    def vectors(self) -> Tensor:
        """V, in memory."""
        if isinstance(self.V, Tensor):
            return self.V
        return self.V.read().to(self.s.device).view(len(self.s), self.block.r).T


class Eigen(Solver):
    """F_l = V diag(s) Vᵀ: solves for any damping, with all eigenpairs or the largest ones.

        (F + λ)⁻¹ q = V (Vᵀ q / (s + λ)) + (q - V Vᵀ q) / λ

    The second part is what F_l has no kept eigenvector for: its rank is at most n, and `rank` keeps
    the k largest pairs (arXiv 2112.03052, section 3, truncates so; there the rest is dropped, here
    F counts as zero on it). A decomposition costs about twenty Cholesky factorisations, whatever
    the number of dampings; where n < r it is that of G Gᵀ / n [n, n]. float64.

        solver = dropinf.solvers.Eigen(rank=20).fit(store)

    Args:
        damping, absolute: as in `Cholesky`.
        rank: eigenpairs to keep of each layer; None is all.
        max_bytes: bound of the memory, see `Solver`. Eigenvectors that are more than a quarter of
            it are in a temporary file, and read a layer at a time.

    Raises:
        ValueError: a damping, the rank or max_bytes is out of range.
    """

    _takes_part = True

    def __init__(
        self,
        damping: float | Mapping[str, float] = 0.1,
        absolute: bool = False,
        rank: int | None = None,
        max_bytes: int | None = None,
    ) -> None:
        self._damping = Damping(type(self).__name__, damping, absolute)
        if rank is not None and rank < 1:
            raise ValueError(f"{type(self).__name__}: rank must be from 1, got {rank!r}")
        self.damping, self.absolute, self.rank = damping, absolute, rank
        self._bounded(max_bytes)

    def _fit(self, store: RowStore, n: int) -> None:
        blocks = self._blocks(store.plan)
        self._damping.of(blocks)  # before hours of work
        room = self.room("fit")
        part_bytes = room.part_bytes
        room = room.share(5 / 8)  # beside two parts of the rows, and what is made of one
        needs = []
        for block in blocks:
            vectors = self._vector_bytes(block, n)
            # A matrix, its eigenvectors and LAPACK's workspace; a copy of V, Q and one in order.
            scratch = 6 * 8 * min(n, block.r) ** 2 + (3 * vectors if n < block.r else 0)
            room.need(f"layer {block.name!r} (n={n}, r={block.r})", vectors + scratch)
            needs.append((vectors, scratch))
        kept, scratch = sum(v for v, _ in needs), max(s for _, s in needs)
        fits = kept <= room.num_bytes / 4 and kept + scratch <= room.num_bytes
        self._pairs: list[_Pairs] = []
        self._spill = None if fits else Spill()
        self._kept_bytes = kept if fits else 0
        for pairs in self._all_pairs(store, n, blocks, part_bytes):
            if self._spill is not None:
                pairs = pairs._replace(V=self._spill.append(pairs.V.T.reshape(-1)))
            self._pairs.append(pairs)
            del pairs
        self._warn_of_rounding("fit", self._damping)

    def _all_pairs(
        self, store: RowStore, n: int, blocks: Sequence[LayerPlan], part_bytes: int | None
    ) -> Iterator[_Pairs]:
        """Of each layer; inside of `over_ranks` each rank decomposes another one at a time."""
        ranks = ranks_together()
        if ranks is None:
            for block in blocks:
                yield self._decompose(store, n, block, part_bytes)
            return
        for first in range(0, len(blocks), ranks.size):
            some, mine = blocks[first : first + ranks.size], None
            if ranks.rank < len(some):
                mine = self._decompose(store, n, some[ranks.rank], part_bytes)
            told = None if mine is None else [len(mine.s), mine.mean_diagonal]
            said = ranks.meet("eigenvalues", told)
            for rank, block in enumerate(some):
                k, mean = said[rank]
                numbers = torch.empty(k + k * block.r, dtype=torch.float64, device=store.device)
                if rank == ranks.rank:
                    numbers[:k], numbers[k:] = mine.s, mine.V.T.reshape(-1)
                ranks.give(numbers, rank)
                yield _Pairs(block, numbers[:k], numbers[k:].view(k, block.r).T, mean)

    def _vector_bytes(self, block: LayerPlan, n: int) -> int:
        return 8 * block.r * min(n, block.r, block.r if self.rank is None else self.rank)

    def _decompose(
        self, store: RowStore, n: int, block: LayerPlan, part_bytes: int | None
    ) -> _Pairs:
        op = f"{type(self).__name__}.fit"
        if n < block.r:
            K = torch.zeros(n, n, dtype=torch.float64, device=store.device)
            for _, G in columns_of(store, block, n, part_bytes):
                K.addmm_(G, G.T)
            K.div_(n)
            check_squares(op, block, K.diagonal(), store)
            mean = float(K.trace()) / block.r
            s, U = torch.linalg.eigh(K)
            del K
            kept = self._kept(s)
            s, U = s[kept], U[:, kept] / (n * s[kept]).sqrt()
            V = s.new_empty(block.r, len(s))
            for columns, G in columns_of(store, block, n, part_bytes):
                torch.mm(G.T, U, out=V[within(block, columns)])
            if len(s) and s[0] < 1e-3 * s[-1]:
                # The shorter G.T u is, the more rounding has left in it of the longer ones.
                V = torch.linalg.qr(V.flip(1)).Q.flip(1)
        else:
            F = torch.zeros(block.r**2, dtype=torch.float64, device=store.device)
            for rows in valid_rows(store, [block.entries], part_bytes=part_bytes):
                ops.gram(rows, (0, block.r), scale=1 / n, accumulate=True, out=F)
            matrix = F.view(block.r, block.r)
            check_squares(op, block, matrix.diagonal(), store)
            mean = float(matrix.diagonal().mean())
            s, V = torch.linalg.eigh(matrix)  # reads the lower triangle
            kept = self._kept(s)
            if len(s[kept]) < block.r:
                V = V[:, kept].clone()  # or else all of it would stay in memory
            s = s[kept]
        return _Pairs(block, s, V, mean)

    def _kept(self, s: Tensor) -> slice:
        """The largest ones that are not rounding of zero; s is rising."""
        positive = int((s > _ROUNDING * len(s) ** 0.5 * s[-1].clamp(min=0)).sum())
        k = positive if self.rank is None else min(positive, self.rank)
        return slice(len(s) - k, len(s))

    def _solve(self, rows: Tensor, solved: Tensor, room: Room) -> None:
        self._solve_with(self._damping, rows, solved, room)

    def solve_at(self, rows: Tensor, damping: float | Mapping[str, float]) -> Tensor:
        """`solve` of rows [m, R] with another damping, from the same decomposition.

        Raises:
            ValueError: a layer is singular at that damping.
        """
        return self._solve_at(rows, damping, self.room("solve_at"))

    def _solve_at(self, rows: Tensor, damping: float | Mapping[str, float], room: Room) -> Tensor:
        wanted = Damping(f"{type(self).__name__}.solve_at", damping, self.absolute)

        def solve(q: Tensor, solved: Tensor, room: Room) -> None:
            self._warn_of_rounding("solve_at", wanted)
            self._solve_with(wanted, q, solved, room)

        return self._checked("solve_at", rows, solve, room)

    def whiten(self, rows: Tensor) -> Tensor:
        """[n, R] -> [n, R]: each layer's slice times (F_l + λ_l)^(-1/2), the symmetric root.

        Products of whitened rows are scores, of training rows with queries, so that an index of
        inner products finds what `dropinf.topk` does.

        Raises:
            RuntimeError, ValueError: as in `solve`.
        """

        def solve(q: Tensor, solved: Tensor, room: Room) -> None:
            self._solve_with(self._damping, q, solved, room, power=0.5)

        return self._checked("whiten", rows, solve, self.room("whiten"))

    def _solve_with(
        self, damping: Damping, rows: Tensor, solved: Tensor, room: Room, power: float = 1.0
    ) -> None:
        λs = self._lambdas("solve_at", damping)
        for pairs, λ in zip(self._pairs, λs, strict=True):
            block, s, V = pairs.block, pairs.s, pairs.vectors()
            # A query, its solution and three of its width more, and two products with V.
            query_bytes = 8 * (5 * block.r + 2 * len(s))
            left = room if self._spill is None else room.beside(8 * V.numel())
            left.need(f"layer {block.name!r} (r={block.r})", query_bytes)
            few = left.count(query_bytes)
            for some, found in zip(rows.split(few), solved.split(few), strict=True):
                q = some[:, block.entries].double()
                inside = q @ V
                x = inside / (s + λ) ** power @ V.T
                if len(s) < block.r and λ > 0:
                    x += torch.sub(q, inside @ V.T).div_(λ**power)
                found[:, block.entries] = x
            del V

    def _lambdas(self, call: str, damping: Damping) -> list[float]:
        """λ_l of each layer, none of which it leaves singular."""
        numbers = damping.of([pairs.block for pairs in self._pairs])
        λs = []
        for (block, s, _, mean), number in zip(self._pairs, numbers, strict=True):
            λ = damping.λ(number, mean)
            if λ == 0 and mean > 0 and len(s) < block.r:
                raise ValueError(
                    f"{type(self).__name__}.{call}: layer {block.name!r} (r={block.r}, {len(s)} "
                    "eigenpairs) is singular at damping=0; raise the damping"
                )
            λs.append(λ)
        return λs

    def _warn_of_rounding(self, call: str, damping: Damping) -> None:
        for (block, s, *_), λ in zip(self._pairs, self._lambdas(call, damping), strict=True):
            rounding = _ROUNDING * block.r**0.5 * float(s[-1]) if len(s) else 0.0
            if 0 < λ < 100 * rounding and len(s) < block.r:
                warn_user(
                    f"{type(self).__name__}.{call}: layer {block.name!r} has lambda={λ:.3g}, and "
                    f"eigenvalues below {rounding:.3g} count as zero: its solutions keep few "
                    "digits; raise the damping"
                )

    def log_likelihood(self, rows: Tensor, dampings: Sequence[float]) -> Tensor:
        """Of rows [m, R] under N(0, F_l + λ_l), the sum over layers, at k dampings: [m, k] float64.

            -1/2 Σ log(s + λ) - 1/2 gᵀ (F + λ)⁻¹ g - r/2 log(2 pi)

        A layer that is zero in every row of the fit is left out.
        """
        op = f"{type(self).__name__}.log_likelihood"
        wanted = [Damping(op, damping, self.absolute) for damping in dampings]
        λs = [self._lambdas("log_likelihood", damping) for damping in wanted]
        asked, rows = rows.device, rows.to(self.device)
        found = rows.new_zeros(len(rows), len(dampings), dtype=torch.float64)
        for l, pairs in enumerate(self._pairs):
            if pairs.mean_diagonal == 0:
                continue
            block, s = pairs.block, pairs.s
            g = rows[:, block.entries].double()
            inside = (g @ pairs.vectors()).square()
            outside = (g.square().sum(1) - inside.sum(1)).clamp(min=0)
            for k, of_layers in enumerate(λs):
                λ, beyond = of_layers[l], block.r - len(s)
                log_det = float((s + λ).log().sum()) + (beyond * math.log(λ) if beyond else 0.0)
                square = (inside / (s + λ)).sum(1) + (outside / λ if beyond else 0.0)
                found[:, k] -= (log_det + square + block.r * math.log(2 * math.pi)) / 2
        return found.to(asked)

    def sweep(
        self,
        dampings: Sequence[float],
        queries: RowStore,
        store: RowStore | None = None,
        weights: str = "same",
    ) -> Tensor:
        """Scores at k dampings, from one decomposition and one pass over the store for as many
        dampings as have room (256 MB without `max_bytes`).

        Args:
            dampings: k of them, each as in `Cholesky`.
            queries: m rows under the plan of the fit.
            store: n training rows to score; None is the store of the fit.
            weights: as in `dropinf.scores`.

        Returns:
            [k, m, n], each as `dropinf.scores` makes it.

        Raises:
            ValueError: rows under another plan, or a layer is singular at one of the dampings.
        """
        store = self.store if store is None else store
        op = f"{type(self).__name__}.sweep"
        self.check_plans(op, queries, store, weights)
        m, n, R = len(queries), len(store), store.plan.width
        device = device_of(queries, store)
        found = torch.empty(len(dampings), m, n, dtype=queries.read_dtype, device=device)
        room = self.room("sweep", whole_store=True)
        # Of one query at one damping: solutions in float64, alone and together, beside the query
        # and a solution in float32, and scores.
        pair_bytes = 32 * R + 8 * n
        half = room.share(1 / 2)
        half.need(f"a row of width R={R} (n={n})", pair_bytes)
        pairs = half.count(pair_bytes)
        few = max(1, m if self.max_bytes is None else min(m, pairs))
        some = max(1, pairs // few)
        for first in range(0, len(dampings), some):
            for start in range(0, m, few):
                at, asked = slice(first, first + some), slice(start, start + few)
                rows = queries.at(torch.arange(m)[asked]).to(device)
                solved = [
                    solved_for(
                        rows,
                        store,
                        partial(self._solve_at, damping=damping, room=half),
                        min(PART_BYTES, int(half.num_bytes / 2)),
                    )
                    for damping in dampings[at]
                ]
                scores = products(torch.cat(solved), store).view(len(solved), len(rows), n)
                found[at, asked] = scores
                self.check_scores(
                    op,
                    found[at, asked],
                    (queries.valid[asked, None], store.valid),
                    lambda k, q, i, solved=solved: (solved[k][q], store.at([i])[0]),
                )
        return mark_invalid(found, queries, store)
