"""Texts, images and values as a page holds them."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dropinf.extras import optional
from dropinf.results import Contents, Lookup

_WHOLE_BYTES = 16 << 20  # of texts and images that are held whole; a browser opens that at once
_EXCERPT = 200  # characters of what comes later


class PageContents:
    """What the page shows of examples, each once.

    Attributes:
        found: by number. The first are held whole until they take 16 MB, later ones as excerpts.
    """

    def __init__(
        self, texts: Contents | None, images: Contents | None, name: str, images_name: str
    ) -> None:
        self._texts, self._images = Lookup(texts, name), Lookup(images, images_name)
        self._numbers: dict[Any, int] = {}
        self.found: list[dict[str, Any] | None] = []
        self._room = _WHOLE_BYTES

    def number(self, id_: Any) -> int:
        """Of the content of this example."""
        if id_ not in self._numbers:
            self._numbers[id_] = len(self.found)
            self.found.append(self.of(id_))
        return self._numbers[id_]

    def of(self, id_: Any) -> dict[str, Any] | None:
        """Its content, None if there is none."""
        content: dict[str, Any] = {}
        text = self._texts(id_)
        if isinstance(text, Mapping):
            content["values"] = [[str(name), _value(value)] for name, value in text.items()]
        elif text is not None:
            content["text"] = str(text)
            if len(content["text"]) > max(_EXCERPT, self._room):
                content |= {"text": content["text"][:_EXCERPT], "cut": True}
            self._room -= len(content["text"])
        image = self._images(id_)
        if image is not None and self._room > 0:
            content["image"] = data_uri(image)
            self._room -= len(content["image"])
        return content or None


def _value(value: Any) -> str:
    number = value.item() if hasattr(value, "item") else value
    return f"{number:.6g}" if isinstance(number, float) else str(number)


def data_uri(image: Any) -> str:
    """A PNG of an image, for the src of an element.

    Raises:
        ValueError: it is no image.
    """
    if isinstance(image, bytes):
        if not image.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError("write_report: an image in bytes must be a PNG; give an array instead")
        png = image
    else:
        pictures = optional("PIL.Image", "report", "write_report(images=)")
        file = io.BytesIO()
        pictures.fromarray(_pixels(image)).save(file, format="PNG")
        png = file.getvalue()
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _pixels(image: Any) -> np.ndarray:
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or not array.size:
        raise ValueError(
            f"write_report: an image must be [H, W] or [H, W, 3], got {list(array.shape)}"
        )
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    array = array.astype(np.float64)
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
        raise ValueError(
            "write_report: an image of floats must be from 0 to 1; divide by its largest number"
        )
    return np.ascontiguousarray((array * 255).round().astype(np.uint8))


def plain(id_: Any) -> int | str | None:
    """An id as JSON has it; integers that JavaScript would round are text."""
    if id_ is None or isinstance(id_, str):
        return id_
    number = int(id_)
    return number if abs(number) < 1 << 53 else str(number)


def list_of(values: Tensor | Sequence[Any]) -> list[Any]:
    """Numbers for JSON, None for what is not finite; or ids as they are."""
    found = values.tolist() if hasattr(values, "tolist") else list(values)
    return [None if isinstance(v, float) and not math.isfinite(v) else v for v in found]
