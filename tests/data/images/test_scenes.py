import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.images import scenes
from fm_jax.data.images.scenes import Config, Scenes
from tests.close import small


def test_a_scene_is_a_function_of_seed_split_and_number() -> None:
    found = Scenes(Config(), "train", 24)
    assert np.array_equal(found[5][0], Scenes(Config(), "train", 24)[5][0])
    others = [Scenes(Config(seed=1), "train", 24), Scenes(Config(), "test", 24)]
    assert all(
        not np.array_equal(found[5][0], other[5][0]) and other.fingerprint != found.fingerprint for other in others
    )
    assert [len(Scenes(Config(), split, 24)) for split in scenes.SPLITS] == [4096, 512, 1024]
    with pytest.raises(IndexError):
        found[4096]


@pytest.mark.parametrize("objects", ["shapes", "digits"])
@pytest.mark.parametrize("background", ["colour", "photograph"])
def test_the_object_has_its_colour_inside_its_box_and_the_background_is_outside(objects: str, background: str) -> None:
    cfg = Config(objects=objects, background=background)  # type: ignore[arg-type]
    found = Scenes(cfg, "train", 48)
    for index in range(12):
        scene = found.scene(index)
        left, top, right, bottom = map(int, scene.box)
        assert 0 <= left < right <= 48 and 0 <= top < bottom <= 48 and scene.image.shape == (48, 48, 3)
        paint = np.array(list(scenes.COLOURS.values())[scene.colour])
        near = (np.abs(scene.image[..., None, :] - paint * np.linspace(0.8, 1, 41)[:, None]).max(-1) < 4).any(-1)
        inner = near[top:bottom, left:right].mean()
        near[top:bottom, left:right] = False
        assert inner > 0.1 and inner > 2 * near.mean()


def test_classes_are_even_and_independent_of_colours() -> None:
    found = Scenes(Config(), "train", 8)
    drawn = [found.scene(i) for i in range(1200)]
    counts = np.zeros((6, 6))
    for scene in drawn:
        counts[scene.kind, scene.colour] += 1
    assert np.abs(counts.sum(1) - 200).max() < 50 and np.abs(counts - 100 / 3).max() < 22


def test_the_label_is_what_was_asked_for() -> None:
    scene = Scenes(Config(), "test", 16).scene(3)
    labels = {label: Scenes(Config(label=label), "test", 16) for label in ("object", "colour", "both")}  # type: ignore[arg-type]
    assert labels["object"][3][1] == scene.kind and labels["colour"][3][1] == scene.colour
    both = labels["both"]
    assert both.classes[both[3][1]] == f"{list(scenes.COLOURS)[scene.colour]} {scenes.SHAPES[scene.kind]}"
    assert len(both.classes) == 36 and labels["object"].classes == scenes.SHAPES


def test_the_shapes_have_the_areas_that_geometry_says() -> None:
    axis = (np.arange(2000) + 0.5) / 1000 - 1  # middles of cells: the edge is counted to 3e-4
    x, y = np.meshgrid(axis, axis)
    areas = [scenes.inside(kind, x, y).mean() * 4 for kind in range(6)]
    star = 10 * 0.5 * 1 * 0.42 * np.sin(np.pi / 5)
    wanted = [np.pi, 2, 3 * np.sqrt(3) / 4, star, 4 * 0.9 * 0.6 - 0.36, np.pi * (1 - 0.55**2)]
    small(np.abs(np.array(areas) / wanted - 1).max(), 5e-3)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(DataError, match="no split 'dev'"):
        Scenes(Config(), "dev", 24)
    with pytest.raises(ConfigError, match="at least 8 × 8 pixels, not 4"):
        Scenes(Config(), "train", 4)
    with pytest.raises(ConfigError, match="at least 1 scene"):
        Config(test=0)


def test_no_split_draws_the_handwriting_of_another() -> None:
    seen = [{image.tobytes() for image in scenes._handwritten(split)[0]} for split in scenes.SPLITS]
    assert len(seen[0] | seen[1] | seen[2]) == sum(map(len, seen)) == 1797
    drawn = [
        scenes.draw(Config(objects="digits"), np.random.default_rng(0), 32, split).image for split in scenes.SPLITS
    ]
    assert not np.array_equal(drawn[0], drawn[2])
