"""Byte-level byte-pair encoding (Sennrich et al. 2016, over bytes as in Radford et al. 2019), in files others open.

A folder with `tokenizer.json` (all of the tokenizer) and `tokenizer_config.json` (the names of its special tokens),
as `transformers` and llama.cpp's converters read them. Any text round-trips: the 256 bytes are always in the alphabet.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax.core.errors import ConfigError, DataError

END = "<|endoftext|>"
PAD = "<|pad|>"


class Tokenizer:
    """Text to token ids and back; made by `train` or `load`."""

    def __init__(self, inner: Any, end: str = END, pad: str = PAD) -> None:
        self._inner, self._end, self._pad = inner, end, pad
        # Text is never read as a special token: a document that spells <|endoftext|> does not end there.
        inner.encode_special_tokens = True
        inner.no_padding()
        inner.no_truncation()
        self.vocab_size: int = inner.get_vocab_size(with_added_tokens=True)
        found = inner.token_to_id(end)
        if found is None:
            raise DataError(f"the tokenizer has no token {end!r}; name its end-of-text token in tokenizer_config.json")
        self.end_id: int = found
        self.pad_id: int = self.end_id if (found := inner.token_to_id(pad)) is None else found
        self.fingerprint = hashlib.sha256(inner.to_str().encode()).hexdigest()[:16]

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids of a text, without special tokens: int32 [T]."""
        return np.array(self._inner.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of many texts, over all cores."""
        found = self._inner.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(item.ids, np.int32) for item in found]

    def decode(self, ids: Sequence[int] | np.ndarray, *, keep_special: bool = False) -> str:
        """Return the text of token ids; bytes that are no UTF-8 become U+FFFD.

        Raises:
            DataError: an id outside the vocabulary.
        """
        ids = np.asarray(ids)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise DataError(f"token id {wrong} is outside the vocabulary of {self.vocab_size}")
        return self._inner.decode(ids.tolist(), skip_special_tokens=not keep_special)

    def token(self, index: int) -> str:
        """Return how a token is written in the vocabulary (bytes as printable characters, a space as Ġ)."""
        return self._inner.id_to_token(index)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._end,
            "eos_token": self._end,
            "unk_token": self._end,
            "pad_token": self._pad if self.pad_id != self.end_id else self._end,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
        }
        _write(folder / "tokenizer_config.json", json.dumps(config, indent=1))
        _write(folder / "tokenizer.json", self._inner.to_str(pretty=True))


def train(texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2) -> Tokenizer:
    """Learn merges from texts until the vocabulary is full; the same texts give the same tokenizer.

    Args:
        texts: read once, in any order.
        vocab_size: tokens in all, the 256 bytes and the two special tokens among them.
        min_frequency: a pair that is rarer is not merged.

    Raises:
        ConfigError: a vocabulary without room for the bytes.
        DataError: no text, or too little for so many tokens.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 2:
        raise ConfigError(f"vocab_size {vocab_size} is below the {len(alphabet) + 2} of bytes and special tokens")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END, PAD],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    if (reached := inner.get_vocab_size()) < vocab_size:
        raise DataError(f"the text has pairs for {reached} tokens, not {vocab_size}; lower vocab_size or add text")
    return Tokenizer(inner)


def load(folder: Path) -> Tokenizer:
    """Read a tokenizer.json, ours or another tool's, and the names in the tokenizer_config.json beside it.

    Raises:
        DataError: missing or damaged files.
    """
    import tokenizers

    file = folder / "tokenizer.json" if folder.is_dir() else folder
    if not file.is_file():
        raise DataError(f"{file} does not exist")
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{file} is not a tokenizer: {error}") from error
    names: dict[str, Any] = {}
    beside = file.parent / "tokenizer_config.json"
    if beside.is_file():
        try:
            names = json.loads(beside.read_text("utf-8"))
        except ValueError as error:
            raise DataError(f"{beside} is not JSON: {error}") from error
    end = _name(names.get("eos_token")) or END
    return Tokenizer(inner, end, _name(names.get("pad_token")) or PAD)


def bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Return the mean number of UTF-8 bytes a token stands for."""
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
    return sum(len(text.encode()) for text in texts) / max(tokens, 1)


def _name(value: Any) -> str:
    """Return a special token's text, which some tools write as an object."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")  # process ids repeat across machines
    partial.write_text(text, "utf-8")
    os.replace(partial, path)
