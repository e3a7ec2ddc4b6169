"""What a masked autoencoder must do; torch's numbers are in tests/goldens."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from fm_jax.checkpoint import surgery
from fm_jax.core import tree
from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.interpret import capture
from fm_jax.layers.patch_embed import regrid
from fm_jax.models.vision import mae, vit
from fm_jax.models.vision.classifier import ImageClassifier
from fm_jax.models.vision.mae import MAE
from fm_jax.objectives import reconstruct
from fm_jax.ops import patches
from tests.close import close, small

RNG = np.random.default_rng(0)
BACKBONE = mae.encoder(vit.tiny())
MODEL = MAE(mae.decoder(1, 16, 2), vit.ViT(BACKBONE))
IMAGE = RNG.normal(size=(3, 8, 8, 3)).astype(np.float32)
NOISE = RNG.permuted(np.tile(np.arange(16), (3, 1)), axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: meta.unbox(MODEL.init(key, IMAGE, NOISE)["params"]))(jax.random.key(0))


@jax.jit
def predict(params, image):
    return MODEL.apply({"params": params}, image, NOISE, method="reconstruct")


def test_the_encoder_sees_nothing_of_what_was_taken_out(params):
    """Where those pixels are not even numbers, the prediction is the same number for number."""
    whole = predict(params, IMAGE)
    assert (np.asarray(whole.removed) == (NOISE >= 4)).all()
    cut = jnp.where(whole.removed[..., None], jnp.nan, patches.patchify(IMAGE, 2))
    holes = patches.unpatchify(cut, 2, (4, 4))
    found = predict(params, holes)
    np.testing.assert_array_equal(found.prediction, whole.prediction)
    assert np.isnan(found.target[found.removed]).all()
    assert np.isfinite(found.target[~found.removed]).all()


def test_the_encoder_reads_a_quarter_of_the_patches_and_the_token_in_front(params):
    shapes = jax.eval_shape(
        lambda: MODEL.apply(
            {"params": params}, IMAGE, NOISE, tap=mae.Tap(read=("encoder.final", "final")), mutable=["taps"]
        )
    )
    assert sorted(leaf.shape for leaf in jax.tree.leaves(shapes[1])) == [(3, 5, 32), (3, 17, 16)]


def test_the_decoder_is_given_patches_and_no_registers():
    """With a decoder that draws what it is given, the registers would push the patches from their places."""
    model = MODEL.clone(backbone=vit.ViT(replace(BACKBONE, registers=3)))
    given = jax.jit(lambda key: meta.unbox(model.init(key, IMAGE, NOISE)["params"]))(jax.random.key(0))
    assert given["backbone"]["embed"]["registers"].shape == (3, 32)
    assert "registers" not in given["decoder"]["embed"]
    tap = mae.Tap(read=("encoder.final", "embed"))
    _, read = capture.apply(model, given, IMAGE, NOISE, tap=tap)
    latent, embedded = read["encoder.final"], read["embed"]
    assert latent.shape == (3, 1 + 3 + 4, 32)
    decoder = jax.tree.map(np.asarray, given["decoder"]["embed"])
    want = np.asarray(latent) @ decoder["project"]["kernel"] + decoder["project"]["bias"]
    order = np.argsort(NOISE, axis=1)[:, :4]
    for row, kept in enumerate(order):
        close(embedded[row, 1 + kept], want[row, 4:] + decoder["positions"][1 + kept])
        close(embedded[row, 0], want[row, 0] + decoder["positions"][0])


def test_every_removed_patch_is_asked_for_at_its_own_place(params):
    """A decoder whose positions are all alike gives one prediction to all removed patches of an image, else many."""
    found = np.asarray(predict(params, IMAGE).prediction)
    flat = tree.map_with_path(lambda path, leaf: leaf * 0 if path == "decoder/embed/positions" else leaf, params)
    blind = np.asarray(predict(flat, IMAGE).prediction)
    for row in range(3):
        gone = NOISE[row] >= 4
        small(np.ptp(blind[row, gone], axis=0).max() / np.abs(blind).max(), 1e-5)
        assert np.ptp(found[row, gone], axis=0).min() > 1e-4


def test_which_patch_is_where_survives_the_way_through_the_model(params):
    """Without attention and feed-forward, each kept patch's prediction depends on its own pixels alone."""
    quiet = tree.map_with_path(
        lambda path, leaf: leaf * 0 if path.endswith(("o/kernel", "down/kernel")) else leaf, params
    )
    whole, kept = predict(quiet, IMAGE), NOISE < 4
    for patch in range(16):
        cut = jnp.asarray(patches.patchify(IMAGE, 2))
        changed = patches.unpatchify(cut.at[:, patch].add(1.0 + jnp.arange(12)), 2, (4, 4))
        moved = np.abs(predict(quiet, changed).prediction - whole.prediction).max(axis=-1) > 1e-6
        np.testing.assert_array_equal(moved, kept & (np.arange(16) == patch))


def test_a_reconstruction_is_the_image_with_predictions_in_the_holes(params):
    drawing = predict(params, IMAGE)
    made = MODEL.apply({"params": params}, IMAGE, NOISE, method="inpaint")
    assert made.shape == IMAGE.shape
    cut, true = patches.patchify(made, 2), patches.patchify(jnp.asarray(IMAGE), 2)
    np.testing.assert_array_equal(cut[~drawing.removed], true[~drawing.removed])
    back, _, _ = patches.standardise(true)
    _, mean, scale = patches.standardise(true)
    close(back, drawing.target)
    want = drawing.prediction * scale + mean
    close(cut[drawing.removed], want[drawing.removed])
    plain = MODEL.clone(cfg=replace(MODEL.cfg, standardise=False))
    made = patches.patchify(plain.apply({"params": params}, IMAGE, NOISE, method="inpaint"), 2)
    close(made[drawing.removed], drawing.prediction[drawing.removed])


def test_masks_are_drawn_from_the_key_where_no_noise_is_given(params):
    one, same, other = (
        MODEL.apply({"params": params}, IMAGE, rngs={"mask": jax.random.key(k)}, method="reconstruct").removed
        for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert (np.asarray(one) != np.asarray(other)).any()
    assert (np.asarray(one).sum(axis=1) == 12).all()
    assert len(np.unique(one, axis=0)) == 3


def test_a_pretrained_backbone_starts_a_classifier_and_one_for_larger_images(params):
    learned = replace(BACKBONE, patches=replace(BACKBONE.patches, positions="learned"))
    classifier = ImageClassifier(vit.ViT(learned), 5)
    fresh = meta.unbox(classifier.init(jax.random.key(7), IMAGE)["params"])
    with pytest.raises(CheckpointError, match="decoder/blocks"):
        surgery.load(fresh, params, fresh=("head/.*",))
    started = surgery.load(fresh, params, fresh=("head/.*",), unused=("decoder/.*",))
    jax.tree.map(np.testing.assert_array_equal, started["backbone"], params["backbone"])
    np.testing.assert_array_equal(started["head"]["kernel"], fresh["head"]["kernel"])
    keep = np.tile(np.arange(16), (3, 1))
    whole = MODEL.backbone.apply({"params": params["backbone"]}, IMAGE, keep=keep, method="hidden")
    logits = whole[:, 0] @ fresh["head"]["kernel"] + fresh["head"]["bias"][None]
    close(classifier.apply({"params": started}, IMAGE), logits)

    larger = replace(learned, patches=replace(learned.patches, image_size=(12, 8)))
    big = ImageClassifier(vit.ViT(larger), 5)
    fresh = meta.unbox(big.init(jax.random.key(7), np.zeros((1, 12, 8, 3)))["params"])
    resized = {"backbone/embed/positions": regrid(BACKBONE.patches, larger.patches)}
    started = surgery.load(fresh, params, fresh=("head/.*",), unused=("decoder/.*",), reshape=resized)
    anywhere = replace(learned, patches=replace(learned.patches, any_size=True))
    image = RNG.normal(size=(2, 12, 8, 3)).astype(np.float32)
    want = vit.ViT(anywhere).apply({"params": params["backbone"]}, image)
    close(big.backbone.apply({"params": started["backbone"]}, image), want)


def test_the_fixed_positions_stay_where_an_optimiser_trains_everything(params):
    from fm_jax.optim import optimizer

    tx = optimizer.make(optimizer.Config(weight_decay=0.5), 0.1, params)
    loss_fn = reconstruct.masked_patches(MODEL.apply)
    fields = {"image": IMAGE, "weights": np.ones(3, np.float32)}
    slopes = jax.jit(jax.grad(lambda p: loss_fn(p, fields, jax.random.key(0))[0]))(params)
    updates, _ = tx.update(slopes, tx.init(params), params)
    still = [path for path, leaf in tree.flatten(updates).items() if not leaf.any()]
    assert still == ["backbone/embed/positions", "decoder/embed/positions"]


@pytest.mark.slow
def test_32_images_with_fixed_masks_are_learned_by_heart():
    image = np.random.default_rng(3).normal(size=(32, 8, 8, 1)).astype(np.float32)
    cut = replace(BACKBONE.patches, channels=1)
    model = MAE(mae.decoder(2, 32, 4), vit.ViT(replace(BACKBONE, patches=cut)))
    noise = np.random.default_rng(4).uniform(size=(32, 16)).astype(np.float32)
    fields = {"image": image, "weights": np.ones(32, np.float32), "noise": noise}
    params = meta.unbox(model.init(jax.random.key(0), image, noise)["params"])
    tx, loss_fn = optax.adam(3e-3), reconstruct.masked_patches(model.apply)

    def loss(params):
        total, weight, *_ = loss_fn(params, fields, None)
        return total / weight

    @jax.jit
    def train(params, state):
        def step(carry, _):
            params, state = carry
            value, slopes = jax.value_and_grad(loss)(params)
            updates, state = tx.update(slopes, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, state), length=400)

    (params, _), values = train(params, tx.init(params))
    assert float(loss(params)) < 0.1 * float(values[0]), values[::50]


@pytest.mark.parametrize(
    ("image", "noise", "message"),
    [
        (IMAGE[..., :1], NOISE, r"images must be \[B, H, W, 3\]"),
        (IMAGE[:, :6], NOISE, "the model is for images of 8 × 8, not 6 × 8"),
        (IMAGE, NOISE[:, :4], r"noise must be \[3, 16\], one per patch, not \[3, 4\]"),
    ],
)
def test_images_and_noise_that_do_not_fit_are_refused(image, noise, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(lambda: MODEL.init(jax.random.key(0), image, noise))


def test_a_config_that_cannot_be_built_is_refused():
    with pytest.raises(ConfigError, match=r"mask_ratio must be in \(0, 1\), not 1.0"):
        replace(MODEL.cfg, mask_ratio=1.0)
    with pytest.raises(ConfigError, match="num_layers and d_model must be at least 1, not 0 and 16"):
        replace(MODEL.cfg, num_layers=0)
    greedy = MODEL.clone(cfg=replace(MODEL.cfg, mask_ratio=0.95))
    with pytest.raises(ConfigError, match="keeps 0 of 16 patches"):
        greedy.init(jax.random.key(0), IMAGE, NOISE)
