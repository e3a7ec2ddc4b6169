import numpy as np
import pytest

from fm_jax.core.errors import DataError
from fm_jax.data.images import scenes
from fm_jax.evals.baselines import boxes
from fm_jax.evals.scores import detection
from tests.close import close


def test_mean_boxes_are_shares_of_any_image_and_ignore_crowds() -> None:
    truths = [
        detection.truth(np.array([[0, 0, 10, 20], [0, 0, 99, 99]]), np.array([1, 1]), np.array([False, True])),
        detection.truth(np.array([[10, 0, 20, 40.0]]), np.array([1])),
    ]
    found = boxes.mean_boxes(truths, [(20, 10), (40, 20)])(np.zeros((100, 200, 3), np.uint8))
    close(found.boxes, np.array([[50.0, 0, 200, 100]]))  # (0 … 1 and 0.5 … 1) of 200 across
    assert found.labels.tolist() == [1] and found.scores.tolist() == [1.0]
    with pytest.raises(DataError, match="1 images without objects"):
        boxes.mean_boxes([detection.truth(np.zeros((0, 4)), np.zeros(0))], [(1, 1)])


def test_blobs_find_shapes_by_colour_and_most_kinds_by_how_they_fill_their_box() -> None:
    def split(name: str, count: int) -> list:
        source = scenes.Scenes(scenes.Config(), name, 48)
        drawn = [source.scene(index) for index in range(count)]
        return [(one.image, detection.truth(np.array([one.box]), np.array([one.kind]))) for one in drawn]

    train, test = split("train", 150), split("test", 60)
    blobs = boxes.fit_blobs(train)
    found = [blobs(image) for image, _ in test]
    truths = [true for _, true in test]
    hits = [
        len(one.boxes) and detection.overlaps(one.boxes, true.boxes).max() >= 0.75
        for one, true in zip(found, truths, strict=True)
    ]
    ap50 = detection.coco(truths, found, 6).summary()["ap50"]
    mean = boxes.mean_boxes([true for _, true in train], [(48, 48)] * 150)
    without = detection.coco(truths, [mean(image) for image, _ in test], 6).summary()["ap50"]
    assert np.mean(hits) > 0.7 and ap50 > 0.4 and without < ap50 / 2, (np.mean(hits), ap50, without)


def test_an_empty_scene_has_no_blobs() -> None:
    grey = np.full((32, 32, 3), 100, np.uint8)
    blobs = boxes.Blobs(60.0, np.zeros(1, int), np.ones(1), np.ones(1), np.ones(1))
    assert len(blobs(grey).boxes) == 0
    with pytest.raises(DataError, match="no object differs from the background by 60"):
        boxes.fit_blobs([(grey, detection.truth(np.zeros((0, 4)), np.zeros(0)))])
