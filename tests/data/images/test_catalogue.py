"""A small set of tensorflow-datasets, built here as ArrayRecord, that opens by its name alone."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from fm_jax.core.errors import DataError
from fm_jax.data.images.catalogue import CatalogueImages
from fm_jax.data.python_docs import dataset

with tfds.core.registered.skip_registration():

    class FewImages(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(None, None, 3)),
                        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
                        "number": np.int64,
                    }
                )
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples(10)}

        def _generate_examples(self, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
            for i in range(count):
                held = io.BytesIO()
                Image.new("L" if i == 3 else "RGB", (7, 5), 20 * i if i == 3 else (20 * i,) * 3).save(held, "PNG")
                file = held.getvalue() if i != 4 else b"broken"
                yield i, {"image": file, "label": i % 2, "number": i}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalogue")
    with dataset._quiet():
        FewImages(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_images_open_by_name_and_are_decoded_by_our_rules(prepared: Path) -> None:
    found = CatalogueImages("few_images", "train", prepared)
    assert found.classes == ("cat", "dog") and len(found) == 10 and found.name == "few_images/train"
    seen = {}
    for i in range(10):
        try:
            image, label = found[i]
        except DataError as error:
            assert str(error).startswith(f"record {i}: not an image in JPEG")
            continue
        assert image.shape == (5, 7, 3) and image.dtype == np.uint8 and (image == image[0, 0, 0]).all()
        seen[int(image[0, 0, 0]) // 20] = label
    assert seen == {i: i % 2 for i in range(10) if i != 4}


def test_slices_are_splits_of_their_own(prepared: Path) -> None:
    halves = [CatalogueImages("few_images", split, prepared) for split in ("train[:70%]", "train[70%:]")]
    assert [len(half) for half in halves] == [7, 3] and halves[0].fingerprint != halves[1].fingerprint


def test_what_is_not_there_is_named(prepared: Path) -> None:
    with pytest.raises(DataError, match=r"few_images has no field 'photo'; it has .*image"):
        CatalogueImages("few_images", "train", prepared, image="photo")
    with pytest.raises(DataError, match=r"field 'number' of few_images has no class names"):
        CatalogueImages("few_images", "train", prepared, label="number")
    with pytest.raises(DataError, match=r"cannot open split 'test' of few_images \(it has train\)"):
        CatalogueImages("few_images", "test", prepared)
    with pytest.raises(DataError, match=r"cifar10 is not prepared under .*; set download to true"):
        CatalogueImages("cifar10", "train", prepared)
