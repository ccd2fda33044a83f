"""Chats as texts: the template of a tokenizer, and where the assistant speaks."""

from __future__ import annotations

from typing import Any

from dropinf.jobs.data_files import DataFile

Spans = list[tuple[int, int]]


def rendered(tokenizer: Any, data: DataFile, column: str) -> tuple[list[str], list[Spans]]:
    """The text of each chat, and the spans of it that the assistant says.

    What the assistant says is what its message adds to the messages before it, behind what asks
    for an answer.

    Raises:
        ValueError: there is no template, a chat is none, or the template changes what stands
            before a message when it follows.
    """
    chats = data.column(column, "messages", list, "a list of messages")
    if not tokenizer.chat_template:
        raise ValueError(
            f"{data.path} has chats, and the tokenizer has no chat template; give prompt and "
            "completion in columns"
        )
    texts, spans = [], []
    for position, chat in enumerate(chats):
        _refuse_other(chat, data, position)
        try:
            text, said = _render(tokenizer, chat)
        except Exception as error:  # whatever a template raises
            raise ValueError(
                f"{data.where(position)}: the chat template fails: {' '.join(str(error).split())}"
            ) from error
        if said is None:
            raise ValueError(
                f"{data.where(position)}: the chat template changes messages when others follow, "
                "so that it is not known what the assistant says; give prompt and completion in "
                "columns"
            )
        texts.append(text)
        spans.append(said)
    return texts, spans


def _refuse_other(chat: list[Any], data: DataFile, position: int) -> None:
    for message in chat:
        keys = ("role", "content")
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in keys):
            raise ValueError(
                f"{data.where(position)}: a message must have a role and a content, both texts"
            )


def _render(tokenizer: Any, chat: list[dict[str, str]]) -> tuple[str, Spans | None]:
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    spans = []
    for i, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(chat[:i], tokenize=False, add_generation_prompt=True)
        behind = tokenizer.apply_chat_template(chat[: i + 1], tokenize=False)
        if not (behind.startswith(before) and whole.startswith(behind)):
            return whole, None
        spans.append((len(before), len(behind)))
    return whole, spans
