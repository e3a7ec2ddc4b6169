"""Objects in Pascal VOC's XML: one file an image, corners in pixels that count from 1 and are both inside the box.

So the box 1, 1, 10, 6 covers an image of 10 × 6 pixels whole. A split is a list of names in `ImageSets/Main`, beside
`Annotations` and `JPEGImages`; or, as labelling programs write it, a folder of XML files with the images beside them.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from fm_jax.core import json_file
from fm_jax.core.errors import DataError, shown
from fm_jax.data import files as data_files
from fm_jax.data.boxes import files
from fm_jax.data.boxes.files import BoxFiles
from fm_jax.data.boxes.record import Faults, Found, Limits, Record, said
from fm_jax.data.images import image as images

MOST = 4 << 20  # bytes of an annotation file
_DIGITS = 9  # of a side in pixels
_FLAGS = ("-1", "0", "1")  # after the name of an image, in the list of a class


@dataclass(frozen=True)
class Config:
    """Pascal VOC's XML as the source of a run."""

    path: Path  # of a year (VOC2007), of several years (VOCdevkit), or of folders named after the splits
    splits: tuple[str, str, str] = ("train", "val", "test")  # lists or folders; VOC2007/trainval+VOC2012/trainval joins
    classes: tuple[str, ...] = ()  # by default the names in the training split, sorted


def read(path: Path, split: str, *, classes: Sequence[str] = (), classes_from: str = "", limits: Limits) -> BoxFiles:
    """Read the annotations of a split.

    Args:
        path: see `Config`.
        split: a list or a folder, or several joined by "+", each after the folder of its year if `path` has several.
        classes: names of the classes; by default those in `classes_from`, sorted.
        classes_from: the split whose classes are meant; by default this one.
        limits: what is refused.

    Raises:
        DataError: a split is missing, or too much is unusable.
    """
    faults = Faults(f"{path}/{split}")
    trees = _trees(path, split, faults)
    if not classes:
        first = trees if classes_from in ("", split) else _trees(path, classes_from, Faults(f"{path}/{classes_from}"))
        classes = sorted({_text(item, "name") for _, _, tree in first for item in tree.findall("object")} - {""})
    number = {name: label for label, name in enumerate(files.unique(list(classes), path))}
    records, paths = list[Record](), list[Path]()
    for file, folder, tree in trees:
        if (image := _image(tree, file, folder)) is None:
            faults.lose_image(f"missing in {folder}", f"that of {file.name}")
            continue
        if (size := _size(tree) or _stored(image)) is None:
            faults.lose_image("unreadable", str(image))
            continue
        faults.images += 1
        found = [each for item in tree.findall("object") if (each := _object(item, file, number, faults))]
        if not tree.findall("object"):
            faults.note("images without objects", file.name)
        records.append(Record(file.stem, size, faults.objects(found, size, len(number))))
        paths.append(image)
    return BoxFiles(faults, tuple(classes), records, paths, upright=False, limits=limits)


def parse(data: bytes, where: str) -> ElementTree.Element:
    """Return the tree of an XML file that declares nothing: entities could read other files, or grow without end.

    Raises:
        DataError: not XML, or with a document type, which is where entities are declared.
    """
    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()

    def refuse(*declared: Any) -> None:
        raise DataError(f"{where} has a document type declaration, which annotations do not need; remove it")

    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise DataError(f"{where} is not XML: {error}") from None
    return builder.close()


_Trees = list[tuple[Path, Path, ElementTree.Element]]  # annotation file, folder of its image, content


def _trees(path: Path, split: str, faults: Faults) -> _Trees:
    trees: _Trees = []
    seen: set[Path] = set()
    for part in split.split("+"):
        year, _, name = part.rpartition("/")
        for file, folder in _annotation_files(path / year, name):
            try:
                if file in seen:
                    faults.lose_image("named twice", file.name)
                    continue
                seen.add(file)
                trees.append((file, folder, parse(json_file.contents(file, DataError, most=MOST), str(file))))
            except DataError as error:
                faults.lose_image("with unreadable annotations", str(error))
    return trees


def _annotation_files(root: Path, split: str) -> list[tuple[Path, Path]]:
    """Return each annotation file of a split with the folder of its image."""
    listed = root / "ImageSets" / "Main" / f"{split}.txt"
    if listed.is_file():
        lines = json_file.contents(listed, DataError).decode("utf-8", "replace").splitlines()
        names = [_name(line) for line in lines if line.strip()]
        return [(root / "Annotations" / f"{name}.xml", root / "JPEGImages") for name in names]
    folder = data_files.folder_of(root, split)
    if not folder.is_dir():
        raise DataError(
            f"{root} has neither ImageSets/Main/{split}.txt nor a folder {split}; if the splits have other names, set "
            "data.source.splits"
        )
    return [(Path(file), Path(file).parent) for file, _ in data_files.walk(folder, (".xml",))]


def _name(line: str) -> str:
    """Return the image that a line names; the list of a class says -1, 0 or 1 after it."""
    words = line.split()
    name = words[0] if len(words) == 2 and words[1] in _FLAGS else line.strip()
    return os.path.basename(name.replace("\\", "/"))


def _image(tree: ElementTree.Element, file: Path, folder: Path) -> Path | None:
    """Return the image of an annotation file: the one that it names, or else the one with its own name."""
    named = files.inside(folder, _text(tree, "filename"))
    if named is not None and named.is_file():
        return named
    return next((one for end in files.IMAGES if (one := folder / f"{file.stem}{end}").is_file()), None)


def _object(item: ElementTree.Element, file: Path, labels: dict[str, int], faults: Faults) -> Found | None:
    name, box = _text(item, "name"), item.find("bndbox")
    where = f"{file.name}, object {shown(name)}"
    try:  # the parts of a person have boxes too, so only the object's own is read
        if box is None:
            raise ValueError
        left, top, right, bottom = (float(_text(box, side)) for side in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        faults.lose_box("without four numbers in bndbox", where)
        return None
    where = f"{where} at {left:g}, {top:g}, {right:g}, {bottom:g}"
    difficult = _text(item, "difficult") == "1"
    return Found(where, (left - 1, top - 1, right, bottom), labels.get(name, -1), difficult=difficult)


def _size(tree: ElementTree.Element) -> tuple[int, int] | None:
    """Return the height and width that an annotation says; some programs write zeros."""
    size = tree.find("size")
    texts = [_text(size, side) for side in ("height", "width")] if size is not None else []
    if not texts or not all(text.isdecimal() and len(text) <= _DIGITS for text in texts):
        return None
    return said(int(texts[0]), int(texts[1]))


def _stored(file: Path) -> tuple[int, int] | None:
    try:
        return images.size(file, upright=False)
    except DataError:
        return None


def _text(element: ElementTree.Element, name: str) -> str:
    """Return the text of a child that is directly below an element, "" without one."""
    return (element.findtext(name) or "").strip()
