"""Objects in YOLO's folders: a text file an image, a line an object: class, centre x and y, width and height.

Numbers are fractions of the image's sides, after its EXIF orientation; classes count from 0. A line with more than four
numbers after the class is a polygon, of which the box around it is taken. An empty or missing file means no objects.

    data.yaml              names of the classes, and where each split is: a folder, several, or a list of images
    images/train/a.jpg     its objects are in labels/train/a.txt: the last folder `images` is replaced
    train/images/a.jpg     likewise; an image without a folder `images` above it has its text file beside it
    classes.txt            without data.yaml: the names, a line each (also obj.names, *.names)
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fm_jax.core import json_file
from fm_jax.core.errors import DataError, shown
from fm_jax.data import files as data_files
from fm_jax.data.boxes import files
from fm_jax.data.boxes.files import BoxFiles
from fm_jax.data.boxes.record import Faults, Found, Limits, Record
from fm_jax.data.images import image as images

_NAMES = ("classes.txt", "obj.names")


@dataclass(frozen=True)
class Config:
    """YOLO's folders as the source of a run."""

    path: Path  # the folder with data.yaml or classes.txt, or a YAML file
    splits: tuple[str, str, str] = ("train", "val", "test")  # keys of data.yaml, or folders


def read(path: Path, split: str, *, limits: Limits) -> BoxFiles:
    """Read the labels of a split; sizes come from the headers of the images.

    Raises:
        DataError: no names of classes, a split is missing, or too much is unusable (see `BoxFiles`).
    """
    root, told = _described(path)
    classes = _classes(root, told)
    faults = Faults(f"{path}/{split}")
    records, paths, seen = list[Record](), list[Path](), set[Path]()
    for file in _images(root, told, split):
        if file in seen:
            faults.lose_image("named twice", str(file))
            continue
        seen.add(file)
        if not file.is_file():
            faults.lose_image("missing", str(file))
            continue
        try:
            size = images.size(file)
        except DataError:
            faults.lose_image("unreadable", str(file))
            continue
        faults.images += 1
        found = list(_objects(label_file(file), size, faults))
        if not found:
            faults.note("images without objects", file.name)
        records.append(Record(file.stem, size, faults.objects(found, size, len(classes))))
        paths.append(file)
    return BoxFiles(faults, classes, records, paths, upright=True, limits=limits)


def label_file(image: Path) -> Path:
    """Return the text file of an image: the last folder `images` of its path is replaced by `labels`."""
    parts = list(image.parts)
    for place in reversed(range(len(parts) - 1)):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _described(path: Path) -> tuple[Path, Mapping[str, Any]]:
    """Return the folder that paths are relative to, and what data.yaml says, if there is one."""
    file = path if path.suffix in (".yaml", ".yml") else None
    if file is None:
        file = next((path / name for name in ("data.yaml", "data.yml") if (path / name).is_file()), None)
    if file is None:
        if not path.is_dir():
            raise DataError(f"{path} is not a folder; give the one with data.yaml or classes.txt")
        return path, {}
    import yaml  # type: ignore[import-untyped]  # it comes with flax

    try:
        told = yaml.safe_load(json_file.contents(file, DataError, most=1 << 20))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{file} is not YAML: {str(error).splitlines()[0][:160]}") from None
    if not isinstance(told, dict):
        raise DataError(f"{file} has no names and splits")
    base = told.get("path")
    root = file.parent / base if isinstance(base, str) else file.parent
    return (root if root.is_dir() else file.parent), told


def _classes(root: Path, told: Mapping[str, Any]) -> tuple[str, ...]:
    names = told.get("names")
    if isinstance(names, dict):  # {0: person, 1: bicycle}: every number from 0
        if set(names) != set(range(len(names))):
            raise DataError(f"{root}: names must be numbered from 0 without gaps, not {shown(sorted(map(str, names)))}")
        names = [names[number] for number in range(len(names))]
    if names is None:
        held = [root / name for name in _NAMES if (root / name).is_file()] or sorted(root.glob("*.names"))
        if not held:
            raise DataError(f"{root} has no names of classes: write data.yaml, or classes.txt with a name a line")
        text = json_file.contents(held[0], DataError).decode("utf-8-sig", "replace")
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not isinstance(names, list) or not names:
        raise DataError(f"{root}: names must be a list of the classes, not {shown(names)}")
    return files.unique([str(name) for name in names], root)


def _images(root: Path, told: Mapping[str, Any], split: str) -> Iterator[Path]:
    """Yield the image files of a split."""
    given = told.get(split)
    if given is None and told:
        known = ", ".join(name for name in told if any(name in names for names in data_files.CALLED.values()))
        raise DataError(f"{root}: data.yaml has no {split!r} (it has {known or 'no splits'}); set data.source.splits")
    if given is None:
        inner, outer = (data_files.folder_of(root / "images", split), data_files.folder_of(root, split))
        given = str(inner if inner.is_dir() else outer)
        if not Path(given).is_dir():
            raise DataError(f"{root} has neither images/{split} nor {split}; set data.source.splits")
    for place in given if isinstance(given, list) else [given]:
        if not isinstance(place, str):
            raise DataError(f"{root}: the place of {split!r} must be a folder or a list of images, not {shown(place)}")
        where = root / place
        if not where.exists() and place.startswith("../"):  # exported so by Roboflow, relative to another folder
            where = root / place.removeprefix("../")
        if where.is_dir():
            yield from (Path(file) for file, _ in data_files.walk(where, files.IMAGES))
        else:
            text = json_file.contents(where, DataError, most=256 << 20).decode("utf-8-sig", "surrogateescape")
            yield from (root / line.strip() for line in text.splitlines() if line.strip())


def _objects(file: Path, size: tuple[int, int], faults: Faults) -> Iterator[Found]:
    """Yield the objects of a text file; count lines that cannot be read."""
    if not file.is_file():
        return
    height, width = size
    text = json_file.contents(file, DataError).decode("utf-8-sig", "replace")
    seen: set[tuple[str, ...]] = set()
    for number, line in enumerate(text.splitlines(), 1):
        if not (words := tuple(line.split())):
            continue
        where = f"{file}:{number}"
        try:
            label, *numbers = (float(word) for word in words)
        except ValueError:
            faults.lose_box("not numbers", where)
            continue
        if len(numbers) == 4:
            x, y, across, down = numbers
            sides = (x - across / 2, y - down / 2, x + across / 2, y + down / 2)
        elif len(numbers) >= 6 and len(numbers) % 2 == 0:
            sides = (min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2]))
            if not all(map(math.isfinite, numbers)):  # of which min and max may take no notice
                sides = (math.nan,) * 4
        else:
            faults.lose_box(f"{len(numbers)} numbers after the class, neither a box nor a polygon", where)
            continue
        if words in seen:
            faults.lose_box("there twice", where)
            continue
        seen.add(words)
        box = tuple(side * of for side, of in zip(sides, (width, height, width, height), strict=True))
        yield Found(f"{where} ({' '.join(words)[:60]})", box, int(label) if label.is_integer() else -1)
