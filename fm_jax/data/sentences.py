"""Documents cut into sentences, as one stream: what next-sentence pairs and rows of full sentences are made of."""

import re
from functools import cached_property

import numpy as np

from fm_jax.data.source import Documents

# Behind a full stop, with the brackets and quotes that close after it, where no small letter follows; and at a line
# that is empty. The space between two sentences belongs to the second.
_BREAK = re.compile(r"""[.!?]["'`*)\]]*(?=\s+[^\sa-z])|(?<=\S)(?=[ \t]*\n[ \t]*\n)""")


def split(text: str) -> list[str]:
    """Cut a text into sentences, none of which is blank; joined they are the text, unless that is blank itself."""
    ends = [match.end() for match in _BREAK.finditer(text)]
    found: list[str] = []
    for start, stop in zip([0, *ends], [*ends, len(text)], strict=True):
        piece = text[start:stop]
        if found and not piece.strip():
            found[-1] += piece
        elif found and not found[-1].strip():
            found[-1] += piece  # blanks before the first sentence
        elif piece:
            found.append(piece)
    return found if text.strip() else []


class Sentences:
    """All sentences of all documents in their order; an empty one closes every document, as in BERT's own files.

    Made to be read once from front to back: a document is split when its first sentence is asked for, and kept until
    another document's is.
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
        """Where each document's first sentence stands, and last their number: int64 [documents + 1]."""
        counts = [len(split(self._documents[index])) + 1 for index in range(len(self._documents))]
        return np.cumsum([0, *counts], dtype=np.int64)
