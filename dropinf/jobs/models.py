"""Models of a Hugging Face directory, LoRA adapters included; nothing comes from a network."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


@dataclass
class Loaded:
    """A model of a directory.

    Attributes:
        model: in eval mode, on its device; with an adapter, PEFT's.
        kind: what it does: "causal_lm", "seq2seq", "masked_lm", "classification",
            "token_classification", "image_classification".
        directory: of the model, not of its adapter.
        config: of the model.
        num_embeddings: tokens it has an embedding of; 0 of images.
        loss_fn: its own loss; None if it is not known.
    """

    model: nn.Module
    kind: str
    directory: Path
    config: Any
    num_embeddings: int
    loss_fn: Callable | None

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return next(self.model.parameters()).device


def load_model(path: str, adapter: str | None, dtype: str, device: str) -> Loaded:
    """The model of a directory, with an adapter if one is named or the directory is one.

    Raises:
        FileNotFoundError: a directory is not there.
        ValueError: it holds something else, or transformers or PEFT is missing.
    """
    directory = _directory("model", path, _CONFIG, _ADAPTER)
    if (directory / _ADAPTER).exists() and not (directory / _CONFIG).exists():
        if adapter is not None:
            raise ValueError(
                f"{directory} is an adapter itself ([model] path); name the model that "
                f"{adapter} belongs to"
            )
        adapter, directory = str(directory), _base_of(directory)
    _need("transformers", "transformers", directory)
    if adapter is not None:
        _directory("adapter", adapter, _ADAPTER)
        _need("peft", "peft", adapter)
    where = _device(device)
    from dropinf.integrations.transformers import loss_fn_for

    config, kind, auto = _config_of(directory)
    with _silent():
        model = _weights_of(directory, auto, config, dtype)
    loss_fn = None
    with contextlib.suppress(ValueError):  # a loss may be named
        loss_fn = loss_fn_for(model)
    embedding = None if kind == "image_classification" else model.get_input_embeddings()
    if hasattr(config, "use_cache"):
        model.config.use_cache = False  # for generation, and takes memory
    found: nn.Module = model
    if adapter is not None:
        with _silent():
            found = _with_adapter(model, Path(adapter), directory)
    found = found.to(where).eval()
    rows = 0 if embedding is None else embedding.weight.shape[0]
    return Loaded(found, kind, directory, model.config, rows, loss_fn)


def meta_model(path: str, adapter: str | None, dtype: str) -> Loaded:
    """The model of a directory on the meta device, of its config alone: weights may be missing.

    Raises:
        FileNotFoundError, ValueError: as of `load_model`.
    """
    directory = _directory("model", path, _CONFIG)
    _need("transformers", "transformers", directory)
    from dropinf.integrations.transformers import loss_fn_for

    config, kind, auto = _config_of(directory)
    wanted = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    with _silent(), torch.device("meta"):
        model: nn.Module = auto.from_config(config, dtype=wanted or torch.float32)
        config.use_cache = False
        loss_fn = loss_fn_for(model)
        if adapter is not None:
            _need("peft", "peft", adapter)
            _directory("adapter", adapter, _ADAPTER)
            import peft

            about = peft.PeftConfig.from_pretrained(adapter, local_files_only=True)
            about.inference_mode = False
            model = peft.get_peft_model(model, about)
    rows = 0 if kind == "image_classification" else config.vocab_size
    return Loaded(model.eval(), kind, directory, config, rows, loss_fn)


def _directory(what: str, path: str, *files: str) -> Path:
    """A directory that has one of the files."""
    directory = Path(path)
    if not directory.exists():
        raise FileNotFoundError(
            f"there is no {what} directory {path}; models are not fetched from a hub, so download "
            "it first"
        )
    if not directory.is_dir():
        raise ValueError(f"{path} is not a {what} directory but a file")
    if not any((directory / file).exists() for file in files):
        raise ValueError(f"{path} is no {what} directory: it has no {' or '.join(files)}")
    return directory


def _base_of(adapter: Path) -> Path:
    """The directory of the model that an adapter was trained on."""
    try:
        base = json.loads((adapter / _ADAPTER).read_text(encoding="utf-8"))[
            "base_model_name_or_path"
        ]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{adapter / _ADAPTER} cannot be read ({type(error).__name__})") from None
    if not base or not (Path(base) / _CONFIG).exists():
        raise FileNotFoundError(
            f"{adapter} is an adapter of {base!r}, which is no directory here; name that of its "
            "model as [model] path and this one as [model] adapter"
        )
    return Path(base)


def _need(package: str, extra: str, what: object) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{what} needs {package}; pip install 'dropinf[{extra}]'")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from None
    return device


def _config_of(directory: Path) -> tuple[Any, str, Any]:
    """Config, kind and Auto class of a model, by the class that its config names."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    try:
        config = transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{directory / _CONFIG} cannot be used: {_said(error)}") from None
    names = config.architectures or ["no class"]
    # In this order, since some encoder-decoders stand among the masked models too.
    for table, kind, cls in (
        (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "seq2seq", "AutoModelForSeq2SeqLM"),
        (
            auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            "classification",
            "AutoModelForSequenceClassification",
        ),
        (
            auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
            "image_classification",
            "AutoModelForImageClassification",
        ),
        (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "causal_lm", "AutoModelForCausalLM"),
        (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "masked_lm", "AutoModelForMaskedLM"),
        (
            auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
            "token_classification",
            "AutoModelForTokenClassification",
        ),
    ):
        if names[0] in table.values():
            return config, kind, getattr(transformers, cls)
    raise ValueError(
        f"{directory / _CONFIG} names {names[0]}, which is no language model, classifier or image "
        "classifier of transformers; give model, data and loss by a function ([model] entry)"
    )


def _weights_of(directory: Path, auto: Any, config: Any, dtype: str) -> Any:
    if not list(directory.glob("*.safetensors")):
        raise ValueError(
            f"{directory} has no weights in safetensors; save the model with "
            "save_pretrained(directory)"
        )
    try:
        model, info = auto.from_pretrained(
            directory,
            config=config,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # of safetensors and accelerate too, which have their own
        if type(error).__name__ == "SafetensorError":
            raise ValueError(
                f"the weights in {directory} are damaged: {_said(error)}; download or save them "
                "again"
            ) from error
        raise ValueError(f"the weights in {directory} cannot be loaded: {_said(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"the weights in {directory} lack {len(missing)} of {type(model).__name__}, such as "
            f"{missing[0]!r}, which would be random"
        )
    return model


def _with_adapter(model: Any, adapter: Path, directory: Path) -> nn.Module:
    import peft

    if not (adapter / _WEIGHTS).exists():
        raise ValueError(f"the adapter {adapter} has no {_WEIGHTS}")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = peft.PeftModel.from_pretrained(
                model, str(adapter), is_trainable=True, local_files_only=True
            )
        except Exception as error:
            raise ValueError(
                f"the adapter {adapter} does not fit the model in {directory}: {_said(error)}"
            ) from error
    for one in said:
        if "missing adapter keys" in str(one.message):
            raise ValueError(
                f"the adapter {adapter} does not fit the model in {directory}: {_said(one.message)}"
            )
    if not any(p.requires_grad for p in found.parameters()):
        raise ValueError(f"the adapter {adapter} has no parameter that is trained")
    return found


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' progress bars and reports, which errors here say in a sentence."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _said(error: object) -> str:
    """The first sentence of a foreign error."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    said = " ".join(lines[:2]) if lines else type(error).__name__
    return said if len(said) <= 300 else f"{said[:297]}..."
