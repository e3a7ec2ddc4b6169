"""Objects in COCO's JSON: boxes as [left, top, width, height], categories by number with gaps, crowds, areas of masks.

Boxes and sizes belong to the image as it is stored, before its EXIF orientation. Classes are the categories by
ascending number. Images without objects are kept: they show the detector what is none.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fm_jax.core import json_file
from fm_jax.core.errors import DataError, as_json, shown
from fm_jax.data.boxes import files
from fm_jax.data.boxes.files import BoxFiles
from fm_jax.data.boxes.record import Annotated, Faults, Found, Limits, Record, said
from fm_jax.data.images import image as images

MOST = 4 << 30  # bytes of an annotation file; that of COCO's training images has 450 million
_LISTS = ("images", "annotations", "categories")
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Config:
    """COCO's JSON as the source of a run; the defaults are COCO 2017, whose test images have no public boxes."""

    path: Path  # the paths below are relative to it
    annotations: tuple[str, str, str] = (
        "annotations/instances_train2017.json",
        "annotations/instances_val2017.json",
        "annotations/instances_val2017.json",
    )  # of training, validation and test
    images: tuple[str, str, str] = ("train2017", "val2017", "val2017")  # their folders of images


class CocoBoxes(BoxFiles):
    """One split of COCO's JSON."""

    categories: tuple[int, ...]
    """The data set's number of each class, for results."""


def read(annotations: Path, folder: Path, *, limits: Limits) -> CocoBoxes:
    """Read an annotation file, and find its images in a folder.

    Raises:
        DataError: not COCO's JSON, two categories of one number or name, or too much is unusable (see `BoxFiles`).
    """
    parts: dict[str, list[Any]] = {name: [] for name in _LISTS}
    for name, item in items(annotations):
        if not isinstance(item, dict):
            raise DataError(f"{annotations}: {name} has {shown(item)}, not an object")
        parts[name].append({key: value for key, value in item.items() if key != "segmentation"})  # most of the file
    numbers, classes = _categories(parts["categories"], annotations)
    faults = Faults(str(annotations))
    found = _found(parts["annotations"], {number: label for label, number in enumerate(numbers)}, faults)
    records, paths, seen = list[Record](), list[Path](), set[Any]()
    for entry in parts["images"]:
        number, name = entry.get("id"), entry.get("file_name")
        where = f"image {shown(number)} ({shown(name)})"
        path = files.inside(folder, name) if isinstance(name, str) else None
        if type(number) not in (int, str) or path is None:
            faults.lose_image("without an id or with no file name in the folder", where)
        elif number in seen:
            faults.lose_image("with an id that another has", where)
        elif not path.is_file():
            faults.lose_image(f"missing in {folder}", where)
        elif (size := _size(entry, path)) is None:
            faults.lose_image("unreadable", where)
        else:
            faults.images += 1
            mine = found.pop(number, [])
            if not mine:
                faults.note("images without objects", where)
            records.append(Record(number, size, faults.objects(mine, size, len(classes))))
            paths.append(path)
        if type(number) in (int, str):
            seen.add(number)
    for number, lost in found.items():
        if number not in seen:
            for each in lost:
                faults.lose_box("of an image that is not listed", each.where)
    source = CocoBoxes(faults, classes, records, paths, upright=False, limits=limits)
    source.categories = numbers
    return source


def items(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield (list, item) of the three lists in an annotation file, one item at a time.

    Raises:
        DataError: missing, not JSON, not one object, or without one of the lists.
    """
    try:
        text = json_file.contents(file, DataError, most=MOST).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not JSON: it is not UTF-8 text (byte {error.start})") from None
    decode, seen, place = json_file.decoder().raw_decode, set[str](), ""

    def skip(at: int) -> int:
        space = _SPACE.match(text, at)
        return space.end() if space else at

    def expect(mark: str, at: int) -> int:
        if (at := skip(at)) >= len(text) or text[at] not in mark:
            raise ValueError(f"expected {' or '.join(mark)} at character {at}")
        return at

    try:
        at = skip(expect("{", 0) + 1)
        while text[at - 1] != "}":
            name, at = decode(text, skip(at))
            if not isinstance(name, str) or name in seen:
                raise ValueError(f"the key {shown(name)} {'occurs twice' if name in seen else 'is no text'}")
            seen.add(name)
            at = skip(expect(":", at) + 1)
            if name not in _LISTS:
                _, at = decode(text, at)
            elif text[skip(expect("[", at) + 1)] == "]":
                at = skip(at + 1) + 1
            else:
                for number in itertools.count():
                    place = f", in {name}[{number}]"
                    item, at = decode(text, skip(at + 1))
                    yield name, item
                    if text[at := expect(",]", at)] == "]":
                        break
                at += 1
            place = ""
            at = expect(",}", at) + 1
        if text[at:].strip():
            raise ValueError(f"there is more after the end, at character {at}")
    except (ValueError, IndexError, RecursionError) as error:
        raise DataError(f"{file} is not JSON, or truncated: {str(error)[:160]}{place}") from None
    if lacking := [name for name in _LISTS if name not in seen]:
        raise DataError(f"{file} is not COCO's JSON: it has no list {lacking[0]!r}")


def as_json_data(source: Annotated, categories: tuple[int, ...] = ()) -> dict[str, Any]:
    """Return a split in COCO's form, the inverse of `read`: for COCO's own scorer, or to write a file.

    Args:
        source: objects of any form.
        categories: number of each class; by default they count from 1, as in COCO.
    """
    categories = categories or tuple(range(1, len(source.classes) + 1))
    entries, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for index in range(len(source)):
        record = source.record(index)
        height, width = record.size
        entries.append({"id": record.id, "file_name": source.id(index), "height": height, "width": width})
        for box, label, area, crowd, _ in zip(*(column.tolist() for column in record.objects), strict=True):
            left, top, right, bottom = box
            one = {"id": len(annotations) + 1, "image_id": record.id, "category_id": categories[label]}
            annotations.append(
                one | {"bbox": [left, top, right - left, bottom - top], "area": area, "iscrowd": int(crowd)}
            )
    names = [{"id": number, "name": name} for number, name in zip(categories, source.classes, strict=True)]
    return {"images": entries, "annotations": annotations, "categories": names}


def _categories(entries: list[dict[str, Any]], file: Path) -> tuple[tuple[int, ...], tuple[str, ...]]:
    names: dict[int, str] = {}
    for entry in entries:
        number, name = entry.get("id"), entry.get("name")
        if type(number) is not int or not isinstance(name, str):
            raise DataError(f"{file}: a category needs a whole number as id and a name, not {as_json(entry)}")
        if number in names:
            raise DataError(f"{file}: the categories {names[number]!r} and {name!r} have the same id {number}")
        names[number] = name
    numbers = tuple(sorted(names))
    return numbers, files.unique([names[number] for number in numbers], file)


def _found(entries: list[dict[str, Any]], labels: Mapping[int, int], faults: Faults) -> dict[Any, list[Found]]:
    """Return the objects of each image id; the label of an unknown category is -1."""
    found, seen = defaultdict[Any, list[Found]](list), set[Any]()
    for place, entry in enumerate(entries):
        number, box, category, owner = (entry.get(name) for name in ("id", "bbox", "category_id", "image_id"))
        where = f"annotation {shown(number) if number is not None else f'at place {place}'} of image {shown(owner)}"
        if not (isinstance(box, list) and len(box) == 4 and all(type(side) in (int, float) for side in box)):
            faults.lose_box("without four numbers as bbox", where)
        elif type(owner) not in (int, str):
            faults.lose_box("of an image that is not listed", where)
        elif type(number) in (int, str) and number in seen:
            faults.lose_box("with an id that another has", where)
        else:
            left, top, width, height = map(float, box)
            label = labels.get(category, -1) if type(category) is int else -1
            area, crowd = entry.get("area"), entry.get("iscrowd") in (1, True)
            known = float(area) if isinstance(area, int | float) and not isinstance(area, bool) else None
            where = f"{where}, category {shown(category)}" if label < 0 else f"{where}, bbox {shown(box)}"
            found[owner].append(Found(where, (left, top, left + width, top + height), label, known, crowd))
        if type(number) in (int, str):
            seen.add(number)
    return found


def _size(entry: Mapping[str, Any], file: Path) -> tuple[int, int] | None:
    """Return the height and width that an entry says, or else those of the file as it is stored."""
    height, width = entry.get("height"), entry.get("width")
    if type(height) is int and type(width) is int and (sides := said(height, width)):
        return sides
    try:
        return images.size(file, upright=False)
    except DataError:
        return None
