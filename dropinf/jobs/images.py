"""Examples of images: files, through the image processor of a model directory."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dropinf.jobs.columns import classes_of
from dropinf.jobs.data_files import DataFile

BATCH = 32  # images, where no batch size is given
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")


class Images:
    """Images and their classes.

    Attributes:
        files: names of the files, by position.
    """

    def __init__(
        self, directory: Path, data: DataFile, columns: dict[str, str], config: Any
    ) -> None:
        """Raises:
        FileNotFoundError: an image is not there.
        ValueError: there is no processor, or a label is unknown.
        """
        self._processor = _load(directory)
        names = data.column(columns["image"], "image", str, "the name of an image file")
        self.files = [str(data.path.parent / name) for name in names]
        for position, file in enumerate(self.files):
            if not Path(file).is_file():
                raise FileNotFoundError(f"{data.where(position)}: there is no image {file}")
        self._labels = classes_of(data, columns["label"], config)

    def item(self, position: int) -> tuple[Tensor, int]:
        """Pixels and class of an image."""
        from PIL import Image

        try:
            with Image.open(self.files[position]) as image:
                pixels = self._processor(images=image.convert("RGB"), return_tensors="pt")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.files[position]} cannot be read as an image: {' '.join(str(error).split())}"
            ) from None
        return pixels["pixel_values"][0], self._labels[position]


def stacked(items: Sequence[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """Tensors of a batch."""
    return {
        "pixel_values": torch.stack([pixels for pixels, _ in items]),
        "labels": torch.tensor([label for _, label in items]),
    }


def _load(directory: Path) -> Any:
    if importlib.util.find_spec("PIL") is None:
        raise ValueError("images need Pillow; pip install pillow")
    import transformers

    if not any((directory / name).exists() for name in _PROCESSOR):
        raise ValueError(
            f"{directory} has no image processor ({_PROCESSOR[0]}); save the model's own there "
            "with save_pretrained"
        )
    try:
        return transformers.AutoImageProcessor.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the image processor in {directory} cannot be loaded: {reason}"
        ) from error
