import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.core.errors import ConfigError
from fm_jax.ops import random_masking as masking

RNG = np.random.default_rng(0)
NOISE = jnp.asarray(RNG.uniform(size=(5, 12)).astype(np.float32))


def test_the_smallest_noise_stays_in_its_order():
    found = masking.mask(NOISE, 4)
    np.testing.assert_array_equal(found.keep, np.argsort(NOISE, axis=1)[:, :4])
    assert (np.asarray(found.removed).sum(axis=1) == 8).all()
    for row in range(5):
        assert set(np.flatnonzero(~np.asarray(found.removed)[row])) == set(np.asarray(found.keep)[row])


def test_what_was_picked_goes_back_where_it_stood():
    """The patch's own number is in its pixels."""
    x = jnp.broadcast_to(jnp.arange(12.0)[None, :, None], (5, 12, 2)) + 100 * jnp.arange(5.0)[:, None, None]
    found = masking.mask(NOISE, 4)
    back = masking.restore(masking.pick(x, found.keep), found, jnp.full(2, -1.0))
    np.testing.assert_array_equal(back, np.where(np.asarray(found.removed)[..., None], -1.0, x))


def test_nothing_of_a_removed_row_is_read_nor_moved_by_the_gradient():
    found = masking.mask(NOISE, 4)
    holes = jnp.where(found.removed[..., None], jnp.nan, jnp.ones((5, 12, 3)))
    assert np.isfinite(masking.pick(holes, found.keep)).all()
    gradient = jax.grad(lambda x: (masking.restore(masking.pick(x, found.keep), found, jnp.zeros(3)) ** 2).sum())(holes)
    np.testing.assert_array_equal(gradient[found.removed], 0.0)


def test_equal_noise_keeps_the_first():
    np.testing.assert_array_equal(masking.mask(jnp.zeros((1, 6)), 2).keep, [[0, 1]])


@pytest.mark.parametrize(("patches", "ratio", "kept"), [(196, 0.75, 49), (16, 0.75, 4), (25, 0.6, 10), (49, 0.75, 12)])
def test_the_number_kept_is_the_published_one(patches, ratio, kept):
    assert masking.count_kept(patches, ratio) == kept == int(patches * (1 - ratio))


@pytest.mark.parametrize(("patches", "ratio"), [(3, 0.75), (16, 0.0), (1, 0.5)])
def test_keeping_none_or_all_is_refused(patches, ratio):
    with pytest.raises(ConfigError, match="at least 1 must be kept and 1 masked"):
        masking.count_kept(patches, ratio)


def test_a_rows_noise_is_its_own_in_any_batch():
    images = RNG.normal(size=(6, 4, 4, 3)).astype(np.float32)
    whole = masking.noise(jax.random.key(3), images, 16)
    for part in (slice(0, 1), slice(2, 6)):
        np.testing.assert_array_equal(masking.noise(jax.random.key(3), images[part], 16), whole[part])
    assert len(np.unique(np.asarray(whole).round(6), axis=0)) == 6
    assert np.abs(masking.noise(jax.random.key(4), images, 16) - whole).max() > 0.1


def test_images_that_differ_in_one_pixel_or_in_their_order_are_masked_differently():
    image = RNG.integers(0, 2, (8, 8, 3)).astype(np.float32)
    other = image.copy()
    other[3, 5, 1] += 1e-6
    rows = np.stack([image, other, image[::-1], image[:, ::-1], image[..., ::-1]])
    found = np.asarray(masking.noise(jax.random.key(0), rows, 16))
    assert len(np.unique(found, axis=0)) == 5


def test_every_patch_goes_equally_often():
    images = RNG.normal(size=(4000, 2, 2, 1)).astype(np.float32)
    removed = np.asarray(masking.mask(masking.noise(jax.random.key(0), images, 16), 4).removed).mean(axis=0)
    assert np.abs(removed - 0.75).max() < 5 * np.sqrt(0.75 * 0.25 / 4000)
