"""A corpus of random words in any vocabulary: rows of the right shapes for what only needs shapes."""

from pathlib import Path

import numpy as np

from fm_jax.data.text import corpus, documents, tokenizer, tokens
from fm_jax.data.text.sentences import Sentences

_LEARNT = 400  # tokens that the tokenizer learns, where the vocabulary has as many; the others never occur
_WORDS = 2_000


def write(folder: Path, scheme: corpus.Scheme, vocab_size: int, length: int) -> documents.Config:
    """Write a corpus of kind "tokens" with at least ten rows of `length` tokens in each split.

    Nothing is learnt from it, so its vocabulary is filled up with tokens that no text has: learning 50,257 real ones
    takes seconds.
    """
    letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, (_WORDS, 6), dtype=np.uint8)
    words = [row.tobytes().decode() for row in letters]
    text = " ".join(f"{' '.join(words[start : start + 10]).capitalize()}." for start in range(0, _WORDS, 10))
    learnt = min(vocab_size, _LEARNT)
    if scheme == "wordpiece":
        few = tokenizer.train_wordpiece([text], learnt)
    else:
        few = tokenizer.train([text], learnt, sentinels=corpus.SENTINELS if scheme == "t5" else 0)
    filled = few.filled(vocab_size)
    filled.save(folder)
    # a word is a token or more; a pair of sentences may need two documents
    texts = _Repeated(text, 2 + 10 * length // _WORDS)
    for split in documents.SPLITS:
        tokens.write(Sentences(texts) if scheme == "wordpiece" else texts, filled, folder / split)
    return documents.Config(kind="tokens", path=folder)


class _Repeated:
    """One text a number of times."""

    fingerprint = "blank"

    def __init__(self, text: str, count: int) -> None:
        self._text, self._count = text, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:
        return self._text
