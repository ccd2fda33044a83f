"""Texts -> tokens: the tokenizer of a model directory, and what it makes of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dropinf.jobs.data_files import DataFile

_FILES = ("tokenizer*", "vocab.*", "spiece.model", "sentencepiece*.model")
_AT_ONCE = 1000
_BROKEN = chr(0xFFFD)  # what a part of a character is decoded to
_CONTEXT = 8  # tokens before one, beside which a decoder writes it with its space


class Tokens:
    """The tokenizer of a model directory.

    Attributes:
        tokenizer: of transformers, a fast one.
        most: tokens of an example; None if there is no bound.
        pad: what batches are padded with; the attention mask covers it.
    """

    def __init__(
        self, directory: Path, config: Any, num_embeddings: int, max_tokens: int | None
    ) -> None:
        """Raises:
        ValueError: there is no tokenizer, or `max_tokens` is more than the model takes.
        """
        self._directory, self._num_embeddings = directory, num_embeddings
        self.tokenizer = _load(directory)
        self.most = _most(self.tokenizer, config, max_tokens)
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        self.pad = next((i for i in ids if i is not None and i < num_embeddings), 0)

    def of(
        self, data: DataFile, texts: Sequence[Any], room: int = 0, **options: Any
    ) -> Iterator[tuple[int, Any, bool]]:
        """(position, encoding, whether it was cut) of each text.

        Args:
            data: whose they are, for errors.
            texts: strings, or lists of words with is_split_into_words=True.
            room: tokens to leave free of `most`.
            options: of the tokenizer.

        Raises:
            ValueError: a token has no embedding.
        """
        if self.most is not None:
            options |= {"truncation": True, "max_length": max(self.most - room, 1)}
        for start in range(0, len(texts), _AT_ONCE):
            encoded = self.tokenizer(list(texts[start : start + _AT_ONCE]), **options)
            for position, encoding in enumerate(encoded.encodings, start):
                self._refuse_unknown(encoding, data, position)
                yield position, encoding, bool(encoding.overflowing)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token, with its spaces: put together they are the whole text.

        Of tokens that are bytes of one character, the last has it.
        """
        found: list[str] = []
        bounds = [0]  # between characters, where decoding may begin
        for end in range(1, len(ids) + 1):
            start = bounds[-_CONTEXT:][0]
            text = self._decoded(ids[start:end])
            if text.endswith(_BROKEN) and end < len(ids):
                found.append("")
                continue
            found.append(text[len(self._decoded(ids[start : bounds[-1]])) :])
            bounds.append(end)
        return found

    def _decoded(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _refuse_unknown(self, encoding: Any, data: DataFile, position: int) -> None:
        largest = max(encoding.ids, default=0)
        if largest >= self._num_embeddings:
            piece = self.tokenizer.convert_ids_to_tokens(largest)
            raise ValueError(
                f"{data.where(position)}: token {largest} ({piece!r}) has no embedding in the "
                f"model, which has {self._num_embeddings}; the tokenizer in {self._directory} is "
                "another model's, or the embeddings were not resized for it"
            )


def _load(directory: Path) -> Any:
    import transformers

    if not any(any(directory.glob(pattern)) for pattern in _FILES):
        # transformers makes an empty one of the config
        raise ValueError(
            f"{directory} has no tokenizer (tokenizer.json); save the model's own there with "
            "tokenizer.save_pretrained"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the tokenizer in {directory} cannot be loaded: {reason}") from error
    if not tokenizer.is_fast or not len(tokenizer):
        kind = "is empty" if tokenizer.is_fast else "is a slow one"
        raise ValueError(
            f"the tokenizer in {directory} {kind}; a fast one with a tokenizer.json is needed"
        )
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def _most(tokenizer: Any, config: Any, max_tokens: int | None) -> int | None:
    positions = getattr(config, "max_position_embeddings", None)
    if max_tokens is not None:
        if positions is not None and max_tokens > positions:
            raise ValueError(
                f"[data] max_tokens is {max_tokens}, more than the {positions} that the model takes"
            )
        return max_tokens
    told = [positions, tokenizer.model_max_length]
    bounds = [n for n in told if isinstance(n, int) and 0 < n < 1 << 30]
    return min(bounds, default=None)
