"""Tokenizer files of any tool, checked before they are used: tokenizer.json and the names of its special tokens.

The library behind reads what is not sound (ids of four thousand million, one id for two tokens) and panics on some
patterns; here that is one line that names the file.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fm_jax.core.errors import DataError

FIELDS = {
    "start": "bos_token",
    "end": "eos_token",
    "unknown": "unk_token",
    "pad": "pad_token",
    "cls": "cls_token",
    "sep": "sep_token",
    "mask": "mask_token",
}
"""What a special token does -> what the files call it."""

# The published folders of GPT-2 and BERT name no special token: their classes know. These are looked for, in order,
# among the added tokens, and only where the files are silent.
USUAL = {
    "start": ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>"),
    "end": ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"),
    "unknown": ("<unk>", "[UNK]", "<|endoftext|>"),
    "pad": ("<|pad|>", "<pad>", "[PAD]"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "mask": ("[MASK]", "<mask>"),
}


@contextmanager
def guard(where: str) -> Iterator[None]:
    """Turn whatever the library raises into a DataError; its panics are no `Exception`.

    Raises:
        DataError: with `where` and the library's words.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, DataError):
        raise
    except BaseException as error:
        text = str(error).strip() or type(error).__name__
        raise DataError(f"{where}: {text.splitlines()[0][:200]}") from error


def read(file: Path) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """Read a tokenizer.json and the files beside it.

    Returns:
        The library's tokenizer, {role: token} of the special tokens it has, and tokenizer_config.json as it is.

    Raises:
        DataError: a file that is missing, damaged or not sound.
    """
    import tokenizers

    if not file.is_file():
        raise DataError(f"{file} does not exist")
    content = _object(file)
    _check_ids(content, file)
    with guard(f"{file} is not a tokenizer"):
        inner = tokenizers.Tokenizer.from_file(str(file))
    config: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the latter counts where both speak
        if (beside := file.parent / name).is_file():
            config = _object(beside)
            names |= {role: token for role, key in FIELDS.items() if (token := _text(config.get(key)))}
    return inner, _usual(content) | names, config


def _object(file: Path) -> dict[str, Any]:
    """Parse a JSON object; a key that stands twice in it is refused, for one of the two would be lost."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise DataError(f"{file} has {twice!r} twice")
        return found

    try:
        found = json.loads(file.read_text("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} holds a {type(found).__name__}, not an object")
    return found


def _check_ids(content: Mapping[str, Any], file: Path) -> None:
    """Refuse ids that two tokens share, and ids that are not below the number of tokens."""
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    added = content.get("added_tokens") or []
    try:
        pairs = vocab.items() if isinstance(vocab, dict) else [(row[0], i) for i, row in enumerate(vocab or [])]
        owner: dict[str, int] = {str(token): index for token, index in pairs}
        extra = [(str(one["content"]), one["id"]) for one in added]
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise DataError(f"{file} is not a tokenizer: its vocabulary cannot be read ({error!r})") from error
    for token, index in extra:
        if owner.setdefault(token, index) != index:
            raise DataError(f"{file} gives {token!r} the ids {owner[token]} and {index}")
    tokens: dict[int, str] = {}
    for token, index in owner.items():
        if type(index) is not int or not 0 <= index < len(owner):
            raise DataError(f"{file} gives {token!r} the id {index}, outside 0 … {len(owner) - 1} of its tokens")
        if tokens.setdefault(index, token) != token:
            raise DataError(f"{file} gives id {index} to both {tokens[index]!r} and {token!r}")


def _usual(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens that a tokenizer.json shows by itself."""
    added = {one["content"] for one in content.get("added_tokens") or []}
    names = {role: token for role, known in USUAL.items() for token in reversed(known) if token in added}
    ends = content.get("post_processor") or {}
    for role in ("cls", "sep"):  # RoBERTa's <s> and </s> are found in what frames its texts
        if isinstance(ends, dict) and isinstance(ends.get(role), list) and ends[role]:
            names[role] = str(ends[role][0])
    return names


def _text(value: Any) -> str:
    """Return a special token's text, which some tools write as an object."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")
