"""Build the tokenizer that a GGUF file's metadata describe: byte-level BPE, or BPE of SentencePiece.

The file has the vocabulary, the merges or scores, and the kind of every token, but of the splitting of text only a
name. A name is read only if what the model's own tokenizer.json does under it is known; any other is refused, for wrong
splits give other tokens without an error.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.data.text import tokenizer_file
from fm_jax.data.text.tokenizer import Tokenizer

_GGML = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4  # kinds of tokens; 5 unused, 6 a byte
_ROLES = {"start": "bos", "end": "eos", "unknown": "unknown", "pad": "padding"}
_USUAL = {"bos": 1, "eos": 2, "unknown": 0}  # of SentencePiece, where the file does not say

_LONGEST, _LETTERS = 512, 16_000_000  # characters of a piece, and of all; SentencePiece's own limit is 16 for a piece

# How text is split before its bytes are merged; (?i:…) folds case. GPT-2's own expression is built into the library.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = rf"{_SHORT}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_SHORT}|{_WORDS}|\p{{N}}|{_REST}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "tekken": _TEKKEN, "qwen2": _QWEN2}
_KNOWN = ("gpt-2", "smollm", *_SPLITS)
_WHOLE_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")  # a word in the vocabulary is one token; bos by default


def special_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids of the special tokens as a config.json has them; the end of a turn is an end too."""
    given = {name: metadata.get(f"{_GGML}{name}_token_id") for name in ("bos", "eos", "eot", "padding")}
    ids = {name: index for name, index in given.items() if type(index) is int and index >= 0}
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot") if name in ids))
    named = {"bos_token_id": ids.get("bos"), "pad_token_id": ids.get("padding")}
    return {name: index for name, index in named.items() if index is not None} | (
        {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    )


def read(metadata: Mapping[str, Any], where: str, architecture: str) -> Tokenizer | None:
    """Return the tokenizer of a file; None if it has none.

    Args:
        metadata: the file's metadata.
        where: name of the file, for messages.
        architecture: its general.architecture; GPT-2's oldest files do not name their splitting.

    Raises:
        DataError: the metadata are incomplete or contradict themselves, or the tokenizer is of a kind that is not
            known.
    """
    vocabulary = _Vocabulary(metadata, where)
    kind = vocabulary.take("model", str, "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise vocabulary.bad(f"tokenizer.ggml.model {kind[:40]!r} is not supported, only gpt2 and llama are; {_REMEDY}")
    pieces = kind == "llama"
    with tokenizer_file.guard(f"{where}: its tokenizer cannot be built"):
        inner, first = _pieces(vocabulary) if pieces else _bytes(vocabulary, architecture)
        names = _names(vocabulary, _USUAL if pieces else {})
        usual = {"start": first and "start" in names, "end": False}
        framed = {role: vocabulary.take(f"add_{_ROLES[role]}_token", bool, usual[role]) for role in usual}
        if absent := [_ROLES[role] for role, added in framed.items() if added and role not in names]:
            raise vocabulary.bad(f"{_GGML}add_{absent[0]}_token is true, but there is no {absent[0]}_token_id")
        _frame(inner, {role: names[role] for role, added in framed.items() if added})
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": framed["start"],
        "add_eos_token": framed["end"],
    }
    if (template := metadata.get("tokenizer.chat_template")) is not None:
        if not isinstance(template, str):
            raise vocabulary.bad("tokenizer.chat_template is not a text")
        config["chat_template"] = template
    return Tokenizer(inner, names, config=config, where=where)


_REMEDY = "put the model's tokenizer.json beside the file and give their folder"


class _Vocabulary:
    """The tokens of a file, and values under tokenizer.ggml."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._metadata, self.where = metadata, where

    def take(self, name: str, kind: type[Any], default: Any) -> Any:
        value = self._metadata.get(_GGML + name, default)
        if type(value) is not kind:
            raise self.bad(f"{_GGML}{name} is {str(value)[:40]!r}, not {kind.__name__}")
        return value

    def has(self, name: str) -> bool:
        """Say whether an array is there and is not empty."""
        return bool(np.size(self._metadata.get(_GGML + name, ())))

    def numbers(self, name: str, count: int) -> np.ndarray | None:
        """Return an array of one number a token; None if the file has none."""
        values = self._metadata.get(_GGML + name)
        if values is not None and not (isinstance(values, np.ndarray) and len(values) == count):
            raise self.bad(f"{_GGML}{name} is not one number for each of {count} tokens")
        return values

    def texts(self, name: str) -> list[str] | None:
        values = self._metadata.get(_GGML + name)
        if values is not None and not (isinstance(values, list) and all(isinstance(text, str) for text in values)):
            raise self.bad(f"{_GGML}{name} is not a list of texts")
        return values

    def tokens(self) -> tuple[dict[str, int], list[int]]:
        """Return {token: id} and the kind of each token."""
        tokens = self.texts("tokens")
        if not tokens:
            raise self.bad(f"{_GGML}tokens is missing")
        vocab: dict[str, int] = {}
        for index, token in enumerate(tokens):
            if vocab.setdefault(token, index) != index:
                raise self.bad(f"the token {token[:40]!r} has two ids, {vocab[token]} and {index}")
        kinds = self.numbers("token_type", len(tokens))
        return vocab, [_NORMAL] * len(tokens) if kinds is None else kinds.tolist()

    def bad(self, problem: str) -> DataError:
        return DataError(f"{self.where}: {problem}")


def _bytes(vocabulary: _Vocabulary, architecture: str) -> tuple[Any, bool]:
    """Return a byte-level BPE tokenizer, and whether it begins a text with a token where the file does not say."""
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    name = vocabulary.take("pre", str, "default")
    if name == "default" and architecture == "gpt2":
        name = "gpt-2"
    if name not in _KNOWN:
        known = ", ".join(_KNOWN)
        raise vocabulary.bad(f"tokenizer.ggml.pre {name[:40]!r} is not known; known are {known}: {_REMEDY}")
    vocab, kinds = vocabulary.tokens()
    merges = _pairs(vocabulary, vocab)
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=name in _WHOLE_FIRST))
    if name in _SPLITS:
        split: Any = pre_tokenizers.Split(Regex(_SPLITS[name]), "isolated")
    else:
        split = pre_tokenizers.Digits(individual_digits=True) if name == "smollm" else None
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in _SPLITS)
    inner.pre_tokenizer = level if split is None else pre_tokenizers.Sequence([split, level])
    inner.decoder = decoders.ByteLevel()
    if name == "qwen2":
        inner.normalizer = normalizers.NFC()
    _mark(inner, vocab, kinds)
    return inner, name in _WHOLE_FIRST


def _pieces(vocabulary: _Vocabulary) -> tuple[Any, bool]:
    """Return SentencePiece's BPE with bytes for unknown characters; it begins a text with a token by default."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    if vocabulary.take("remove_extra_whitespaces", bool, False) or vocabulary.has("precompiled_charsmap"):
        raise vocabulary.bad(f"its tokenizer normalises texts, which is not supported; {_REMEDY}")
    vocab, kinds = vocabulary.tokens()
    merges = _pairs(vocabulary, vocab) if vocabulary.has("merges") else _scored(vocabulary, vocab, kinds)
    unknown = _names(vocabulary, _USUAL).get("unknown")
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.take("add_space_prefix", bool, True):
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        undo.append(decoders.Strip(" ", 1, 0))
    else:
        inner.normalizer = spaces
    inner.decoder = decoders.Sequence(undo)
    _mark(inner, vocab, kinds)
    return inner, True


def _pairs(vocabulary: _Vocabulary, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the merges of a file, "LEFT RIGHT" each, in their order."""
    merges = []
    for text in vocabulary.texts("merges") or []:
        left, _, right = text.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise vocabulary.bad(f"the merge {text[:60]!r} is not of two tokens into one")
        merges.append((left, right))
    if not merges:
        raise vocabulary.bad(f"{_GGML}merges is missing")
    return merges


def _scored(vocabulary: _Vocabulary, vocab: Mapping[str, int], kinds: Sequence[int]) -> list[tuple[str, str]]:
    """Return the merges that SentencePiece's scores imply: of all pairs that form a token, the best token's first."""
    if (scores := vocabulary.numbers("scores", len(vocab))) is None:
        raise vocabulary.bad(f"{_GGML}scores and {_GGML}merges are missing")
    normal = {token for token, index in vocab.items() if kinds[index] == _NORMAL}
    lengths = [*map(len, normal), 0]
    if max(lengths) > _LONGEST or sum(lengths) > _LETTERS:  # their pairs would take too long to find
        what = f"{max(lengths)} characters, and all have {sum(lengths)}"
        raise vocabulary.bad(f"its longest token has {what}; at most {_LONGEST} and {_LETTERS} are supported")
    return [
        (token[:cut], token[cut:])
        for token in sorted(normal, key=lambda token: (-scores[vocab[token]], vocab[token]))
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in normal and token[cut:] in normal
    ]


def _mark(inner: Any, vocab: Mapping[str, int], kinds: Sequence[int]) -> None:
    """Tell the library which tokens are never split: control tokens, which are special, and the user's own."""
    from tokenizers import AddedToken

    special = {_UNKNOWN: True, _CONTROL: True, _USER: False}
    inner.add_tokens(
        [
            AddedToken(token, normalized=False, special=special[kinds[index]])
            for token, index in vocab.items()
            if kinds[index] in special and token
        ]
    )


def _names(vocabulary: _Vocabulary, usual: Mapping[str, int]) -> dict[str, str]:
    """Return {role: token} of the special tokens."""
    tokens, names = vocabulary.texts("tokens") or [], {}
    for role, name in _ROLES.items():
        index = vocabulary.take(f"{name}_token_id", int, usual.get(name, -1))
        if index >= len(tokens):
            raise vocabulary.bad(f"{_GGML}{name}_token_id is {index}, but there are {len(tokens)} tokens")
        if index >= 0:
            names[role] = tokens[index]
    return names


def _frame(inner: Any, ends: Mapping[str, str]) -> None:
    """Put the tokens before and after every text that is encoded with special tokens."""
    from tokenizers import processors

    if not ends:
        return

    def around(text: str) -> list[str]:
        kind = text.partition(":")[2] or "0"
        tokens = {role: f"{token}:{kind}" for role, token in ends.items()}
        return [*([tokens["start"]] if "start" in tokens else []), text, *([tokens["end"]] if "end" in tokens else [])]

    ids = [(token, inner.token_to_id(token)) for token in dict.fromkeys(ends.values())]
    inner.post_processor = processors.TemplateProcessing(around("$A"), [*around("$A"), *around("$B:1")], ids)
