"""LiSSA: the Neumann series of the inverse, with all rows or with sampled ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dropinf.compression import LayerPlan
from dropinf.rows import RowStore
from dropinf.solvers.by_passes import ByPasses
from dropinf.solvers.damping import Damping
from dropinf.solvers.gauss_newton import multiply, parts, solvable
from dropinf.solvers.number_range import diagonal_of
from dropinf.solvers.room import span, within
from dropinf.user_warning import warn_user

# The series converges for scales above (σ_max + λ) / 2, so with this margin an estimate of
# σ_max / 2.2 would do. Power iteration comes to less from all four random vectors with a
# probability of at most (0.83 √r 2.2^-11.5)⁴, 8e-9 at r = 10⁴, whatever the other eigenvalues are
# (Kuczynski and Wozniakowski 1992, doi 10.1137/0613066, section 4).
_POWER_PASSES = 12
_POWER_VECTORS = 4
_MARGIN = 1.1


class LiSSA(ByPasses):
    """x <- q + x - (F_l + λ_l) x / scale_l from x = q; the result is x / scale_l.

    Agarwal et al. 2017 (arXiv 1602.03943), with the scale of Koh and Liang 2017 (arXiv 1703.04730,
    section 3). It converges for scale_l > (σ_max(F_l) + λ_l) / 2, by a factor of
    1 - (σ_min + λ_l) / scale_l a step where scale_l is above twice that.

    With all rows a step is one pass over the store for all layers that are not done, and `CG` needs
    fewer. With sampled ones a step reads `batch_size` rows, and x ends in noise around the solution
    that falls as `batch_size`, `repeats` and `scale` rise. At `fit`, one pass for λ_l, twelve for
    σ_max by power iteration unless `scale` is given, and one more for sampled rows. Memory: four
    float64 tensors [m, R], or within `max_bytes` by solving for some layers, or some queries of a
    layer, after the others.

        solver = dropinf.solvers.LiSSA(damping=0.1).fit(store)

    Args:
        damping: λ_l as a share of the mean of diag(F_l), a number or layer name -> number.
        absolute: `damping` is λ_l itself.
        depth: steps; with all rows at most.
        batch_size: rows of each step, drawn with replacement; None takes all, without any noise.
        repeats: runs with sampled rows that are averaged.
        seed: of the sampled rows and of the power iteration.
        scale: of every layer; None takes σ_max(F_l) + λ_l and a margin, with sampled rows
            + max_i |g_i,l|² / batch_size, which bounds the mean square of x: E[(Ĝᵀ Ĝ / b)²] is at
            most (σ_max + max |g|² / b) F.
        tol: with all rows, stop at |q - (F_l + λ_l) x| / |q| <= tol for all queries of a layer.
        max_bytes: bound of the memory, see `Solver`.

    Raises:
        ValueError: an argument is out of range; or, at `fit`, a layer with λ_l = 0 has n < r_l or
            a coordinate that is zero in every row.
        RuntimeError: at `solve`, a layer diverges.

    Warns:
        UserWarning: at `solve` with all rows, a layer did not come to `tol` in `depth` steps.
    """

    # A chain's q and x, the product and its sum, and what one layer's step makes beside them.
    _num_tensors = 8

    def __init__(
        self,
        damping: float | Mapping[str, float] = 0.1,
        absolute: bool = False,
        depth: int = 1000,
        batch_size: int | None = None,
        repeats: int = 1,
        seed: int = 0,
        scale: float | None = None,
        tol: float = 1e-4,
        max_bytes: int | None = None,
    ) -> None:
        self._damping = Damping("LiSSA", damping, absolute)
        for name, count in (("depth", depth), ("batch_size", batch_size), ("repeats", repeats)):
            if count is not None and count < 1:
                raise ValueError(f"LiSSA: {name} must be from 1, got {count!r}")
        for name, number in (("scale", scale), ("tol", tol)):
            if number is not None and not 0 < number < float("inf"):
                raise ValueError(f"LiSSA: {name} must be a number above 0, got {number!r}")
        self.depth, self.batch_size, self.repeats = depth, batch_size, repeats
        self.seed, self.tol, self._given_scale = seed, tol, scale
        self._bounded(max_bytes)

    def _fit(self, store: RowStore, n: int) -> None:
        blocks = store.plan.blocks
        diagonal = diagonal_of(self.room("fit"), store, n)
        λs = self._damping.lambdas(blocks, diagonal)
        self._layers = solvable("LiSSA.fit", blocks, λs, diagonal, n)
        self._n = n
        del diagonal
        if self._given_scale is None:
            self._scales = self._stable_scales(store)
        else:
            self._scales = [float(self._given_scale)] * len(self._layers)

    def _stable_scales(self, store: RowStore) -> list[float]:
        generator, room = torch.Generator().manual_seed(self.seed), self.room("fit")
        blocks = [block for block, _ in self._layers]
        norms, longest = [], [0.0] * len(blocks)
        tensors = room.share(1 / 2)
        for some, _ in tensors.pieces(
            blocks, 1, lambda r: _POWER_VECTORS * self._query_bytes(r, room.part_bytes)
        ):
            norms += self._largest(store, blocks[some], generator, room.part_bytes)
        if self.batch_size is not None:
            for rows in parts(store, part_bytes=room.part_bytes):
                for at, block in enumerate(blocks):
                    squares = rows[:, block.entries].square().sum(1)
                    longest[at] = max(longest[at], float(squares.max()) / self.batch_size)
        return [
            _MARGIN * (norm + λ + noise)
            for norm, noise, (_, λ) in zip(norms, longest, self._layers, strict=True)
        ]

    def _largest(
        self,
        store: RowStore,
        blocks: Sequence[LayerPlan],
        generator: torch.Generator,
        part_bytes: int | None,
    ) -> list[float]:
        """The largest eigenvalue of each layer's F_l, by power iteration."""
        vectors = []
        for block in blocks:
            v = torch.randn(_POWER_VECTORS, block.r, generator=generator, dtype=torch.float64)
            vectors.append((block, v.to(store.device)))
        norms = []
        for _ in range(_POWER_PASSES):
            vectors = [
                (block, v / v.norm(dim=1, keepdim=True).clamp(min=1e-300)) for block, v in vectors
            ]
            products = multiply(store, self._n, vectors, part_bytes)
            norms = [float(v.norm(dim=1).max()) for v in products]
            vectors = list(zip(blocks, products, strict=True))
        return norms

    def _solve_some(
        self, layers: slice, rows: Tensor, solved: Tensor, part_bytes: int | None
    ) -> None:
        run = self._with_all_rows if self.batch_size is None else self._with_sampled_rows
        chains = [
            _Chain(block, λ, scale, rows[:, block.entries].double())
            for (block, λ), scale in zip(self._layers[layers], self._scales[layers], strict=True)
        ]
        run(chains, part_bytes)
        for chain in chains:
            solved[:, chain.block.entries] = chain.x * (chain.norms / chain.scale)

    def _with_all_rows(self, chains: list[_Chain], part_bytes: int | None) -> None:
        for _ in range(self.depth):
            if not chains:
                return
            asked = [(chain.block, chain.x) for chain in chains]
            products = multiply(self.store, self._n, asked, part_bytes)
            waiting = []
            for chain, product in zip(chains, products, strict=True):
                change = chain.change(product)
                # A stable series never steps farther than |q| = 1, the bound of its first step.
                if not chain.residual <= 2:
                    self._diverged(chain)
                if chain.residual > self.tol:
                    chain.x += change
                    waiting.append(chain)
            chains = waiting
        if chains:
            worst = max(chains, key=lambda chain: chain.residual)
            warn_user(
                f"LiSSA.solve: layer {worst.block.name!r} has a relative residual of "
                f"{worst.residual:.2g} after depth={self.depth} steps, above tol={self.tol:g} "
                f"(layers not done: {len(chains)}); raise depth or the damping, or take CG",
            )

    def _with_sampled_rows(self, chains: list[_Chain], part_bytes: int | None) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        valid = self.store.valid.nonzero().flatten()
        columns = span([chain.block for chain in chains])
        few = self.batch_size
        if part_bytes is not None:
            few = max(1, min(part_bytes // (8 * self.store.plan.width), 256, few))
        sums = [torch.zeros_like(chain.x) for chain in chains]
        for _ in range(self.repeats):
            for chain in chains:
                chain.x = chain.q.clone()
            for _ in range(self.depth):
                drawn = torch.randint(self._n, (self.batch_size,), generator=generator)
                products = [torch.zeros_like(chain.x) for chain in chains]
                for some in valid[drawn].split(few):
                    sample = self.store.at(some)[:, columns].double()
                    for chain, product in zip(chains, products, strict=True):
                        G = sample[:, within(chain.block, columns)]
                        product += (chain.x @ G.T) @ G
                for chain, product in zip(chains, products, strict=True):
                    chain.x += chain.change(product.div_(self.batch_size))
                    # |x| of the solution is at most scale / λ, and so is the mean square of the
                    # noise around it, up to a small factor, where the scale is stable.
                    bound = 10 * chain.scale / chain.λ if chain.λ else float("inf")
                    longest = float(chain.x.norm(dim=1).max())
                    if not longest < max(bound, 10):
                        self._diverged(chain)
            for total, chain in zip(sums, chains, strict=True):
                total += chain.x / self.repeats
        for total, chain in zip(sums, chains, strict=True):
            chain.x = total

    def _diverged(self, chain: _Chain) -> None:
        works = max(self._stable_scales(self.store))
        if self._given_scale is None:  # the estimate of σ_max was too low
            works = max(works, 2 * chain.scale)
        raise RuntimeError(
            f"LiSSA.solve: layer {chain.block.name!r} diverges at scale={chain.scale:.4g}; give "
            f"scale={works:.4g}, which is above every layer's largest eigenvalue, or leave it out"
        )


class _Chain:
    """The series of one layer, with every q made one long."""

    def __init__(self, block: LayerPlan, λ: float, scale: float, q: Tensor) -> None:
        self.block, self.λ, self.scale = block, λ, scale
        self.norms = torch.linalg.vector_norm(q, dim=1, keepdim=True)
        self.q = q / self.norms.where(self.norms > 0, 1)
        self.x = self.q.clone()
        self.residual = float("inf")  # of the longest query, as of the last change

    def change(self, product: Tensor) -> Tensor:
        """q - (F + λ) x / scale, from F x: the step to the next x, and the residual of this one."""
        change = self.q - (product + self.λ * self.x) / self.scale
        self.residual = float(torch.linalg.vector_norm(change, dim=1).max())
        return change
