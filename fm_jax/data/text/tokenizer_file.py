"""Tokenizer files of any tool, validated before use: tokenizer.json and the names of its special tokens.

The tokenizers library accepts invalid files (ids of four billion, one id for two tokens) and panics on some patterns;
here these become errors of one line that name the file.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fm_jax.core import files, json_file
from fm_jax.core.errors import DataError, shown
from fm_jax.data.text import chat

MOST = 256 << 20
"""Bytes of a tokenizer.json; the largest published ones have 35 MB."""

FIELDS = {
    "start": "bos_token",
    "end": "eos_token",
    "unknown": "unk_token",
    "pad": "pad_token",
    "cls": "cls_token",
    "sep": "sep_token",
    "mask": "mask_token",
}
"""Role of a special token -> its key in the files."""

# The published folders of GPT-2 and BERT do not name their special tokens. If the files do not, the first of these that
# is among the added tokens is used.
USUAL = {
    "start": ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<|endoftext|>"),
    "end": ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"),
    "unknown": ("<unk>", "[UNK]", "<|endoftext|>"),
    "pad": ("<|pad|>", "<pad>", "[PAD]"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "mask": ("[MASK]", "<mask>"),
}

NO_START = ("PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer", "Qwen2TokenizerFast")
"""Classes of transformers without a start token of their own: if the files name none, there is none."""


@contextmanager
def guard(where: str) -> Iterator[None]:
    """Turn anything the library raises into a DataError; its panics do not derive from `Exception`.

    Raises:
        DataError: `where` and the library's message.
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

    A special token that tokenizer_config.json states as null is none, whatever the other files suggest.

    Returns:
        The library's tokenizer, {role: token} of its special tokens, and the content of tokenizer_config.json with the
        chat templates of the files beside it (`chat.stated`).

    Raises:
        DataError: a missing, damaged or invalid file.
    """
    import tokenizers

    content = json_file.read(file, DataError, most=MOST)
    _check_ids(content, file)
    with guard(f"{file} is not a tokenizer"):
        inner = tokenizers.Tokenizer.from_file(str(file))
    config: dict[str, Any] = {}
    names = _usual(content)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the latter wins
        if files.there(beside := file.parent / name, DataError):
            config = json_file.read(beside, DataError)
            names |= {role: _text(config[key]) for role, key in FIELDS.items() if key in config}
    if config.get("tokenizer_class") in NO_START and FIELDS["start"] not in config:
        names.pop("start", None)
    names = {role: token for role, token in names.items() if token}
    if (template := chat.stated(file.parent, config)) is not None:
        config["chat_template"] = template
    return inner, names, config


def _check_ids(content: Mapping[str, Any], file: Path) -> None:
    """Refuse an id that two tokens share, and an id that is not below the number of tokens."""
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    added = content.get("added_tokens") or []
    try:
        pairs = vocab.items() if isinstance(vocab, dict) else [(row[0], i) for i, row in enumerate(vocab or [])]
        owner: dict[str, int] = {str(token): index for token, index in pairs}
        extra = [(str(token["content"]), token["id"]) for token in added]
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise DataError(f"{file} is not a tokenizer: cannot read its vocabulary ({error!r})") from error
    for token, index in extra:
        if owner.setdefault(token, index) != index:
            raise DataError(f"{file} gives {shown(token)} two ids, {shown(owner[token])} and {shown(index)}")
    tokens: dict[int, str] = {}
    for token, index in owner.items():
        if type(index) is not int or not 0 <= index < len(owner):
            count = len(owner)
            raise DataError(
                f"{file} gives {shown(token)} the id {shown(index)}, outside 0 … {count - 1} (it has {count} tokens)"
            )
        if tokens.setdefault(index, token) != token:
            raise DataError(f"{file} gives id {index} to both {shown(tokens[index])} and {shown(token)}")


def _usual(content: Mapping[str, Any]) -> dict[str, str]:
    """Return {role: token} of the special tokens that tokenizer.json itself reveals."""
    added = {token["content"] for token in content.get("added_tokens") or []}
    names = {role: token for role, known in USUAL.items() for token in reversed(known) if token in added}
    ends = content.get("post_processor") or {}
    for role in ("cls", "sep"):  # RoBERTa's <s> and </s> are in its post-processor
        if isinstance(ends, dict) and isinstance(ends.get(role), list) and ends[role]:
            names[role] = str(ends[role][0])
    return names


def _text(value: Any) -> str:
    """Return a special token's text; some tools store an object with "content"."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")
