import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.core.errors import ConfigError
from fm_jax.ops import patches
from tests.close import close

RNG = np.random.default_rng(0)


def test_a_patch_is_its_pixels_row_by_row_with_the_channels_last():
    rows, columns, channels = np.meshgrid(np.arange(6), np.arange(8), np.arange(3), indexing="ij")
    image = (100 * rows + 10 * columns + channels)[None]
    found = np.asarray(patches.patchify(jnp.asarray(image), 2))
    assert found.shape == (1, 12, 12)
    np.testing.assert_array_equal(found[0, 0], [0, 1, 2, 10, 11, 12, 100, 101, 102, 110, 111, 112])
    np.testing.assert_array_equal(found[0, 5], image[0, 2:4, 2:4].ravel())  # 4 patches a row: second row, second


@pytest.mark.parametrize("size", [1, 2, 4])
def test_patches_put_together_are_the_image(size):
    image = jnp.asarray(RNG.normal(size=(2, 8, 12, 3)))
    grid = (8 // size, 12 // size)
    np.testing.assert_array_equal(patches.unpatchify(patches.patchify(image, size), size, grid), image)


def test_standardised_patches_have_no_mean_and_the_unbiased_variance_one():
    cut = jnp.asarray(RNG.normal(3, 5, (2, 4, 12)).astype(np.float32))
    found, mean, scale = patches.standardise(cut)
    close(found.mean(-1), 0, scale=1.0)
    close(found.var(-1, ddof=1), 1)
    close(found * scale + mean, cut)
    assert np.isfinite(patches.standardise(jnp.full((1, 1, 12), 7.0))[0]).all()


def test_sines_and_cosines_of_the_column_come_before_those_of_the_row():
    table = patches.sincos((3, 5), 8)
    assert table.shape == (15, 8)
    assert table.dtype == np.float32
    row, column = 2, 4
    want = [f(place * 10_000.0 ** (-i / 2)) for place in (column, row) for f in (np.sin, np.cos) for i in (0, 1)]
    close(table[row * 5 + column], np.array(want))
    with pytest.raises(ConfigError, match="divisible by 4, not 10"):
        patches.sincos((3, 5), 10)


@pytest.mark.parametrize("how", ["bicubic", "linear", "antialiased"])
def test_a_grid_resized_to_itself_is_itself_and_a_constant_stays_one(how):
    table = jnp.asarray(RNG.normal(size=(12, 5)).astype(np.float32))
    close(patches.resize(table, (3, 4), (3, 4), how), table)
    close(patches.resize(jnp.full((12, 5), 2.5), (3, 4), (7, 2), how), 2.5)


def test_linear_resizing_of_a_ramp_is_the_ramp_within_the_outer_centres():
    ramp = jnp.arange(4, dtype=jnp.float32)[None].repeat(2, 0).reshape(8, 1)
    found = np.asarray(patches.resize(ramp, (2, 4), (2, 8), "linear")).reshape(2, 8)
    close(found, np.clip(np.arange(8) / 2 - 0.25, 0, 3)[None].repeat(2, 0))


def test_the_cubic_kernel_has_a_of_minus_three_quarters():
    """What eight places read of the second of four; the live comparison with torch is in tests/parity."""
    spike = jnp.asarray([0.0, 1.0, 0.0, 0.0])[:, None]

    def kernel(x):
        return 1.25 * x**3 - 2.25 * x**2 + 1 if x <= 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)

    distances = np.abs((np.arange(8) + 0.5) / 2 - 0.5 - 1)
    want = [kernel(x) if x < 2 else 0.0 for x in distances]
    close(patches.resize(spike, (1, 4), (1, 8))[:, 0], np.array(want))


def test_antialiasing_is_pillows_bicubic():
    """Both widen Keys' kernel of -0.5 as the grid shrinks; torch's is compared in tests/parity."""
    from PIL import Image

    table = RNG.normal(size=(6 * 7, 1)).astype(np.float32)
    for new in ((3, 2), (9, 4), (1, 1)):
        want = Image.fromarray(table.reshape(6, 7)).resize(new[::-1], Image.Resampling.BICUBIC)
        found = patches.resize(jnp.asarray(table), (6, 7), new, "antialiased")
        close(np.asarray(found).reshape(new), want)


def test_a_table_that_is_no_such_grid_is_refused():
    with pytest.raises(ConfigError, match="a table of 12 positions does not match a grid of 3 × 5"):
        patches.resize(jnp.zeros((12, 2)), (3, 5), (4, 4))
