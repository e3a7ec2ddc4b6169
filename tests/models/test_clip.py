"""CLIP's own promises: where texts are read, what padding does, the published sizes, and half precision."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.core import tree
from fm_jax.core.errors import ConfigError
from fm_jax.models.multimodal import clip
from fm_jax.models.vision import vit
from tests.close import close, small

CFG = clip.tiny()
MODEL = clip.CLIP(CFG)
IMAGE = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
TOKENS = np.array([[1, 5, 7, 95, 0, 0], [1, 95, 3, 95, 2, 2], [1, 8, 8, 8, 8, 95]], np.int32)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: meta.unbox(MODEL.init(key, IMAGE, TOKENS)["params"]))(jax.random.key(0))


@pytest.fixture(scope="module")
def whole(params):
    return jax.jit(MODEL.apply)({"params": params}, IMAGE, TOKENS)


def test_a_text_is_read_where_the_rule_says():
    for read, want in (("end", [3, 1, 5]), ("largest", [3, 1, 5]), ("last", [5, 5, 5])):
        assert clip.places(jnp.asarray(TOKENS), read, 95).tolist() == want
    beyond = np.where(TOKENS == 8, 97, TOKENS)  # a token above the end token: the two rules part
    assert clip.places(jnp.asarray(beyond), "end", 95).tolist() == [3, 1, 5]
    assert clip.places(jnp.asarray(beyond), "largest", 95).tolist() == [3, 1, 1]
    assert clip.places(jnp.asarray(TOKENS), "end", 60).tolist() == [0, 0, 0]  # none: position 0, as in transformers


def test_padding_changes_nothing_and_vectors_have_length_one(params):
    read = jax.jit(lambda tokens: MODEL.apply({"params": params}, tokens, method="text_features"))
    plain = read(TOKENS)
    other = np.array([[1, 5, 7, 95, 9, 1], [1, 95, 4, 4, 4, 95], TOKENS[2]], np.int32)
    close(read(other), plain)
    close(np.linalg.norm(plain, axis=1), np.ones(3))
    assert float(jnp.abs(plain[0] - plain[2]).max()) > 0.1


def test_a_tower_alone_gives_the_vectors_of_the_whole(params, whole):
    for name, tower, given in (("image", clip.image_tower, IMAGE), ("text", clip.text_tower, TOKENS)):
        alone = jax.jit(tower(CFG).apply)({"params": params[name]}, given)
        close(alone / np.linalg.norm(alone, axis=1, keepdims=True), getattr(whole, name))
    close(whole.scale, 1 / 0.07)
    assert float(whole.bias) == 0 and "bias" not in params


def test_half_precision_stays_near(params, whole):
    half = replace(CFG, image=replace(CFG.image, dtype="bfloat16"), text=replace(CFG.text, dtype="bfloat16"))
    rough = jax.jit(clip.CLIP(half).apply)({"params": params}, IMAGE, TOKENS)
    for name in ("image", "text"):
        one, two = getattr(whole, name), getattr(rough, name)
        assert two.dtype == jnp.float32
        small(float(jnp.abs(one - two).max()), 0.05)
        assert float(jnp.abs(one - two).max()) > 1e-5  # it was computed in bfloat16


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        (clip.clip_b32, 151_277_313), (clip.clip_b16, 149_620_737), (clip.clip_l14, 427_616_513),
        (clip.clip_l14_336, 427_944_193), (clip.siglip_b16, 203_155_970),
    ],
)  # fmt: skip
def test_the_published_sizes_have_the_published_parameters(preset, count):
    cfg = preset()
    image = jax.ShapeDtypeStruct((1, *cfg.patches.image_size, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    boxed = jax.eval_shape(clip.CLIP(cfg).init, jax.random.key(0), image, tokens)["params"]
    assert tree.count(meta.unbox(boxed)) == count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width must be at least 1"),
        ({"form": "siglip"}, "width 16 must be image.d_model 32"),
        ({"text": replace(CFG.text, tied=False)}, "text.tied is false"),
    ],
)
def test_towers_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(CFG, **change)


def test_a_text_that_is_too_long_is_refused(params):
    with pytest.raises(ConfigError, match="17 tokens exceed the model's max_length 16"):
        MODEL.apply({"params": params}, np.ones((1, 17), np.int32), method="text_features")


def test_the_pooling_query_is_not_added_to_what_it_reads():
    """A query that attends to equal tokens reads their value, whatever it is itself."""
    head = vit.AttentionPool(replace(vit.tiny(), pool="attention"))
    hidden = jnp.broadcast_to(jnp.asarray(IMAGE[0].ravel()[:32]), (2, 5, 32))
    params = meta.unbox(jax.jit(head.init)(jax.random.key(0), hidden)["params"])
    apply = jax.jit(head.apply)
    out = apply({"params": params}, hidden)
    close(apply({"params": {**params, "probe": params["probe"] + 3}}, hidden), out)
    assert float(jnp.abs(out).max()) > 0.01
