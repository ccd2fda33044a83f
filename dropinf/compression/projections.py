"""Random linear maps R^P -> R^r of one layer's gradient: what dropout compression is compared with.

They read all of a gradient that was formed. A map's matrix depends on its sizes, seed and layer
alone, not on n, the positions given, the device, or whether it is kept. Over seeds,
E[project(g) . project(h)] = g . h.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers of a matrix, or of a temporary, that are made at a time. Other blocks, other matrices.
_BLOCK = 1 << 22
# A matrix of at most so many numbers is kept: 64 MiB of 32 bits each.
_KEEP = 1 << 24


class Projection(abc.ABC):
    """A linear map of a layer's flattened gradient [P] to [r], the same for every example.

    Raises:
        ValueError: an argument of the constructor is out of range.
    """

    # Top byte of the Philox key, one a kind of map. Its bit 7 keeps all of them apart from the
    # draw of coordinates, whose key is (seed, layer).
    _stream: int

    def __init__(self, P: int, r: int, seed: int, layer: int) -> None:
        given = {"P": (P, 1, 63), "r": (r, 1, 31), "seed": (seed, 0, 64), "layer": (layer, 0, 56)}
        for name, (value, low, bits) in given.items():
            if not low <= value < 2**bits:
                bound = f"in {low} .. 2^{bits} - 1"
                raise ValueError(f"{self.kind}: {name} must be {bound}, got {value}")
        self.P, self.r, self.seed, self.layer = map(int, (P, r, seed, layer))

    @property
    def kind(self) -> str:
        """Gaussian of a GaussianProjection: for errors, and for the fingerprints of plans."""
        return type(self).__name__.removesuffix("Projection")

    def __repr__(self) -> str:
        """Its arguments, which a plan's fingerprint holds."""
        public = {k: v for k, v in vars(self).items() if isinstance(v, int) and k[0] != "_"}
        return f"{self.kind}({', '.join(f'{k}={v}' for k, v in public.items())})"

    @torch.no_grad()
    def project(self, values: Tensor, at: Tensor | slice = slice(None)) -> Tensor:
        """The map of n gradients that are zero except at some positions.

        Linear: results of parts of the positions add up to that of all, to rounding.

        Args:
            values: [n, k] floating point, the gradients at the positions `at`.
            at: [k] int64 positions in 0 .. P - 1, rising, on values' device; or a slice of them.

        Returns:
            [n, r] on values' device: float64 if values are, float32 otherwise.

        Raises:
            ValueError: shapes, dtypes or devices disagree, or a position is out of range.
        """
        if values.dim() != 2 or not values.is_floating_point():
            got = f"{tuple(values.shape)} {values.dtype}"
            raise ValueError(f"project: values must be [n, k] floating point, got {got}")
        at = _checked(at, values, self.P)
        dtype = torch.promote_types(values.dtype, torch.float32)
        if values.numel() == 0:
            return values.new_zeros(len(values), self.r, dtype=dtype)
        return self._project(values, at, dtype).to(dtype)

    @abc.abstractmethod
    def _project(self, values: Tensor, at: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """As `project`; a slice has its bounds, and sums are made in `dtype` or a wider one."""

    def _philox(self, block: int) -> np.random.Philox:
        """The counter-based stream (Salmon et al. 2011) of one block of this map's numbers."""
        key = np.array([self.seed, self._stream << 56 | self.layer], dtype=np.uint64)
        return np.random.Philox(key=key, counter=np.array([0, 0, 0, block], dtype=np.uint64))

    def _signs(self, block: int, count: int) -> Tensor:
        """[count] int8 of +1 and -1, one for each random bit."""
        raw = self._philox(block).random_raw(-(-count // 64)).astype("<u8").view(np.uint8)
        bits = np.unpackbits(raw, count=count, bitorder="little")
        return torch.from_numpy(bits).view(torch.int8).mul_(2).sub_(1)

    def _normals(self, block: int, rows: int, columns: int) -> Tensor:
        """[rows, columns] float32, standard normal; another kind of CPU may round differently."""
        # torch's CPU generator reads only 32 bits of a seed, so hashes of the blocks would soon
        # repeat one; counting from a hash of the layer does not.
        first = int(self._philox(0).random_raw(1)[0]) >> 32
        generator = torch.Generator("cpu").manual_seed((first + block) % 2**32)
        out = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
        return out.normal_(generator=generator)


class _Blocked(Projection):
    """A map with some numbers for each coordinate, made a block of coordinates at a time.

    Its results are divided by the root of how many: r of a dense matrix, s of a sparse one.
    """

    def __init__(self, P: int, r: int, seed: int, layer: int, numbers: int) -> None:
        super().__init__(P, r, seed, layer)
        self._width = max(1, _BLOCK // numbers)  # coordinates of a block
        self._scale = numbers**-0.5
        self._keeps = P * numbers <= _KEEP
        self._kept: dict[int, Tensor] = {}

    @abc.abstractmethod
    def _made(self, block: int, rows: int) -> Tensor:
        """[rows, numbers] of the block's coordinates, on the CPU."""

    @abc.abstractmethod
    def _add(self, sums: Tensor, values: Tensor, part: Tensor, dtype: torch.dtype) -> None:
        """sums [n, r] += the map of values [n, c], whose coordinates have the numbers `part`."""

    def _project(self, values: Tensor, at: Tensor | slice, dtype: torch.dtype) -> Tensor:
        # float64: a large layer has thousands of blocks.
        sums = torch.zeros(len(values), self.r, dtype=torch.float64, device=values.device)
        for block, columns, inside in _touched(at, self._width):
            numbers = self._kept.get(block)
            if numbers is None:
                numbers = self._made(block, min(self._width, self.P - block * self._width))
            numbers = numbers.to(values.device)
            if self._keeps:
                self._kept[block] = numbers  # on the device of the last call
            self._add(sums, values[:, columns], numbers[inside], dtype)
        return sums.mul_(self._scale)


class _Dense(_Blocked):
    """project(g) = g M / sqrt(r), with a random M [P, r] of float32 numbers."""

    def __init__(self, P: int, r: int, seed: int, layer: int) -> None:
        super().__init__(P, r, seed, layer, numbers=r)

    def _add(self, sums: Tensor, values: Tensor, part: Tensor, dtype: torch.dtype) -> None:
        sums += values.to(dtype) @ part.to(dtype)


class GaussianProjection(_Dense):
    """Entries independent, N(0, 1 / r): O(n P r) time."""

    _stream = 0x81

    def _made(self, block: int, rows: int) -> Tensor:
        return self._normals(block, rows, self.r)


class RademacherProjection(_Dense):
    """Entries independent, +1 or -1 over sqrt(r) (Achlioptas 2003): O(n P r) time."""

    _stream = 0x82

    def _made(self, block: int, rows: int) -> Tensor:
        return self._signs(block, rows * self.r).view(rows, self.r).float()


class SJLTProjection(_Blocked):
    """Each coordinate goes to s of the r entries, with random signs over sqrt(s): O(n P s) time.

    One entry in each of s nearly equal parts of 0 .. r - 1: the block construction of Kane &
    Nelson (2014, figure 1c), after Dasgupta et al. (2010).
    """

    _stream = 0x83

    def __init__(self, P: int, r: int, seed: int, layer: int, s: int = 1) -> None:
        if not 1 <= s <= r:
            raise ValueError(f"SJLT: s must be in 1 .. r={r}, got {s}")
        super().__init__(P, r, seed, layer, numbers=s)
        self.s = s

    def _made(self, block: int, rows: int) -> Tensor:
        """[rows, s] int32: the entry counted from 1, with the sign."""
        raw = self._philox(block).random_raw(rows * self.s).reshape(rows, self.s)
        bounds = np.arange(self.s + 1, dtype=np.uint64) * np.uint64(self.r) // np.uint64(self.s)
        # 32 random bits times a part's size, over 2^32: uniform but for size / 2^32.
        entry = bounds[:-1] + ((raw >> np.uint64(32)) * np.diff(bounds) >> np.uint64(32))
        sign = 2 * (raw & np.uint64(1)).astype(np.int32) - 1
        return torch.from_numpy(sign * (entry.astype(np.int32) + 1))

    def _add(self, sums: Tensor, values: Tensor, part: Tensor, dtype: torch.dtype) -> None:
        n = len(values)
        rows = torch.arange(n, device=values.device)[:, None]
        step = max(1, _BLOCK // n)  # bounds the copy in float64
        for terms, numbers in zip(values.split(step, 1), part.split(step), strict=True):
            for signed in numbers.T:
                entry = (signed.abs() - 1).long()
                added = terms * signed.sign().double()
                if sums.device.type == "cpu":  # in the order of the coordinates
                    sums.scatter_add_(1, entry.expand(n, -1), added)
                else:  # sorts by entry first; scatter_add_ would add atomically, in any order
                    sums.index_put_((rows, entry), added, accumulate=True)


class FJLTProjection(Projection):
    """Random signs, a Walsh-Hadamard transform, r of its entries: O(n P log P) time.

    project(g) = (H (D g, padded to m))[i] / sqrt(r), with the Sylvester H [m, m] of +1 and -1, m
    the next power of two, and r entries i drawn without replacement (Ailon & Chazelle 2009, with
    the sampling of Tropp 2011).
    """

    _stream = 0x84

    def __init__(self, P: int, r: int, seed: int, layer: int) -> None:
        super().__init__(P, r, seed, layer)
        if r > P:
            raise ValueError(
                f"FJLT: r must be at most P={P}, got {r}: its entries are drawn without "
                "replacement; take r=P, or another projection"
            )
        self._m = 1 << (P - 1).bit_length()
        self._sign = self._signs(0, P)
        # The r smallest of m random words lie at r positions uniform without replacement.
        words = self._philox(1).random_raw(self._m)
        self._entries = torch.from_numpy(np.sort(np.argpartition(words, r - 1)[:r]))

    def _project(self, values: Tensor, at: Tensor | slice, dtype: torch.dtype) -> Tensor:
        self._sign, self._entries = (t.to(values.device) for t in (self._sign, self._entries))
        out = values.new_empty(len(values), self.r, dtype=dtype)
        step = max(1, _BLOCK // self._m)
        for part, entries in zip(values.split(step), out.split(step), strict=True):
            x = part.new_zeros(len(part), self._m, dtype=dtype)
            x[:, at] = part.to(dtype) * self._sign[at]
            for level in range(self._m.bit_length() - 1):
                a, b = x.view(len(x), -1, 2, 1 << level).unbind(2)
                difference = a - b
                a += b
                b.copy_(difference)
            entries.copy_(x[:, self._entries])
        return out.mul_(self.r**-0.5)


class Kron(Projection):
    """LoGra's two-sided projection (arXiv 2405.13954): project(G) = Aᵀ G B, flattened.

    G [O, I] is a weight's gradient, A [O, a] and B [I, b] have entries N(0, 1 / a) and N(0, 1 / b);
    P = O I and r = a b. O(n (P b + O a b)) time; A and B are kept.
    """

    _stream = 0x85

    def __init__(self, O: int, I: int, a: int, b: int, seed: int, layer: int) -> None:
        if min(O, I, a, b) < 1:
            raise ValueError(f"Kron: O, I, a and b must be from 1, got {(O, I, a, b)}")
        super().__init__(O * I, a * b, seed, layer)
        self.A = self._normals(0, O, a).mul_(a**-0.5)
        self.B = self._normals(1, I, b).mul_(b**-0.5)

    def _project(self, values: Tensor, at: Tensor | slice, dtype: torch.dtype) -> Tensor:
        self.A, self.B = (t.to(values.device) for t in (self.A, self.B))
        n, I = len(values), len(self.B)
        if isinstance(at, slice):  # the rows of G that it has a part of
            first, last = at.start // I, -(-at.stop // I)
            around = (at.start - first * I, last * I - at.stop)
            G = F.pad(values, around) if any(around) else values
            A = self.A[first:last].to(dtype)
        else:
            rows, row = torch.unique_consecutive(at // I, return_inverse=True)
            G = values.new_zeros(n, len(rows) * I)
            G[:, row * I + at % I] = values
            A = self.A[rows].to(dtype)
        GB = G.reshape(n, len(A), I).to(dtype) @ self.B.to(dtype)  # [n, rows, b]
        return (A.T @ GB).reshape(n, self.r)


def _checked(at: Tensor | slice, values: Tensor, P: int) -> Tensor | slice:
    """The positions of values' columns; a slice with its bounds."""
    k = values.shape[1]
    if isinstance(at, slice):
        start, stop, step = at.indices(P)
        if step != 1 or stop - start != k:
            raise ValueError(
                f"project: a slice must have step 1 and as many of the P={P} positions as values "
                f"has columns, {k}, got {at}; other positions can be an int64 tensor"
            )
        return slice(start, stop)
    if at.shape != (k,) or at.dtype != torch.int64 or at.device != values.device:
        got = f"{tuple(at.shape)} {at.dtype} on {at.device}"
        raise ValueError(f"project: at must be [k={k}] int64 on {values.device}, got {got}")
    if not ((at.diff() > 0).all() & (at >= 0).all() & (at < P).all()):
        raise ValueError(
            f"project: at must be rising positions in 0 .. {P - 1}; sort them, and add up the "
            "columns of one that repeats"
        )
    return at


def _touched(at: Tensor | slice, w: int) -> Iterator[tuple[int, slice, Tensor | slice]]:
    """Each block of w positions that has some of `at`: its number, their columns, their places."""
    if isinstance(at, slice):
        for block in range(at.start // w, -(-at.stop // w)):
            a, b = max(at.start, block * w), min(at.stop, (block + 1) * w)
            yield block, slice(a - at.start, b - at.start), slice(a - block * w, b - block * w)
        return
    blocks, counts = torch.unique_consecutive(at // w, return_counts=True)
    start = 0
    for block, count in zip(blocks.tolist(), counts.tolist(), strict=True):
        columns = slice(start, start + count)
        yield block, columns, at[columns] - block * w
        start += count
