"""Small sets of images with boxes, written in the forms that people have."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BOX = (2.0, 1.0, 7.0, 5.0)  # of the one object in an image of 10 × 6 pixels
ORIENTATION = 0x0112


def image(path: Path, width: int = 10, height: int = 6, *, orientation: int = 1) -> Path:
    """Write an image that shows nothing, stored with these sides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path, exif=exif)
    return path


def annotation(number: int = 1, owner: Any = 7, **other: Any) -> dict[str, Any]:
    left, top, right, bottom = BOX
    box = [left, top, right - left, bottom - top]
    return {"id": number, "image_id": owner, "category_id": 9, "bbox": box, "area": 11.5, "iscrowd": 0} | other


def coco(root: Path, annotations: Sequence[Any], images: Sequence[Any] = (), **other: Any) -> Path:
    """Write COCO's JSON; without `images`, of one image with id 7 that is written too."""
    if not images:
        image(root / "photos" / "a.png")
        images = [{"id": 7, "file_name": "a.png", "width": 10, "height": 6}]
    categories = [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}]
    data = {"info": {"year": 2017}, "images": images, "annotations": annotations, "categories": categories} | other
    file = root / "boxes.json"
    file.write_text(json.dumps(data))
    return file


def voc_object(name: str = "dog", corners: Sequence[Any] = (3, 2, 7, 5), more: str = "") -> str:
    sides = "".join(f"<{side}>{x}</{side}>" for side, x in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{sides}</bndbox></object>"


def voc(root: Path, objects: Mapping[str, str], split: str = "train", *, size: str = "") -> Path:
    """Write Pascal VOC's folders with an image for every name."""
    for name, text in objects.items():
        image(root / "JPEGImages" / f"{name}.png")
        size = size or "<size><width>10</width><height>6</height><depth>3</depth></size>"
        (root / "Annotations").mkdir(exist_ok=True)
        body = f"<annotation><filename>{name}.png</filename>{size}{text}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(body)
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in objects))
    return root


def yolo(root: Path, labels: Mapping[str, str | None], split: str = "train") -> Path:
    """Write YOLO's folders with an image for every name, and a text file unless its text is None."""
    (root / "labels" / split).mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("cat\ndog\n")
    for name, text in labels.items():
        image(root / "images" / split / f"{name}.png")
        if text is not None:
            (root / "labels" / split / f"{name}.txt").write_text(text)
    return root
