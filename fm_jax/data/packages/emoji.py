"""Emoji as small pictures in two styles, with classes, captions and keywords.

STYLE/SPLIT/CATEGORY/CODE.png for the styles twitter and google: `data/images/folder.py` reads a style's folder, with
the ten categories as classes. STYLE_skins has the same for the other skin tones, which would be half of all pictures
and most of one class. captions.jsonl has one line a picture: {"file", "style", "split", "category",
"subcategory", "emoji", "code", "skin": [tones], "caption": English, "names": {language: name},
"keywords": {language: [words]}}. Names and keywords are missing where CLDR has none (flags and keycaps).

All pictures of one concept are in one split: both styles, every skin tone, and the same act or profession of man, woman
and person.
"""

import hashlib
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fm_jax.core import json_file
from fm_jax.core.errors import DataError
from fm_jax.data.packages import json_lines

STYLES, LANGUAGES, SIZE = ("twitter", "google"), ("en", "de", "fr", "es", "zh"), 64
SPLITS = ("train", "validation", "test")
_CODE = re.compile(r"[0-9A-F]{4,6}(?:-[0-9A-F]{4,6}){0,15}")
_PEOPLE, _JOINER, _FLAGS = {"1F468", "1F469", "1F9D1"}, "200D", range(0x1F1E6, 0x1F200)
_TONES = range(0x1F3FB, 0x1F400)
_ALONE = "component"  # five swatches of skin: too few to split

Words = dict[str, dict[str, tuple[str, list[str]]]]  # language -> emoji without variation selectors -> name, keywords


def convert(packages: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write pictures and captions; return how many."""
    words = {language: _annotations(packages["cldr-annotations-full"], language) for language in LANGUAGES}
    rows: list[dict[str, Any]] = []
    concepts = named = 0
    for style in STYLES:
        root = packages[f"emoji-datasource-{style}"] / "package"
        table = _table(root / "emoji.json")
        concepts, named = len(table), sum(_plain(entry["unified"]) in words["en"] for entry in table)
        for row, picture in _pictures(root / "img" / style / "64", table, style, words):
            target = out / row["file"]
            target.parent.mkdir(parents=True, exist_ok=True)
            _check(picture)
            shutil.move(picture, target)
            rows.append(row)
    json_lines.write(out / "captions.jsonl", rows)
    counts: dict[str, Any] = {"concepts": concepts, "concepts_with_cldr_names": named}
    counts |= {style: sum(row["style"] == style and not row["skin"] for row in rows) for style in STYLES}
    counts |= {f"{style}_skins": sum(row["style"] == style for row in rows) - counts[style] for style in STYLES}
    counts |= {split: sum(row["split"] == split for row in rows) for split in SPLITS}
    return counts | {"categories": len({row["category"] for row in rows})}


def concept(code: str) -> str:
    """Return the part of an emoji's code that the pictures of one concept share."""
    parts = [part for part in code.split("-") if part != "FE0F" and int(part, 16) not in _TONES]
    if parts[0] in _PEOPLE and parts[1:2] == [_JOINER]:
        return "-".join(parts[1:])
    return code if int(parts[0], 16) in _FLAGS else parts[0]


def split_of(code: str) -> str:
    """Return the split of an emoji's concept: about 80, 10 and 10 %."""
    share = int.from_bytes(hashlib.sha256(concept(code).encode()).digest()[:4], "big") / 2**32
    return "validation" if share < 0.1 else "test" if share < 0.2 else "train"


def _table(path: Path) -> list[dict[str, Any]]:
    table = json_file.parse(json_file.contents(path, DataError), path.name, DataError)
    texts = ("unified", "name", "category", "subcategory")
    entries: list[Any] = table if isinstance(table, list) else [None]
    for entry in entries:
        whole = isinstance(entry, dict) and all(isinstance(entry.get(name), str) for name in texts)
        if not whole or not _CODE.fullmatch(entry["unified"]):
            raise DataError(f"{path.name}: {str(entry)[:60]!r} is not an emoji with unified, name, category")
    return entries


def _pictures(
    folder: Path, table: list[dict[str, Any]], style: str, words: Words
) -> Iterator[tuple[dict[str, Any], Path]]:
    """Yield (row, file) of every emoji and every skin variant that the style has."""
    for entry in table:
        variants = [{"unified": entry["unified"], **entry}, *entry.get("skin_variations", {}).values()]
        category = "_".join(re.findall(r"\w+", entry["category"].lower()))
        split = "train" if category == _ALONE else split_of(entry["unified"])
        for variant in variants:
            code = variant["unified"]
            if not _CODE.fullmatch(code) or not variant.get(f"has_img_{style}"):
                continue
            name = code.lower()
            folder_name = style if code == entry["unified"] else f"{style}_skins"
            row = {"file": f"{folder_name}/{split}/{category}/{name}.png", "style": style, "split": split}
            row |= {"category": category, "subcategory": entry["subcategory"]}
            yield row | _described(entry, code, words), folder / f"{name}.png"


def _described(entry: Mapping[str, Any], code: str, words: Words) -> dict[str, Any]:
    """Return an emoji's texts; a skin variant has the name of the emoji, a colon and its tones, as in CLDR."""
    base = _plain(entry["unified"])
    tones = [chr(int(part, 16)) for part in code.split("-") if int(part, 16) in _TONES and code != entry["unified"]]
    names, keywords = {}, {}
    for language, known in words.items():
        if base in known and all(tone in known for tone in tones):
            name, keywords[language] = known[base]
            names[language] = name + (": " + ", ".join(known[tone][0] for tone in tones) if tones else "")
    return {
        "emoji": "".join(chr(int(part, 16)) for part in code.split("-")),
        "code": code,
        "skin": [words["en"][tone][0] if tone in words["en"] else f"{ord(tone):X}" for tone in tones],
        "caption": names.get("en", entry["name"].lower()),
        "names": names,
        "keywords": keywords,
    }


def _annotations(root: Path, language: str) -> dict[str, tuple[str, list[str]]]:
    path = root / "package/annotations" / language / "annotations.json"
    table = json_file.read(path, DataError)
    try:
        known = {
            emoji.replace("\ufe0f", ""): (str(entry["tts"][0]), [str(word) for word in entry.get("default", [])])
            for emoji, entry in table["annotations"]["annotations"].items()
            if entry.get("tts")
        }
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{language}/annotations.json does not have CLDR's form ({type(error).__name__})") from None
    return known


def _plain(code: str) -> str:
    """Return an emoji's text without variation selectors."""
    return "".join(chr(int(part, 16)) for part in code.split("-") if part != "FE0F")


def _check(path: Path) -> None:
    """Raise DataError unless a file is a PNG of 64 × 64 pixels."""
    try:
        with path.open("rb") as file:
            head = file.read(24)
    except FileNotFoundError:
        raise DataError(f"the picture {path.name} is missing") from None
    if head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR" or struct.unpack(">II", head[16:]) != (SIZE, SIZE):
        raise DataError(f"{path.name} is not a PNG of {SIZE} × {SIZE} pixels")
