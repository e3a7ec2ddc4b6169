from dataclasses import replace

import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.images import views
from fm_jax.data.images.views import Recipe
from tests.close import close

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    "recipe",
    [Recipe(), views.cifar(), views.imagenet(), views.finetune(), views.simclr(), views.digits(), views.digits(2)],
)
def test_every_recipe_gives_a_view_of_the_size_and_the_same_one_again(recipe: Recipe) -> None:
    found = views.view(IMAGE, rng(), 32, recipe).image
    assert found.shape == (32, 32, 3) and found.dtype == np.uint8
    assert np.array_equal(found, views.view(IMAGE, rng(), 32, recipe).image)
    differs = any(not np.array_equal(found, views.view(IMAGE, rng(seed), 32, recipe).image) for seed in range(1, 5))
    assert differs == (recipe != Recipe())


def test_two_views_differ_and_are_drawn_apart() -> None:
    one, two = (view.image for view in views.two_view(IMAGE, rng(), 24))
    assert one.shape == two.shape == (24, 24, 3) and not np.array_equal(one, two)
    again = views.two_view(IMAGE, rng(), 24)
    assert np.array_equal(one, again[0].image) and np.array_equal(two, again[1].image)


def test_simclr_changes_colour_as_often_as_the_paper_says() -> None:
    recipe = replace(views.simclr(), geometry="centre", flip=0.0, blur=0.0)
    grey = same = 0
    for seed in range(300):
        found = views.view(IMAGE[:, :40], rng(seed), 40, recipe).image
        grey += bool((found[..., 0] == found[..., 2]).all())
        same += np.array_equal(found, IMAGE[:, :40])
    assert 40 < grey < 80 and 30 < same < 66  # 0.2 and (1 - 0.8) · (1 - 0.2) of 300


def test_small_views_see_less() -> None:
    ramp = np.stack([*np.meshgrid(np.arange(200), np.arange(200)), np.zeros((200, 200))], -1).astype(np.uint8)
    recipe = Recipe(geometry="crop", area=(0.14, 1.0), views=2, small=6, small_size=16)
    large, small = (np.stack([view.image for view in part]) for part in views.multi_crop(ramp, rng(), 32, recipe))
    assert large.shape == (2, 32, 32, 3) and small.shape == (6, 16, 16, 3)
    seen = [
        np.ptp(part[..., 0].astype(float), axis=(1, 2)) * np.ptp(part[..., 1].astype(float), axis=(1, 2)) / 4e4
        for part in (large, small)
    ]
    assert seen[0].min() > 0.12 and seen[1].max() < 0.145
    assert views.multi_crop(ramp, rng(), 32, Recipe())[1] == []
    assert views.swav().small == 6


def test_erasing_comes_after_normalisation() -> None:
    found = views.finished(IMAGE, rng(), Recipe(erase=1.0), (0.5,) * 3, (0.5,) * 3)
    plain = views.finished(IMAGE, rng(), Recipe(), (0.5,) * 3, (0.5,) * 3)
    assert found.dtype == np.float32 and 0.01 < (found != plain).mean() < 0.4
    close(plain, IMAGE / 127.5 - 1)


@pytest.mark.parametrize("image", [IMAGE[..., 0], IMAGE[..., :2], IMAGE.astype(np.float32), IMAGE[:0]])
def test_what_is_no_colour_image_of_bytes_is_refused(image: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"an image must be uint8 \[H, W, 3\], not "):
        views.view(image, rng(), 8, Recipe())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"flip": 1.5}, "flip must be a probability in 0 to 1, not 1.5"),
        ({"area": (0.5, 0.1)}, "area must be two ascending shares"),
        ({"magnitude": 11}, "magnitude 0 to 10"),
        ({"jitter": -1}, "at least 0"),
        ({"views": 3}, "views must be 1 or 2, not 3"),
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**wrong)  # type: ignore[arg-type]
