import hashlib

import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.images import digits, photographs
from fm_jax.data.images.digits import Digits


def test_the_splits_are_all_images_and_no_image_twice() -> None:
    found = {split: Digits(split) for split in digits.SPLITS}
    assert [len(split) for split in found.values()] == [1123, 224, 450]
    hashes = [{hashlib.sha256(one[i][0].tobytes()).hexdigest() for i in range(len(one))} for one in found.values()]
    assert len(hashes[0] | hashes[1] | hashes[2]) == sum(map(len, hashes)) == 1797


def test_every_split_has_the_classes_in_the_same_shares() -> None:
    labels = digits.load()[1]
    for split, share in zip(digits.SPLITS, digits.SHARES, strict=True):
        found = Digits(split)
        counts = np.bincount([found[i][1] for i in range(len(found))])
        assert np.abs(counts - share * np.bincount(labels)).max() <= 1


def test_a_picture_is_the_digit_in_all_its_greys() -> None:
    test = Digits("test")
    image, label = test[7]
    images, labels = digits.load()
    row = int(test.id(7))
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8 and label == labels[row]
    assert np.array_equal(image[..., 0], images[row]) and np.array_equal(image[..., 0], image[..., 2])
    assert len(np.unique(images)) == 17 and images.max() == 255


def test_equal_images_share_a_split() -> None:
    images = np.repeat(np.arange(40, dtype=np.uint8)[:, None, None], 3, axis=0)  # each three times
    split = digits.rows(images, np.repeat([0, 1], 60))
    kinds = [set(images[part].ravel().tolist()) for part in split]
    assert sum(map(len, kinds)) == 40 and sorted(np.concatenate(split)) == list(range(120))


def test_another_seed_divides_otherwise() -> None:
    assert not np.array_equal(Digits("test").rows, Digits("test", seed=1).rows)
    assert Digits("test").fingerprint == Digits("test").fingerprint != Digits("test", seed=1).fingerprint


def test_an_unknown_split_or_photograph_is_refused() -> None:
    with pytest.raises(DataError, match="no split 'dev'"):
        Digits("dev")
    with pytest.raises(ConfigError, match="no photograph 'cat'; choose china or flower"):
        photographs.load("cat")


@pytest.mark.parametrize("name", photographs.NAMES)
def test_a_photograph_is_there(name: str) -> None:
    image = photographs.load(name)
    assert image.shape == (427, 640, 3) and image.dtype == np.uint8 and image.std() > 30
