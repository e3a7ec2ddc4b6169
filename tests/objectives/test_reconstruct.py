import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.models.vision import mae, vit
from fm_jax.objectives.reconstruct import masked_patches
from tests.close import close

RNG = np.random.default_rng(0)
MODEL = mae.MAE(mae.decoder(1, 16, 2), vit.ViT(mae.encoder(vit.tiny())))
IMAGE = RNG.normal(size=(6, 8, 8, 3)).astype(np.float32)
NOISE = RNG.uniform(size=(6, 16)).astype(np.float32)
LOSS = jax.jit(masked_patches(MODEL.apply))


@pytest.fixture(scope="module")
def params():
    return meta.unbox(MODEL.init(jax.random.key(0), IMAGE, NOISE)["params"])


def rows(**changes):
    return {"image": IMAGE, "weights": np.ones(6, np.float32), **changes}


def test_the_loss_is_the_mean_square_over_what_was_taken_out(params):
    """Against numpy, from the published definition: per-patch means and unbiased variances."""
    weights = np.array([1, 0, 2, 1, 1, 0], np.float32)
    total, weight, metrics = LOSS(params, rows(noise=NOISE, weights=weights))
    prediction = np.asarray(MODEL.apply({"params": params}, IMAGE, NOISE))
    cut = IMAGE.reshape(6, 4, 2, 4, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(6, 16, 12)
    target = (cut - cut.mean(-1, keepdims=True)) / np.sqrt(cut.var(-1, ddof=1, keepdims=True) + 1e-6)
    gone = NOISE.argsort(axis=1).argsort(axis=1) >= 4
    error = ((prediction - target) ** 2).mean(-1)
    assert float(weight) == 12 * weights.sum()
    close(total, (weights[:, None] * error * gone).sum())
    assert metrics == {"mse": (total, weight)}


def test_rows_of_no_weight_count_for_nothing_and_sums_add_up(params):
    whole = LOSS(params, rows())
    parts = [LOSS(params, {"image": IMAGE[cut], "weights": np.ones(len(IMAGE[cut]))}) for cut in (np.s_[:2], np.s_[2:])]
    for index in (0, 1):  # an evaluation gives the same numbers in batches of any size
        close(whole[index], parts[0][index] + parts[1][index])
    padded = {"image": np.concatenate([IMAGE, IMAGE[:2] * 0]), "weights": np.array([1] * 6 + [0] * 2, np.float32)}
    close(LOSS(params, padded)[0], whole[0])


def test_evaluation_has_fixed_masks_and_training_new_ones(params):
    assert float(LOSS(params, rows())[0]) == float(LOSS(params, rows(), None)[0])
    drawn = {float(LOSS(params, rows(), jax.random.key(key))[0]) for key in (0, 1, 2, 2)}
    assert len(drawn) == 3


def test_dropout_is_on_in_training_only(params):
    wet = mae.MAE(MODEL.cfg, vit.ViT(vit.replace(MODEL.backbone.cfg, dropout=0.5)))
    loss = jax.jit(masked_patches(wet.apply))
    fields = rows(noise=NOISE)
    close(loss(params, fields)[0], LOSS(params, fields)[0])
    drawn = {float(loss(params, fields, jax.random.key(key))[0]) for key in (0, 1)}
    assert len(drawn | {float(LOSS(params, fields)[0])}) == 3


def test_the_gradient_of_what_stays_comes_through_the_decoder_only(params):
    slopes = jax.jit(jax.grad(lambda p: LOSS(p, rows(noise=NOISE))[0]))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    assert jnp.abs(slopes["backbone"]["embed"]["kernel"]).max() > 0
    assert jnp.abs(slopes["decoder"]["embed"]["mask"]).max() > 0
