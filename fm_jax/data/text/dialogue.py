"""Conversations as plain text, for pretraining: a list of messages becomes one document.

    [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi!"}]

gives "user: Hello.", an empty line, "assistant: Hi!". This is no chat template: a corpus is tokenised before
there is a model whose template could be used, and in pretraining text special tokens are spelt out.
"""

from typing import Any

from fm_jax.core.errors import DataError
from fm_jax.data import table

FIELD = "messages"


def text(messages: list[Any], field: str, where: str) -> str:
    """Return the messages in order, each after the name of its role, an empty line between them.

    The content of a message is text, or a list of parts of which each is text; a message without text (a tool call,
    say) is left out.

    Raises:
        DataError: not a list of messages, a part that is not text (an image, say), or no text at all.
    """
    turns = []
    for number, message in enumerate(messages):
        here = f"{where}: {field}[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f'{here} is no message; one is {{"role": "user", "content": "text"}}')
        if content := _content(message.get("content"), here).strip():
            turns.append(f"{table.text(message['role'], 'role', here)}: {content}")
    if not turns:
        raise DataError(f"{where}: field {field!r} has no message with text")
    return "\n\n".join(turns)


def _content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if not isinstance(content, list):
        return table.text(content, "content", where)
    for part in content:
        if not isinstance(part, dict) or "text" not in part:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DataError(f"{where}: a part of its content is {kind!r}, not text")
    return "".join(table.text(part["text"], "text", where) for part in content)
