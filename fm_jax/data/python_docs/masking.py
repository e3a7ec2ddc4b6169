"""Docstrings with the name of their package masked, for the docstring task.

`MASK` replaces two things: the names of the labelled packages in any spelling ("HTTPServer", "emails") with the dotted
path behind them, and the names of their modules where they qualify another name ("events.AbstractEventLoop"). All ten
packages are masked in every text, so the mask itself gives nothing away.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from fm_jax.data.python_docs import library
from fm_jax.data.python_docs.library import LABELLED as CLASSES

MASK = "___"
_MIN_WORDS = 6


def generate(modules: Sequence[library.Module]) -> Iterator[tuple[str, str, str, int]]:
    """Yield (split, module, masked text, label) from the corpus's modules; the label is an index into `CLASSES`.

    A docstring that several modules share is left out because it does not identify its package. A test docstring that
    occurs inside a text of the train split is left out too.
    """
    train = " ".join(block.words for module in modules if module.split == "train" for block in module.blocks)
    examples = []
    for module in modules:
        if module.package not in CLASSES:
            continue
        for block in module.blocks:
            if block.kind != "docstring" or block.repeated or (module.split != "train" and block.words in train):
                continue
            text = mask(block.text)
            if len(re.findall(r"[A-Za-z]{2,}", text)) >= _MIN_WORDS:
                examples.append((module.split, module.name, text, CLASSES.index(module.package)))
    copies = Counter(text for _, _, text, _ in examples)
    yield from (example for example in examples if copies[example[2]] == 1)


def mask(text: str) -> str:
    """Mask everything that reveals the label; see the module docstring."""
    packages, qualifiers = _patterns()
    return qualifiers.sub(MASK, packages.sub(MASK, text))


@functools.cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    packages = "|".join(sorted(CLASSES, key=len, reverse=True))
    held = sorted({part for name in _modules() for part in name.split(".")[1:] if not part.startswith("__")})
    return (
        re.compile(rf"(?:{packages})(?:\.\w+)*", re.IGNORECASE),
        re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, held))})(?=\.[A-Za-z_])"),
    )


def _modules() -> list[str]:
    return [name for name, _ in library.sources(CLASSES)]
