"""A fingerprint of the weights that rows were made with."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection

from torch import Tensor, nn

from dropinf.compression import Plan, unwrap
from dropinf.rows.part_files import bytes_of

_STEP = 1 << 20  # bytes under one CRC-32


class Weights:
    """Digests of the tracked parameters of a plan, and of the buffers that are saved with a model.

    A digest is a SHA-256 over a CRC-32 of each MiB, at the speed of the CRC; what was trained
    differs in all of them.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._model = unwrap("collect", model)
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        self._parameters = {
            _plain(slot.name): digest_of(parameters[slot.name])
            for slot in plan.slots
            if slot.name in parameters
        }
        self._buffers = self._buffers_now()

    def passing(self) -> list[str]:
        """Names of the buffers that are not what they were: those that each pass changes."""
        now = self._buffers_now()
        names = self._buffers.keys() | now.keys()
        return sorted(name for name in names if self._buffers.get(name) != now.get(name))

    def fingerprint(self, without: Collection[str]) -> str:
        """16 hexadecimal digits of the names and bytes, those of some buffers left out."""
        digest = hashlib.sha256()
        kept = {name: d for name, d in self._buffers.items() if name not in set(without)}
        for name, own in sorted(self._parameters.items()) + sorted(kept.items()):
            digest.update(f"{len(name)} {name} ".encode() + own)
        return digest.hexdigest()[:16]

    def _buffers_now(self) -> dict[str, bytes]:
        return {
            _plain(f"{prefix}.{name}" if prefix else name): digest_of(buffer)
            for prefix, module in self._model.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        }


def _plain(name: str) -> str:
    """Without what torch.compile puts before the names inside of a compiled module."""
    return name.replace("_orig_mod.", "")


def digest_of(tensor: Tensor) -> bytes:
    """Of dtype, shape and bytes."""
    tensor = tensor.detach()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if tensor.is_meta:
        return digest.digest()
    whole = getattr(tensor, "full_tensor", None)  # of one that fully_shard has shared out
    flat = (tensor if whole is None else whole()).reshape(-1)
    step = max(1, _STEP // flat.element_size())
    for part in flat.split(64 * step):
        part = bytes_of(part.cpu())
        for start in range(0, len(part), _STEP):
            digest.update(b"%d," % zlib.crc32(part[start : start + _STEP]))
    return digest.digest()
