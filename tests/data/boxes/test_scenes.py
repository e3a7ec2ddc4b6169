from collections import Counter

import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.boxes.scenes import Config, Scenes

SCENES = Scenes(Config(), "train")


def test_boxes_are_around_what_is_drawn_and_inside_the_image() -> None:
    for index in range(40):
        image, objects, owner = SCENES.scene(index)
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        assert (objects.boxes >= 0).all() and (objects.boxes <= 64).all()
        for number, box in enumerate(objects.boxes):
            rows, columns = np.nonzero(owner == number + 1)
            assert len(rows)
            left, top, right, bottom = box
            assert (columns >= left).all() and (columns < right).all() and (rows >= top).all() and (rows < bottom).all()
        last = owner == len(objects.labels)  # nothing hides it: its box is as tight as half-covered pixels can tell
        rows, columns = np.nonzero(last)
        tight = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert np.abs(tight - objects.boxes[-1]).max() <= 2


def test_there_are_one_to_three_objects_of_every_class_and_few_overlap() -> None:
    all_objects = [SCENES[i][1] for i in range(120)]
    counts = Counter(len(objects.labels) for objects in all_objects)
    assert set(counts) == {1, 2, 3} and min(counts.values()) > 20
    assert set(np.concatenate([objects.labels for objects in all_objects])) == {0, 1, 2, 3}
    for objects in all_objects:
        for a in range(len(objects.boxes)):
            for b in range(a):
                one, two = objects.boxes[a], objects.boxes[b]
                sides = np.minimum(one[2:], two[2:]) - np.maximum(one[:2], two[:2])
                assert np.prod(np.maximum(sides, 0)) <= 0.2 * min(objects.area[a], objects.area[b]) + 1e-3


def test_a_scene_depends_on_seed_split_and_index_only() -> None:
    again, other = Scenes(Config(), "train"), Scenes(Config(seed=1), "train")
    assert np.array_equal(again[5][0], SCENES[5][0]) and not np.array_equal(other[5][0], SCENES[5][0])
    assert not np.array_equal(Scenes(Config(), "test")[5][0], SCENES[5][0])
    assert SCENES.record(5).objects.boxes.tolist() == SCENES[5][1].boxes.tolist()
    assert SCENES.record(5).size == (64, 64) and SCENES.id(5) == "5"
    assert len({SCENES.fingerprint, other.fingerprint, Scenes(Config(), "test").fingerprint}) == 3
    with pytest.raises(IndexError):
        SCENES[4096]


def test_large_shapes_and_photographs_are_drawn_too() -> None:
    cfg = Config(side=96, kinds=6, radius=(0.49, 0.49), background="photograph", most=1)
    image, objects = Scenes(cfg, "validation")[0]
    assert image.shape == (96, 96, 3) and len(objects.labels) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kinds": 7}, "kinds must be 2 to 6, not 7"),
        ({"most": 0}, "most must be at least 1, not 0"),
        ({"radius": (0.3, 0.2)}, "radius must be two ascending shares"),
        ({"overlap": 2.0}, "overlap 0 to 1, not 2.0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(**wrong)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no split 'dev'"):
        Scenes(Config(), "dev")
