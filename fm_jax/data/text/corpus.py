"""From a config to token blocks: a tokenizer and one token stream per split, built once and kept.

A stream holds documents or, for encoders, their sentences; an empty sentence ends each document.

`data_dir/corpora/KEY/` holds the tokenizer and `train/`, `validation/`, `test/`. KEY changes with the documents, the
tokenizer's scheme and its vocabulary size, so nothing stale is ever reused.
"""

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fm_jax.core.errors import DataError
from fm_jax.core.files import there
from fm_jax.data import files
from fm_jax.data.text import documents, layout, records, tokenizer, tokens
from fm_jax.data.text.sentences import Sentences
from fm_jax.data.text.tokenizer import Tokenizer

Scheme = Literal["bytes", "t5", "wordpiece"]
SENTINELS = 100  # sentinel tokens of scheme t5

_TRAIN_ON = 200_000_000  # characters a tokenizer is trained on; more changes hardly any merge and fills the memory


@dataclass(frozen=True)
class Corpus:
    """A tokenizer, and a folder with the tokens of each split."""

    tokenizer: Tokenizer
    folder: Path
    names: tuple[str, str, str] = ("train", "validation", "test")

    def tokens(self, split: str) -> tokens.Tokens:
        """Open the token stream of a split."""
        return tokens.load(self._split(split))

    def num_bytes(self, split: str) -> int:
        """Return the number of UTF-8 bytes of a split, for bits per byte: sum of nats / ln 2 / bytes."""
        folder = self._split(split)
        return (tokens.load(folder) if _is_stream(folder) else records.load(folder)).num_bytes

    def blocks(self, split: str, length: int, *, apart: bool = False) -> layout.Blocks | records.RecordBlocks:
        """Return a split as blocks of `length` tokens; with `apart`, attention does not cross documents.

        Raises:
            DataError: the split was written as ArrayRecord blocks of another length, or `apart` was requested of such
                blocks.
        """
        folder = self._split(split)
        if _is_stream(folder):
            return layout.Blocks(tokens.load(folder), length, apart=apart, name=f"{split} of {self.folder.name}")
        stored = records.load(folder)
        if stored.length != length or apart:
            wanted = "separate documents (apart)" if apart else f"blocks of {length}"
            raise DataError(f"{folder} stores fixed blocks of {stored.length} tokens and cannot give {wanted}")
        return stored

    def packed(self, split: str, length: int) -> layout.Packed:
        """Return a split as whole documents packed into rows of `length` tokens."""
        return layout.Packed(tokens.load(self._split(split)), length, name=f"{split} of {self.folder.name}")

    def _split(self, split: str) -> Path:
        return files.folder_of(self.folder, documents.Config(splits=self.names).here(split))


def prepare(
    cfg: documents.Config,
    data_dir: Path,
    *,
    vocab_size: int,
    splits: tuple[str, ...] = documents.SPLITS,
    scheme: Scheme = "bytes",
    by_sentence: bool = False,
    given: Tokenizer | None = None,
) -> Corpus:
    """Open a corpus; train its tokenizer (on the train split only) and tokenise it if that was not done yet.

    A corpus of kind "tokens" is already tokenised: `path` holds tokenizer.json and a folder per split, written by
    `tokens.write` or `records.write`.

    Args:
        cfg: the corpus.
        data_dir: directory of built corpora and tokens.
        vocab_size: the tokenizer's vocabulary size; a corpus of kind "tokens" must have exactly this size.
        splits: the splits to tokenise.
        scheme: byte-level BPE, byte-level BPE with T5's layout and sentinels, or BERT's uncased WordPiece.
        by_sentence: split documents into sentences, as `sentence_pairs` reads them.
        given: a pretrained model's tokenizer, used instead of training one; `vocab_size` and `scheme` are then its own.

    Raises:
        DataError: tokens of another tokenizer than the given one; or as `documents.documents`, `tokenizer.train` and
            `tokens.load` raise.
    """
    if cfg.kind == "tokens":
        assert cfg.path is not None
        words = tokenizer.load(cfg.path)
        _check_words(words, cfg.path, given, vocab_size)
        return Corpus(words, cfg.path, cfg.splits)
    if given is not None:
        vocab_size = given.vocab_size
    learnt = f"-{scheme}" if given is None else f"-{given.fingerprint}"
    form = ("" if learnt == "-bytes" else learnt) + ("-sentences" if by_sentence else "")
    key = f"{documents.fingerprint(cfg, 'train', data_dir)}-{vocab_size}{form}"
    name = f"{cfg.kind}-{vocab_size}{form}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    folder = data_dir / "corpora" / name
    opened: dict[str, documents.Documents] = {}
    if there(folder / "tokenizer.json", DataError):
        trained = tokenizer.load(folder)
    elif given is not None:
        trained = _saved(given, folder)
    else:
        opened["train"] = documents.documents(cfg, "train", data_dir)
        trained = _saved(_learn(scheme, _sample(opened["train"]), vocab_size), folder)
    for split in splits:
        mark = documents.fingerprint(cfg, split, data_dir) + ("-sentences" if by_sentence else "")
        if not _is_made(folder / split, tokens.made_from(mark, trained)):
            texts = opened.pop(split, None) or documents.documents(cfg, split, data_dir)
            tokens.write(Sentences(texts) if by_sentence else texts, trained, folder / split)
    return Corpus(trained, folder)


def _check_words(words: Tokenizer, path: Path, given: Tokenizer | None, vocab_size: int) -> None:
    """Refuse ready-made tokens of another tokenizer or vocabulary than the model's."""
    if given is not None and words.fingerprint != given.fingerprint:
        raise DataError(
            f"{path} holds tokens of another tokenizer than the model's; give its texts (kind text or jsonl)"
        )
    if given is None and words.vocab_size != vocab_size:
        raise DataError(
            f"{path} has a vocabulary of {words.vocab_size}, not {vocab_size}; set vocab_size to {words.vocab_size}"
        )


def _saved(trained: Tokenizer, folder: Path) -> Tokenizer:
    try:
        trained.save(folder)
    except OSError as error:
        raise files.failed(error, f"cannot write the tokenizer to {folder}") from error
    return trained


def _learn(scheme: Scheme, texts: Iterator[str], vocab_size: int) -> Tokenizer:
    if scheme == "wordpiece":
        return tokenizer.train_wordpiece(texts, vocab_size)
    return tokenizer.train(texts, vocab_size, sentinels=SENTINELS if scheme == "t5" else 0)


def _sample(documents: documents.Documents) -> Iterator[str]:
    """Yield all documents of a small corpus, or an evenly spread, fixed sample of a large one."""
    count, characters = len(documents), 0
    step = next(s for s in range(max(1, int(count * 0.618)), 2 * count + 2) if math.gcd(s, count) == 1)
    for i in range(count):
        if characters >= _TRAIN_ON:
            return
        text = documents[i * step % count]
        characters += len(text)
        yield text


def _is_stream(folder: Path) -> bool:
    """Return whether a folder holds one stream of tokens, and not ArrayRecord blocks; a broken link counts."""
    return os.path.lexists(folder / "tokens.bin")


def _is_made(folder: Path, made_from: str) -> bool:
    """Return whether a folder holds the tokens of these documents and this tokenizer; damage raises."""
    return folder.is_dir() and tokens.load(folder).index.made_from == made_from
