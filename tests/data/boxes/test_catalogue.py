"""A small set of tensorflow-datasets with boxes, built here as ArrayRecord, that opens by its name alone."""

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.boxes import catalogue
from fm_jax.data.boxes.catalogue import CatalogueBoxes, Config
from fm_jax.data.boxes.record import Limits
from fm_jax.data.catalogue import open_split
from fm_jax.data.python_docs import dataset
from tests.close import close
from tests.data.boxes.written import BOX

LENIENT = Limits(max_bad=0.5)


def encoded() -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (10, 6)).save(held, "PNG")
    return held.getvalue()


def made(name: str, first: float) -> Any:
    """Return a builder whose boxes are fractions of corners that count from `first`."""
    left, top, right, bottom = BOX
    good = tfds.features.BBox((top + first) / 6, (left + first) / 10, bottom / 6, right / 10)
    flat = tfds.features.BBox(0.5, 0.5, 0.5, 0.7)

    def info(self: Any) -> Any:
        objects = {
            "bbox": tfds.features.BBoxFeature(),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            "area": np.int64,
            "is_crowd": np.bool_,
        }
        fields = {"image": tfds.features.Image(shape=(None, None, 3)), "image/id": np.int64}
        fields["objects"] = tfds.features.Sequence(objects)
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(fields))

    def examples(self: Any, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(count):
            boxes = [good, flat] if i == 2 and not first else [good] if i else []
            objects = [{"bbox": box, "label": 1, "area": 12, "is_crowd": i == 1} for box in boxes]
            yield i, {"image": encoded(), "image/id": 100 + i, "objects": objects}

    body = {
        "VERSION": tfds.core.Version("1.0.0"),
        "_info": info,
        "_split_generators": lambda self, manager: {"train": self._generate_examples(4)},
        "_generate_examples": examples,
        "__module__": __name__,
    }
    with tfds.core.registered.skip_registration():
        return type(name, (tfds.core.GeneratorBasedBuilder,), body)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalogue")
    with dataset._quiet():
        for name, first in (("FewBoxes", 0.0), ("LikeVoc", 1.0)):
            made(name, first)(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.mark.parametrize("name", ["few_boxes", "voc/2007"])
def test_boxes_are_in_pixels_and_those_of_pascal_voc_count_from_one(
    name: str, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = {"few_boxes": "few_boxes", "voc/2007": "like_voc"}  # the real one cannot be downloaded here
    monkeypatch.setattr(catalogue, "open_split", lambda given, *rest, **more: open_split(called[given], *rest, **more))
    found = CatalogueBoxes(name, "train", prepared, limits=LENIENT)
    assert found.classes == ("cat", "dog") and len(found) == 4
    rows = {found.id(i): found[i] for i in range(4)}
    for number in ("101", "102", "103"):
        image, objects = rows[number]
        assert image.shape == (6, 10, 3)
        close(objects.boxes, np.array([BOX]), 1e-6)
        assert objects.area.tolist() == [12] and objects.crowd.tolist() == [number == "101"]
    assert rows["100"][1].boxes.shape == (0, 4)
    first = found.record(0)
    assert first.size == (6, 10) and str(first.id) == found.id(0)


def test_a_wrong_box_is_left_out_once_and_refused_if_there_are_many(
    prepared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = CatalogueBoxes("few_boxes", "train", prepared, limits=LENIENT)
    with caplog.at_level(logging.WARNING):
        for i in [*range(4), *range(4)]:
            found[i]
    assert caplog.text.count("1 of 2 boxes cannot be used (1 without area: object 1), and are left out; 1 such") == 1
    strict = CatalogueBoxes("few_boxes", "train", prepared, limits=Limits())
    with pytest.raises(DataError, match=r"1 of 4 records have boxes that cannot be used, more than max_bad 0\.01"):
        for i in range(4):
            strict[i]


def test_a_set_without_boxes_is_refused() -> None:
    with pytest.raises(ConfigError, match="such as voc/2007, not empty"):
        Config("")
