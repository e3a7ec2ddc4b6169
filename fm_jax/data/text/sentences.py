"""Documents split into sentences, as one stream, for next-sentence pairs and rows of full sentences."""

import re
from functools import cached_property

import numpy as np

from fm_jax.data.text.documents import Documents

# A sentence ends after a full stop and its closing brackets and quotes, unless a lowercase letter follows, and at an
# empty line. The space between two sentences belongs to the second.
_BREAK = re.compile(r"""[.!?]["'`*)\]]*(?=\s+[^\sa-z])|(?<=\S)(?=[ \t]*\n[ \t]*\n)""")


def split(text: str) -> list[str]:
    """Split a text into sentences that are not blank; joined they give the text. A blank text has none."""
    ends = [match.end() for match in _BREAK.finditer(text)]
    pieces: list[str] = []
    for start, stop in zip([0, *ends], [*ends, len(text)], strict=True):
        piece = text[start:stop]
        if pieces and not piece.strip():
            pieces[-1] += piece
        elif pieces and not pieces[-1].strip():
            pieces[-1] += piece  # blanks before the first sentence
        elif piece:
            pieces.append(piece)
    return pieces if text.strip() else []


class Sentences:
    """All sentences of all documents in order; an empty one ends every document, as in BERT's own files.

    For sequential reading: only the document that was read last is kept split.
    """

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self.fingerprint = f"{documents.fingerprint}-sentences"
        self._kept: tuple[int, list[str]] = (-1, [])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        document = int(np.searchsorted(self._starts, index, side="right")) - 1
        if self._kept[0] != document:
            self._kept = (document, [*split(self._documents[document]), ""])
        return self._kept[1][index - int(self._starts[document])]

    @cached_property
    def _starts(self) -> np.ndarray:
        """Index of each document's first sentence, then the number of sentences: int64 [documents + 1]."""
        counts = [len(split(self._documents[index])) + 1 for index in range(len(self._documents))]
        return np.cumsum([0, *counts], dtype=np.int64)
