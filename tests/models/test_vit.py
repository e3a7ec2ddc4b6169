"""What a Vision Transformer must do; torch's numbers are in tests/goldens."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.core import tree
from fm_jax.core.errors import ConfigError
from fm_jax.interpret import capture
from fm_jax.layers.tap import Tap
from fm_jax.models.vision import vit
from fm_jax.models.vision.vit import ViT
from tests.close import close

TINY = vit.tiny()
IMAGE = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)


def draw(cfg):
    image = np.zeros((1, *cfg.patches.image_size, cfg.patches.channels))
    return jax.jit(lambda key: meta.unbox(ViT(cfg).init(key, image)["params"]))(jax.random.key(0))


@pytest.fixture(scope="module")
def params():
    return draw(TINY)


def test_features_are_what_the_config_names_of_the_tokens(params):
    hidden = ViT(TINY).apply({"params": params}, IMAGE, method="hidden")
    assert hidden.shape == (3, 17, 32)
    wanted = {"cls": hidden[:, 0], "mean": hidden[:, 1:].mean(axis=1)}
    wanted["both"] = jnp.concatenate([wanted["cls"], wanted["mean"]], axis=1)
    for pool, want in wanted.items():
        close(ViT(replace(TINY, pool=pool)).apply({"params": params}, IMAGE), want)


def test_a_mean_that_is_normed_is_the_mean_of_the_stream_behind_the_last_layer(params):
    cfg, given = replace(TINY, pool="mean_norm"), dict(params)
    given["norm_final"] = {"scale": np.linspace(0.5, 2, 32), "bias": np.linspace(-1, 1, 32)}
    tap = Tap(read=("block.resid_post", "final"))
    found, kept = capture.apply(ViT(cfg), given, IMAGE, tap=tap)
    mean = np.asarray(kept["block.resid_post"][-1])[:, 1:].mean(axis=1, dtype=np.float64)
    centred = mean - mean.mean(axis=1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + cfg.norm.epsilon)
    close(found, unit * given["norm_final"]["scale"] + given["norm_final"]["bias"])
    np.testing.assert_array_equal(kept["final"][:, 0], found)
    other = ViT(replace(TINY, pool="mean")).apply({"params": given}, IMAGE)
    assert float(jnp.abs(found - other).max()) > 0.1


def test_registers_are_read_by_all_and_no_feature_is_read_from_them(params):
    cfg = replace(TINY, registers=3, pool="both")
    given = draw(cfg)
    assert given["embed"]["registers"].shape == (3, 32)
    assert given["embed"]["positions"].shape == (17, 32)
    model, tap = ViT(cfg), Tap(read=("embed",))
    out, read = capture.apply(model, given, IMAGE, tap=tap)
    plain = {**given, "embed": {name: leaf for name, leaf in given["embed"].items() if name != "registers"}}
    bare, without = capture.apply(ViT(replace(cfg, registers=0)), plain, IMAGE, tap=tap)
    front, tokens = read["embed"][:, 1:4], np.delete(read["embed"], (1, 2, 3), axis=1)
    np.testing.assert_array_equal(front, np.tile(given["embed"]["registers"], (3, 1, 1)))
    close(tokens, without["embed"])
    assert float(jnp.abs(out - bare).max()) > 1e-3
    hidden = model.apply({"params": given}, IMAGE, method="hidden")
    assert hidden.shape == (3, 20, 32)
    close(out[:, :32], hidden[:, 0])
    close(out[:, 32:], hidden[:, 4:].mean(axis=1))
    normed = ViT(replace(cfg, pool="mean_norm"))
    found, kept = capture.apply(normed, given, IMAGE, tap=Tap(read=("block.resid_post",)))
    mean = kept["block.resid_post"][-1][:, 4:].mean(axis=1)
    centred = mean - mean.mean(axis=1, keepdims=True)
    close(found, centred / jnp.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6))
    keep = np.tile(np.arange(16)[::-1], (3, 1))
    some = model.apply({"params": given}, IMAGE, keep=keep[:, :5], method="hidden")
    assert some.shape == (3, 9, 32)
    turned = model.apply({"params": given}, IMAGE, keep=keep, method="hidden")
    close(turned[:, :4], hidden[:, :4])
    close(turned[:, 4:], hidden[:, 4:][:, ::-1])


def test_registers_need_no_token_before_them():
    cfg = replace(TINY, registers=2, pool="mean", patches=replace(TINY.patches, cls=False))
    given = draw(cfg)
    hidden = ViT(cfg).apply({"params": given}, IMAGE, method="hidden")
    assert hidden.shape == (3, 18, 32)
    close(ViT(cfg).apply({"params": given}, IMAGE), hidden[:, 2:].mean(axis=1))


def test_an_image_alone_is_the_image_in_its_batch(params):
    apply = jax.jit(lambda image: ViT(TINY).apply({"params": params}, image))
    close(apply(IMAGE)[1:2], apply(IMAGE[1:2]))


def test_patches_in_another_order_with_their_positions_give_the_same_features(params):
    """Attention is blind to order: only the positions tell patches apart."""
    order = np.random.default_rng(1).permutation(16)
    model = ViT(replace(TINY, pool="both"))
    hidden = ViT(TINY).apply({"params": params}, IMAGE, method="hidden")
    shuffled = ViT(TINY).apply({"params": params}, IMAGE, keep=np.tile(order, (3, 1)), method="hidden")
    close(shuffled[:, 1:], hidden[:, 1:][:, order])
    close(shuffled[:, 0], hidden[:, 0])
    flipped = model.apply({"params": params}, IMAGE[:, ::-1])
    assert float(jnp.abs(flipped - model.apply({"params": params}, IMAGE)).max()) > 0.1


def test_height_and_width_are_not_mixed_up():
    cfg = replace(TINY, patches=replace(TINY.patches, image_size=(4, 12)))
    params = draw(cfg)
    assert params["embed"]["positions"].shape == (13, 32)
    image = np.zeros((1, 4, 12, 3), np.float32)
    image[0, 2:4, 8:10] = 1.0
    hidden = lambda x: ViT(cfg).apply({"params": params}, x, tap=Tap(read=("embed",)), mutable=["taps"])[1]  # noqa: E731
    tokens = [jax.tree.leaves(hidden(x))[0][0] for x in (image, 0 * image)]
    np.testing.assert_array_equal(np.flatnonzero(np.abs(tokens[0] - tokens[1]).max(axis=-1) > 0), [1 + 6 + 4])


def test_a_layer_scale_of_zero_leaves_the_embeddings_and_of_one_changes_nothing(params):
    cfg = replace(TINY, layer_scale=0.5)
    scaled = draw(cfg)
    np.testing.assert_array_equal(scaled["blocks"]["scale_attn"], np.full((2, 32), 0.5))
    for value in (0.0, 1.0):
        given = tree.map_with_path(lambda path, leaf, v=value: leaf * 0 + v if "/scale_" in path else leaf, scaled)
        read = Tap(read=("embed", "block.resid_post"))
        out, kept = capture.apply(ViT(cfg), given, IMAGE, tap=read)
        if value == 0:
            np.testing.assert_array_equal(kept["block.resid_post"][-1], kept["embed"])
        else:
            plain = {**given, "blocks": {k: v for k, v in given["blocks"].items() if not k.startswith("scale_")}}
            close(out, ViT(TINY).apply({"params": plain}, IMAGE))


def test_paths_are_dropped_image_by_image_and_more_often_in_higher_layers(params):
    cfg = replace(TINY, num_layers=4, drop_path=0.8)
    deep, image = draw(cfg), np.repeat(IMAGE[:1], 400, axis=0)
    tap = Tap(read=("block.resid_pre", "block.resid_mid"))
    _, read = capture.apply(ViT(cfg), deep, image, tap=tap, rngs={"dropout": jax.random.key(0)})
    left_out = np.asarray(read["block.resid_mid"] == read["block.resid_pre"]).all(axis=(2, 3)).mean(axis=1)
    assert np.abs(left_out - [0, 0.8 / 3, 1.6 / 3, 0.8]).max() < 5 * 0.025
    assert left_out[0] == 0
    evaluated = ViT(cfg).apply({"params": deep}, IMAGE)
    close(evaluated, ViT(replace(cfg, drop_path=0.0)).apply({"params": deep}, IMAGE))


def test_the_published_sizes_have_the_published_parameters():
    """Without a head; with one of 1000 classes ViT-B/16 has the 86,567,656 of torchvision's vit_b_16."""
    counts = {
        "vit_ti16": 5_524_416, "vit_s16": 21_665_664, "vit_b16": 86_567_656 - 769_000, "vit_b32": 87_455_232,
        "vit_l16": 303_301_632, "vit_h14": 630_764_800, "dinov2_small": 22_056_576 - 384,
        "dinov2_base": 86_580_480 - 768, "dinov2_large": 304_368_640 - 1024, "dinov2_giant": 1_136_480_768 - 1536,
    }  # fmt: skip
    for name, count in counts.items():
        cfg = getattr(vit, name)()
        image = jax.ShapeDtypeStruct((1, *cfg.patches.image_size, 3), jnp.float32)
        found = meta.unbox(jax.eval_shape(ViT(cfg).init, jax.random.key(0), image)["params"])
        assert tree.count(found) == count, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"registers": -1}, "registers must be at least 0"),
        ({"drop_path": 1.0}, "drop_path must be in"),
        ({"attention": replace(TINY.attention, causal=True)}, "attention.causal to false"),
        ({"patches": replace(TINY.patches, cls=False)}, "pool 'cls' needs a"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **changes)


def test_mean_pooling_needs_no_token_in_front():
    cfg = replace(TINY, pool="mean", patches=replace(TINY.patches, cls=False))
    assert "cls" not in draw(cfg)["embed"]
    assert ViT(cfg).apply({"params": draw(cfg)}, IMAGE).shape == (3, 32)


def test_half_precision_computes_in_half_and_gives_features_in_float32(params):
    model = ViT(replace(TINY, dtype="bfloat16"))
    assert model.apply({"params": params}, IMAGE, method="hidden").dtype == jnp.bfloat16
    found = model.apply({"params": params}, IMAGE)
    assert found.dtype == jnp.float32
    close(found, ViT(TINY).apply({"params": params}, IMAGE), 0.2)
