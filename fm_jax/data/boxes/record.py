"""Objects in images, in one form whatever the file they came from; what cannot be right is counted and named.

A box is (left, top, right, bottom) in pixels between pixels: see `data/images/geometry.py`. Classes count from 0 and
have no background. Crowds are regions of many objects (COCO), difficult ones need not be found (Pascal VOC).
"""

import hashlib
import itertools
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from fm_jax.core.errors import DataError, shown
from fm_jax.data.images.image import MAX_PIXELS, MOST_PIXELS
from fm_jax.data.images.pictures import Pictures

_log = logging.getLogger(__name__)
_SHOWN = 3  # cases of a kind that a message names
_ROUNDING = 1.0  # pixels by which a box may pass the edge: fractions of a side and 1-based pixels are rounded so


class Objects(NamedTuple):
    """The objects of one image."""

    boxes: np.ndarray  # float32 [N, 4], inside the image
    labels: np.ndarray  # int32 [N]
    area: np.ndarray  # float32 [N], of the object where the data says it, else of its box
    crowd: np.ndarray  # bool [N]
    difficult: np.ndarray  # bool [N]


class Found(NamedTuple):
    """An object as a file gives it, unchecked."""

    where: str  # how messages name it
    box: Sequence[float]  # left, top, right, bottom
    label: int
    area: float | None = None
    crowd: bool = False
    difficult: bool = False


@dataclass(frozen=True)
class Limits:
    """What a reader refuses."""

    max_pixels: int = MAX_PIXELS  # of an image, height × width
    max_bad: float = 0.01  # share of images, and of boxes, that may be unusable


@dataclass(frozen=True)
class Record:
    """What is known of one image without its pixels."""

    id: int | str  # the data set's name of the image
    size: tuple[int, int]  # height and width, to which the boxes belong
    objects: Objects


class Annotated(Pictures[Objects], Protocol):
    """Images whose target is the objects in them."""

    classes: tuple[str, ...]

    def record(self, index: int) -> Record:
        """Return what is known of an image: for scoring, and without its pixels where the data allows."""
        ...


class Faults:
    """Counts what is wrong with the annotations of a split, and names the first cases of each kind."""

    def __init__(self, name: str) -> None:
        self.name, self.boxes, self.images = name, 0, 0
        self.lost: dict[str, dict[str, list[str]]] = {"boxes": {}, "images": {}}
        """Kind -> its cases, of what is left out."""
        self.kept: dict[str, list[str]] = {}
        """Kind -> its cases, of what is used but may be wrong."""

    def lose_box(self, kind: str, where: str) -> None:
        """Count a box that is left out."""
        self.boxes += 1
        self.lost["boxes"].setdefault(kind, []).append(where)

    def lose_image(self, kind: str, where: str) -> None:
        """Count an image that is left out."""
        self.images += 1
        self.lost["images"].setdefault(kind, []).append(where)

    def note(self, kind: str, where: str) -> None:
        """Count something that is used as it is."""
        self.kept.setdefault(kind, []).append(where)

    def objects(self, found: Iterable[Found], size: tuple[int, int], classes: int) -> Objects:
        """Return the objects that can be used, clipped to an image of `size` (height, width); count all others."""
        height, width = size
        good: list[tuple[tuple[float, ...], Found, float]] = []
        for each in found:
            left, top, right, bottom = each.box
            inner = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
            if not all(map(math.isfinite, each.box)):
                self.lose_box("not finite", each.where)
            elif not (isinstance(each.label, int) and 0 <= each.label < classes):
                self.lose_box("unknown class", each.where)
            elif right <= left or bottom <= top:
                self.lose_box("without area", each.where)
            elif inner[2] <= inner[0] or inner[3] <= inner[1]:
                self.lose_box("outside the image", each.where)
            elif np.float32(inner[2]) <= np.float32(inner[0]) or np.float32(inner[3]) <= np.float32(inner[1]):
                self.lose_box("without area", each.where)  # as it would be kept
            else:
                self.boxes += 1
                if max(abs(a - b) for a, b in zip(inner, each.box, strict=True)) > _ROUNDING:
                    self.note("boxes reach beyond the image and are clipped", each.where)
                own = each.area is not None and math.isfinite(each.area) and each.area > 0
                good.append((inner, each, float(each.area or 0) if own else _area(inner)))
        return Objects(
            np.array([box for box, _, _ in good], np.float32).reshape(-1, 4),
            np.array([each.label for _, each, _ in good], np.int32),
            np.array([area for _, _, area in good], np.float32),
            np.array([each.crowd for _, each, _ in good], bool),
            np.array([each.difficult for _, each, _ in good], bool),
        )

    def summary(self, what: Literal["boxes", "images"]) -> str:
        """Return in words what is left out, "" if all can be used."""
        kinds = self.lost[what]
        if not (count := sum(map(len, kinds.values()))):
            return ""
        return f"{self.name}: {count:,} of {self._total(what):,} {what} cannot be used ({_listed(kinds)})"

    def _total(self, what: str) -> int:
        return self.boxes if what == "boxes" else self.images

    def settle(self, max_bad: float) -> None:
        """Log what was found.

        Raises:
            DataError: a larger share than `max_bad` of the boxes or of the images cannot be used.
        """
        both: tuple[Literal["images"], Literal["boxes"]] = ("images", "boxes")
        for what in both:
            if not (text := self.summary(what)):
                continue
            if sum(map(len, self.lost[what].values())) > max_bad * self._total(what):
                raise DataError(f"{text}, more than max_bad {max_bad:g} allows; mend them, or raise data.max_bad")
            _log.warning("%s, and are left out", text)
        for kind, cases in self.kept.items():
            _log.info("%s: %s", self.name, _listed({kind: cases}))


class Table:
    """Records in a few flat arrays: a million boxes go to a reading process at once, not one by one."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.ids = [record.id for record in records]
        self.sizes = np.array([record.size for record in records], np.int32).reshape(-1, 2)
        counts = [len(record.objects.labels) for record in records]
        self._ends = np.array([0, *itertools.accumulate(counts)], np.int64)
        columns = zip(*(record.objects for record in records), strict=True)
        self._columns = Objects(*map(np.concatenate, columns)) if records else none()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self.ids):
            raise IndexError(index)
        rows = slice(self._ends[index], self._ends[index + 1])
        height, width = self.sizes[index].tolist()
        return Record(self.ids[index], (height, width), Objects(*(column[rows] for column in self._columns)))

    def digest(self) -> str:
        """Return a hash of all records."""
        digest = hashlib.sha256(repr(self.ids).encode("utf-8", "surrogateescape"))
        for column in (self.sizes, self._ends, *self._columns):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()[:16]


def none() -> Objects:
    """Return the objects of an image without any."""
    return Faults("").objects((), (1, 1), 0)


def chosen(objects: Objects, rows: np.ndarray) -> Objects:
    """Return some of the objects, by a bool array or indices."""
    return Objects(*(column[rows] for column in objects))


def said(height: int, width: int) -> tuple[int, int] | None:
    """Return the sides that an annotation says of its image; None where no image that can be read has such."""
    return (height, width) if min(height, width) > 0 and height * width <= MOST_PIXELS else None


def same_classes(first: Annotated, other: Annotated) -> None:
    """Refuse two splits that number their classes differently.

    Raises:
        DataError: it names the first class that differs.
    """
    for number, pair in enumerate(itertools.zip_longest(first.classes, other.classes)):
        if pair[0] != pair[1]:
            one, two = ("nothing" if name is None else shown(name) for name in pair)
            raise DataError(f"class {number} is {one} in {first.name}, but {two} in {other.name}; use one list of them")


def _area(box: tuple[float, ...]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _listed(kinds: dict[str, list[str]]) -> str:
    def first(cases: list[str]) -> str:
        return ", ".join(cases[:_SHOWN]) + (", …" if len(cases) > _SHOWN else "")

    return "; ".join(f"{len(cases):,} {kind}: {first(cases)}" for kind, cases in kinds.items())
