"""Text to token ids and back: byte-level BPE, BERT's WordPiece, and any tokenizer.json.

A folder holds `tokenizer.json` (the whole tokenizer) and `tokenizer_config.json` (the names of its special tokens, and
the chat template), as `transformers` and llama.cpp's converters read them. Our own tokenizer is byte-level byte-pair
encoding (Sennrich et al. 2016, over bytes as in Radford et al. 2019): any text round-trips because all 256 bytes are in
the alphabet.
"""

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fm_jax.core.errors import ConfigError, DataError, shown
from fm_jax.data.text import chat as chats
from fm_jax.data.text import encoded, tokenizer_file

END = "<|endoftext|>"
PAD = "<|pad|>"
BYTES = {"start": END, "end": END, "unknown": END, "pad": PAD}
T5 = {"pad": "<pad>", "end": "</s>", "unknown": "<unk>"}
BERT = {"pad": "[PAD]", "unknown": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}

Role = Literal["start", "end", "unknown", "pad", "cls", "sep", "mask"]
_DERIVED = ("sentinels", "begins_word", "_parsing", "_control", "_word_end")  # cached values
INSTEAD: dict[str, str] = {"start": "cls", "end": "sep"}  # fallbacks: BERT's texts start and end with these


class Tokenizer:
    """Text to token ids and back; returned by `train`, `train_wordpiece` and `load`."""

    def __init__(
        self,
        inner: Any,
        names: Mapping[str, str],
        *,
        config: Mapping[str, Any] | None = None,
        where: str = "the tokenizer",
    ) -> None:
        self._inner, self._names, self._config, self._where = inner, dict(names), config, where
        # Unless asked, special tokens in text are not parsed: a document with <|endoftext|> in it does not end there.
        inner.encode_special_tokens = True
        inner.no_padding()
        inner.no_truncation()
        self.vocab_size: int = inner.get_vocab_size(with_added_tokens=True)
        self.fingerprint = hashlib.sha256(inner.to_str().encode()).hexdigest()[:16]

    def __getstate__(self) -> dict[str, Any]:
        # Cached values are cheap to recompute, and every source that is pickled to workers carries a tokenizer.
        return {name: value for name, value in vars(self).items() if name not in _DERIVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._inner.encode_special_tokens = True  # the library does not pickle it

    def special(self, role: Role) -> int:
        """Return the id of a special token; "start" and "end" default to BERT's [CLS] and [SEP].

        Raises:
            DataError: the tokenizer has no such token.
        """
        for choice in (role, INSTEAD.get(role)):
            if choice in self._names and (index := self._inner.token_to_id(self._names[choice])) is not None:
                return int(index)
        name = f" {shown(self._names[role])}" if role in self._names else ""
        raise DataError(
            f"{self._where} has no {role} token{name}; set it in tokenizer_config.json to a token of the vocabulary"
        )

    @property
    def end_id(self) -> int:
        """Id of the token between documents and after an answer."""
        return self.special("end")

    @property
    def start_id(self) -> int:
        """Id of the token before a text; the end token if the tokenizer has no start token."""
        try:
            return self.special("start")
        except DataError:
            return self.end_id

    @property
    def pad_id(self) -> int:
        """Id of the padding token; the end token if the tokenizer has no other."""
        try:
            return self.special("pad")
        except DataError:
            return self.end_id

    @cached_property
    def sentinels(self) -> list[int]:
        """Return the ids of T5's sentinels <extra_id_0>, <extra_id_1>, …; [] for other tokenizers."""
        ids: list[int] = []
        while (index := self._inner.token_to_id(f"<extra_id_{len(ids)}>")) is not None:
            ids.append(index)
        return ids

    @cached_property
    def begins_word(self) -> np.ndarray:
        """Return which tokens begin a word (or are a whole word): bool [V]."""
        model = json.loads(self._inner.to_str())["model"]
        texts = [self._inner.id_to_token(index) for index in range(self.vocab_size)]
        if prefix := model.get("continuing_subword_prefix"):
            return np.array([not text.startswith(prefix) for text in texts])
        # Byte-level and metaspace tokens begin with the space before a word, as Ġ or ▁; bytes 0 to 32 are Ā … Ġ.
        return np.array([not text[:1].isalnum() or "\u0100" <= text[:1] <= "\u0120" for text in texts])

    @property
    def chat_templates(self) -> dict[str, str]:
        """Return the chat templates by name; a single one is "default".

        Raises:
            DataError: tokenizer_config.json has them in another form.
        """
        return chats.templates((self._config or {}).get("chat_template"), self._where)

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """Return the token ids of a text, int32 [T], without a frame of special tokens.

        Args:
            text: any text.
            special: read special tokens that are spelt out (`<|im_start|>`) as such, not as text. Whoever wrote a part
                of such a text can end a turn or a document with it.
        """
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[np.ndarray]:
        """Return the token ids of many texts, int32 [T] each; arguments as of `encode`, uses all cores.

        Raises:
            DataError: the tokenizer fails on a text.
        """
        with tokenizer_file.guard(f"{self._where} cannot encode"):
            encodings = self._reader(special).encode_batch(list(texts), add_special_tokens=False)
        return [np.array(item.ids, np.int32) for item in encodings]

    def encode_pair(self, first: str, second: str | None = None, *, special: bool = False) -> encoded.Encoded:
        """Tokenise one text or a pair, with the tokenizer's frame of special tokens; `special` as in `encode`."""
        return self.encode_pairs([first], None if second is None else [second], special=special)[0]

    def encode_pairs(
        self, first: Sequence[str], second: Sequence[str] | None = None, *, special: bool = False
    ) -> list[encoded.Encoded]:
        """Tokenise many texts or pairs, with the tokenizer's frame of special tokens; uses all cores.

        Raises:
            DataError: the numbers of first and second texts differ, or the tokenizer fails on a text.
        """
        if second is not None and len(first) != len(second):
            raise DataError(f"{len(first)} first texts and {len(second)} second texts do not form pairs")
        texts = list(first) if second is None else list(zip(first, second, strict=True))
        with tokenizer_file.guard(f"{self._where} cannot encode"):
            return [encoded.read(item) for item in self._reader(special).encode_batch(texts, add_special_tokens=True)]

    def chat(
        self,
        messages: Sequence[chats.Message],
        *,
        add_generation_prompt: bool = False,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """Return the text that the chat template makes of messages, as transformers' `apply_chat_template`.

        Args:
            messages: a conversation, oldest first: [{"role": "user", "content": "…"}, …].
            add_generation_prompt: end with what comes before the assistant's answer.
            template: name of one of several `chat_templates`.
            variables: further inputs of the template: `tools`, `documents`, `enable_thinking` …

        Raises:
            ConfigError: jinja2 is missing.
            DataError: there is no template, or it refuses the messages.
        """
        where = f"the chat template of {self._where}"
        chosen = chats.choose(self.chat_templates, template, tools=bool(variables.get("tools")), where=self._where)
        given: dict[str, Any] = {tokenizer_file.FIELDS[role]: token for role, token in self._names.items()}
        given |= {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt} | variables
        return chats.render(chosen, [given | {"messages": chats.plain(messages, where)}], where=where)[0]

    def encode_chat(self, messages: Sequence[chats.Message], *, trusted: bool = False, **options: Any) -> np.ndarray:
        """Return the token ids of a conversation, int32 [T].

        The template's special tokens are read as such. Those that a message spells out are text: whoever wrote it
        cannot end a turn and speak for another role.

        Args:
            messages: as of `chat`.
            trusted: read special tokens in messages as such too, as transformers does by default.
            options: further arguments of `chat`.

        Raises:
            ConfigError: as of `chat`.
            DataError: as of `chat`, or the tokenizer fails on a text.
        """
        if trusted:
            return self.encode(self.chat(messages, **options), special=True)
        text = self.chat(chats.mark(messages, self._control), **chats.mark(options, self._control))
        return np.concatenate(
            [np.zeros(0, np.int32), *(self.encode(part, special=own) for part, own in chats.parts(text))]
        )

    def decode(self, ids: Sequence[int] | np.ndarray, *, keep_special: bool = False) -> str:
        """Return the text of token ids [T]; bytes that are not UTF-8 become U+FFFD.

        Ids beyond the vocabulary have no text and are left out, with a warning: a model whose embedding is padded to
        more rows than there are tokens can generate them.

        Raises:
            DataError: a negative id.
        """
        ids = np.asarray(ids, np.int64)
        if ids.size and ids.min() < 0:
            raise DataError(f"token id {ids.min()} is outside the vocabulary of {self.vocab_size}")
        if (beyond := ids[ids >= self.vocab_size]).size:
            warnings.warn(
                f"token id {beyond[0]} is beyond {self._where}, which has {self.vocab_size} tokens; it has no text",
                stacklevel=2,
            )
            ids = ids[ids < self.vocab_size]
        with tokenizer_file.guard(f"{self._where} cannot decode"):
            text: str = self._inner.decode(ids.tolist(), skip_special_tokens=not keep_special)
        return text.replace(self._word_end, " ").strip() if self._word_end else text

    def token(self, index: int) -> str:
        """Return a token as written in the vocabulary (bytes as printable characters, a space as Ġ)."""
        return self._inner.id_to_token(index)

    @cached_property
    def _parsing(self) -> Any:
        """The library's tokenizer once more, for texts in which special tokens are read as such."""
        import tokenizers

        return tokenizers.Tokenizer.from_str(self._inner.to_str())

    @cached_property
    def _word_end(self) -> str:
        """The mark of a word's last token (CLIP's </w>) if the library leaves it in decoded text, else ""."""
        left = type(self._inner.decoder).__name__ == "ByteLevel"
        return getattr(self._inner.model, "end_of_word_suffix", None) or "" if left else ""

    @cached_property
    def _control(self) -> tuple[str, ...]:
        """The special tokens as they are spelt out."""
        added = self._inner.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    def _reader(self, special: bool) -> Any:
        return self._parsing if special else self._inner

    def files(self) -> dict[str, str]:
        """Return {name: text} of the files that `save` writes."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | dict(self._config or {})
        config |= {key: self._names[role] for role, key in tokenizer_file.FIELDS.items() if role in self._names}
        if self._config is None:
            config |= {"add_prefix_space": False, "clean_up_tokenization_spaces": False}
        if self._config is None and "cls" in self._names:  # otherwise transformers 5 omits the token types
            config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        return {
            "tokenizer_config.json": json.dumps(config, indent=1),
            "tokenizer.json": self._inner.to_str(pretty=True),
        }

    def filled(self, vocab_size: int) -> "Tokenizer":
        """Return this tokenizer with further tokens, which no text has, up to a vocabulary size."""
        inner = type(self._inner).from_str(self._inner.to_str())
        inner.add_tokens([f"<blank_{number}>" for number in range(vocab_size - self.vocab_size)])
        return Tokenizer(inner, self._names)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, each atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files().items():
            _write(folder / name, text)


def train(texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2, sentinels: int = 0) -> Tokenizer:
    """Train byte-level BPE; the same texts give the same tokenizer.

    Args:
        texts: training texts, read once; their order does not matter.
        vocab_size: number of tokens, including the 256 bytes and the special tokens.
        min_frequency: rarer pairs are not merged.
        sentinels: if above 0, use T5's layout: <pad>, </s>, <unk> first, this many <extra_id_…> last (<extra_id_0> is
            the very last), and </s> after every text.

    Raises:
        ConfigError: `vocab_size` has no room for the bytes.
        DataError: no text, or too little text for `vocab_size` tokens.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = T5 if sentinels else BYTES
    special = list(T5.values()) if sentinels else [END, PAD]
    if vocab_size < (least := len(alphabet) + len(special) + sentinels):
        raise ConfigError(f"vocab_size {vocab_size} is too small; bytes and special tokens alone need {least}")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - sentinels,
        min_frequency=min_frequency,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    inner.add_special_tokens([f"<extra_id_{number}>" for number in reversed(range(sentinels))])
    if sentinels:
        closing = [("</s>", inner.token_to_id("</s>"))]
        inner.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", closing)
    return _full(inner, vocab_size, names)


def train_wordpiece(
    texts: Iterable[str], vocab_size: int, *, lowercase: bool = True, min_frequency: int = 2
) -> Tokenizer:
    """Train BERT's WordPiece tokenizer; `lowercase` removes case and accents.

    The ids of [PAD], [UNK], [CLS], [SEP], [MASK] are 0 to 4; a pair becomes [CLS] A [SEP] B [SEP] with types 0 and 1.
    A word with a character that does not occur in the texts becomes [UNK].
    Source: Devlin et al. 2019; pieces by Schuster & Nakajima 2012, here chosen by the frequency of pairs.

    Raises:
        ConfigError: `vocab_size` has no room for the characters.
        DataError: no text, or too little text for `vocab_size` tokens.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    inner = tokenizers.Tokenizer(models.WordPiece(unk_token=BERT["unknown"]))
    inner.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    texts = list(texts)
    first = _characters(texts, inner, most=max(1, (vocab_size - len(BERT)) // 3))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        # The library numbers pieces such as ##a in hash-table order; listing them here fixes their ids.
        special_tokens=[*BERT.values(), *first],
        initial_alphabet=[token for token in first if len(token) == 1],
        limit_alphabet=sum(len(token) == 1 for token in first),
        show_progress=False,
    )
    learner = tokenizers.Tokenizer(inner.model)
    learner.normalizer, learner.pre_tokenizer = inner.normalizer, inner.pre_tokenizer
    learner.train_from_iterator(texts, trainer)
    inner.model = models.WordPiece(learner.get_vocab(), unk_token=BERT["unknown"])
    inner.add_special_tokens(list(BERT.values()))
    frame = [(token, inner.token_to_id(token)) for token in (BERT["cls"], BERT["sep"])]
    inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", frame)
    return _full(inner, vocab_size, BERT)


def load(folder: Path) -> Tokenizer:
    """Read a tokenizer.json, ours or another tool's, and the names of its special tokens in the files beside it.

    Raises:
        DataError: missing or invalid files; a missing special token raises only when it is requested.
    """
    file = folder / "tokenizer.json" if folder.is_dir() else folder
    inner, names, config = tokenizer_file.read(file)
    with tokenizer_file.guard(f"{file} is not a tokenizer"):
        return Tokenizer(inner, names, config=config, where=str(file))


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> None:
    """Refuse a tokenizer with more tokens than an embedding has rows; fewer is usual for a padded embedding.

    Raises:
        DataError: the tokenizer has more tokens; the message gives both numbers.
    """
    if tokenizer.vocab_size > rows:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's embedding has {rows} rows; "
            "use the tokenizer that the model was trained with"
        )


def bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Return the mean number of UTF-8 bytes per token."""
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
    return sum(len(text.encode()) for text in texts) / max(tokens, 1)


def _characters(texts: Iterable[str], inner: Any, *, most: int) -> list[str]:
    """Return the `most` commonest characters, sorted, followed by ##a for each that can occur within a word."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update("".join(inner.normalizer.normalize_str(text).split()))
    kept = sorted(sorted(counts, key=lambda character: (-counts[character], character))[: min(most, 1000)])
    return kept + [f"##{c}" for c in kept if len(inner.pre_tokenizer.pre_tokenize_str(f"a{c}a")) == 1]


def _full(inner: Any, vocab_size: int, names: Mapping[str, str]) -> Tokenizer:
    """Return a newly trained tokenizer if its vocabulary has exactly `vocab_size` tokens."""
    if (reached := inner.get_vocab_size()) != vocab_size:
        remedy = "lower vocab_size or add text" if reached < vocab_size else "raise vocab_size"
        raise DataError(f"the text gives {reached} tokens, not vocab_size {vocab_size}; {remedy}")
    return Tokenizer(inner, names)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")  # process ids repeat across machines
    partial.write_text(text, "utf-8")
    os.replace(partial, path)
