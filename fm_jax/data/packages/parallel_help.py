"""LibreOffice's help in two languages: paragraphs and headings with the same id in the same file are translations.

SPLIT.en and SPLIT.de for train, validation and test, aligned line by line, as `data/text/parallel.py` reads them. Files
are split, not sentences. Kept are pairs of 3 to 60 words on both sides that are not equal (code, names); a sentence of
the help's many shared passages is kept once, in train before the other splits.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from fm_jax.core.errors import DataError

LEAST, MOST = 3, 60  # words
SPLITS = ("train", "validation", "test")
LANGUAGES = {"en": ("libreoffice-help-en-us", "en-US"), "de": ("libreoffice-help-de", "de")}
_ID = re.compile(r"(?:par|hd)_id\w+", re.ASCII)
_TAGS = ("p", "h1", "h2", "h3", "h4", "h5", "h6")
_MAX_FILE = 20_000_000  # bytes

Pair = tuple[str, str]


class _Paragraphs(HTMLParser):
    """Collect {id: text} of a page; of a repeated id, the first.

    A hidden span is one of several alternatives, of which a script shows one. Those for macOS stand beside a default
    and are skipped; a paragraph with others has no one text and is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self._id, self._tag, self._parts = "", "", list[str]()
        self._skipped = 0  # open spans, from the skipped one on

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a paragraph; one that was not closed ends here."""
        given = dict(attrs)
        if tag in _TAGS:
            self._end()
            if _ID.fullmatch(given.get("id") or ""):
                self._id, self._tag = str(given["id"]), tag
        elif tag == "br":
            self._parts.append(" ")
        elif tag == "span" and (self._skipped or (given.get("hidden") and given.get("class") == "MAC")):
            self._skipped += 1
        elif tag == "span" and given.get("hidden") and given.get("class"):
            self._id = ""

    def handle_endtag(self, tag: str) -> None:
        """End the paragraph that this tag began."""
        if tag == self._tag:
            self._end()
        elif tag == "span" and self._skipped:
            self._skipped -= 1

    def handle_data(self, data: str) -> None:
        """Add text to the paragraph, if one is open."""
        if self._id and not self._skipped:
            self._parts.append(data)

    def _end(self) -> None:
        if self._id and (text := " ".join("".join(self._parts).split())):
            self.texts.setdefault(self._id, text)
        self._id, self._tag, self._parts, self._skipped = "", "", [], 0


def convert(packages: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write the three splits; return what was kept and what was left out."""
    folders = [packages[package] / "usr/share/libreoffice/help" / name / "text" for package, name in LANGUAGES.values()]
    found: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    files = 0
    for path, pairs in _files(*folders):
        files += 1
        found[split_of(path)] += pairs
    distinct = {pair for pairs in found.values() for pair in pairs}
    if not distinct:
        raise DataError(f"{' and '.join(packages)} have no paragraph in common")
    counts: dict[str, Any] = {"files": files, "distinct_pairs": len(distinct)}
    counts["distinct_pairs_of_3_to_60_english_words"] = sum(fits(source) for source, _ in distinct)
    counts["left_out_equal"] = sum(source == target for source, target in distinct)
    counts["left_out_by_length"] = sum(
        source != target and not (fits(source) and fits(target)) for source, target in distinct
    )
    seen: set[str] = set()
    for split in SPLITS:
        kept = _kept(found[split], seen)
        seen |= {source for source, _ in kept}
        counts[split] = len(kept)
        for language, side in zip(LANGUAGES, zip(*kept, strict=True) if kept else ((), ()), strict=True):
            (out / f"{split}.{language}").write_text("".join(f"{line}\n" for line in side), "utf-8")
    return counts


def split_of(path: str) -> str:
    """Return the split of a whole file: about 90, 5 and 5 % of them."""
    share = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") / 2**32
    return "validation" if share < 0.05 else "test" if share < 0.1 else "train"


def fits(text: str) -> bool:
    """Return whether a text has 3 to 60 words."""
    return LEAST <= len(text.split()) <= MOST


def _kept(pairs: list[Pair], seen: set[str]) -> list[Pair]:
    """Return the pairs to keep of one split, in order; no source of an earlier split, no source twice."""
    kept: dict[str, str] = {}
    for source, target in pairs:
        if source != target and fits(source) and fits(target) and source not in seen:
            kept.setdefault(source, target)
    return list(kept.items())


def _files(first: Path, second: Path) -> Iterator[tuple[str, list[Pair]]]:
    """Yield each file that both languages have, with its pairs."""
    for path in sorted(first.rglob("*.html")):
        name = path.relative_to(first).as_posix()
        if (other := second / name).is_file():
            ours, theirs = _texts(path), _texts(other)
            yield name, [(text, theirs[key]) for key, text in ours.items() if key in theirs]


def _texts(path: Path) -> dict[str, str]:
    if path.stat().st_size > _MAX_FILE:
        raise DataError(f"{path.name} has {path.stat().st_size} bytes; at most {_MAX_FILE} are read")
    page = _Paragraphs()
    page.feed(path.read_text("utf-8", "replace"))
    page.close()
    return page.texts
