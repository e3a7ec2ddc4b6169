from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.checkpoint import surgery
from fm_jax.core import tree
from fm_jax.core.errors import ConfigError
from fm_jax.layers.patch_embed import PatchConfig, PatchEmbed, regrid
from fm_jax.ops import patches
from tests.close import close

CFG = PatchConfig((4, 6), 2)
IMAGE = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
NORMAL = nn.initializers.normal(0.5)


def embed(cfg, width=8):
    return PatchEmbed(cfg, width, NORMAL, NORMAL)


def draw(cfg, width=8):
    image = np.zeros((1, *cfg.image_size, cfg.channels))
    params = meta.unbox(embed(cfg, width).init(jax.random.key(0), image)["params"])
    return {**params, "bias": params["bias"] + 0.3}


def test_a_token_is_a_strided_convolution_and_its_position():
    params = draw(CFG)
    found = embed(CFG).apply({"params": params}, IMAGE)
    dims = ("NHWC", "HWIO", "NHWC")
    conv = jax.lax.conv_general_dilated(IMAGE, params["kernel"], (2, 2), "VALID", dimension_numbers=dims)
    want = np.asarray(conv).reshape(2, 6, 8) + np.asarray(params["bias"]) + np.asarray(params["positions"])[1:]
    close(found[:, 1:], want)
    close(found[:, 0], jnp.stack([params["cls"] + params["positions"][0]] * 2))


def test_without_a_token_in_front_there_are_patches_only():
    cfg = replace(CFG, cls=False)
    params = draw(cfg)
    assert params.keys() == {"kernel", "bias", "positions"}
    assert params["positions"].shape == (6, 8)
    assert embed(cfg).apply({"params": params}, IMAGE).shape == (2, 6, 8)


def test_the_kept_tokens_are_those_of_the_whole_image_and_see_nothing_of_the_others():
    params, keep = draw(CFG), np.array([[4, 0], [1, 5]])
    whole = embed(CFG).apply({"params": params}, IMAGE)[:, 1:]
    gone = np.ones((2, 6, 1), bool)
    np.put_along_axis(gone, keep[..., None], False, axis=1)
    holes = patches.unpatchify(jnp.where(gone, jnp.nan, patches.patchify(IMAGE, 2)), 2, CFG.grid)
    found = embed(CFG).apply({"params": params}, holes, keep)[:, 1:]
    close(found, np.take_along_axis(np.asarray(whole), keep[..., None], axis=1))


def test_fixed_positions_start_as_sines_and_cosines_and_have_no_gradient():
    cfg = replace(CFG, positions="sincos")
    params = draw(cfg)
    np.testing.assert_array_equal(params["positions"][0], 0)
    np.testing.assert_array_equal(params["positions"][1:], patches.sincos((2, 3), 8))
    for positions, moved in (("sincos", False), ("learned", True)):
        model = embed(replace(CFG, positions=positions))
        gradient = jax.grad(lambda p, model=model: (model.apply({"params": p}, IMAGE) ** 2).sum())(params)
        assert bool(jnp.abs(gradient["positions"]).any()) == moved
        assert gradient["kernel"].any()


@pytest.mark.parametrize("resizing", ["bicubic", "antialiased"])
def test_an_image_of_another_size_has_the_positions_that_surgery_would_give_it(resizing):
    old, new = replace(CFG, any_size=True, resizing=resizing), PatchConfig((8, 4), 2)
    params, image = draw(old), np.random.default_rng(1).normal(size=(2, 8, 4, 3)).astype(np.float32)
    wanted = jax.tree.map(jnp.zeros_like, draw(new))
    fitted = surgery.load(wanted, params, reshape={"positions": regrid(old, new)})
    assert fitted["positions"].shape == (9, 8)
    np.testing.assert_array_equal(fitted["positions"][0], params["positions"][0])
    want = patches.resize(params["positions"][1:], (2, 3), (4, 2), resizing)
    close(fitted["positions"][1:], want)
    close(embed(old).apply({"params": params}, image), embed(new).apply({"params": fitted}, image))


def test_a_token_in_front_comes_and_goes_with_the_positions():
    params, bare = draw(CFG), replace(CFG, cls=False)
    wanted = jax.ShapeDtypeStruct((6, 8), jnp.float32)
    close(regrid(CFG, bare)(params["positions"], wanted), params["positions"][1:])
    back = regrid(bare, CFG)(params["positions"][1:], jax.ShapeDtypeStruct((7, 8), jnp.float32))
    np.testing.assert_array_equal(back[0], 0)


@pytest.mark.parametrize(
    ("cfg", "shape", "message"),
    [
        (CFG, (2, 4, 6, 1), r"images must be \[B, H, W, 3\], not \[2, 4, 6, 1\]"),
        (CFG, (4, 6, 3), r"images must be \[B, H, W, 3\]"),
        (CFG, (2, 6, 4, 3), "the model is for images of 4 × 6, not 6 × 4; make data.size and patches.image_size equal"),
        (replace(CFG, any_size=True), (2, 5, 6, 3), "images of 5 × 6 are not divisible into patches of 2"),
        (replace(CFG, any_size=True), (2, 0, 6, 3), "images of 0 × 6 are not divisible into patches of 2"),
    ],
)
def test_images_that_do_not_fit_are_refused_before_anything_is_computed(cfg, shape, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(lambda image: embed(cfg).apply({"params": draw(cfg)}, image), jnp.zeros(shape))


def test_a_patch_that_does_not_divide_the_image_is_refused():
    with pytest.raises(ConfigError, match="images of 4 × 6 are not divisible into patches of 4"):
        replace(CFG, patch_size=4)
    with pytest.raises(ConfigError, match="at least 1"):
        replace(CFG, channels=0)


def test_the_tree_is_the_one_that_depth_and_decay_know():
    """`optim` finds embeddings under "embed", and the positions there."""
    from fm_jax.optim import depth, optimizer

    params = {"embed": draw(CFG), "blocks": {"kernel": np.zeros((2, 3, 3))}}
    decayed = tree.flatten(optimizer.decay_mask(params))
    assert [path for path, yes in decayed.items() if yes] == ["blocks/kernel", "embed/kernel"]
    factors = tree.flatten(depth.multipliers(params, 0.5))
    assert {value for path, value in factors.items() if path.startswith("embed/")} == {0.125}
