"""ViT, DINOv2 and MAE beyond `test_live.py`: wrong programs, which must be seen, resized positions, sizes, folders."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from fm_jax.core import tree
from fm_jax.hub import families, pretrained
from fm_jax.layers import patch_embed
from fm_jax.models.vision import mae, vit
from fm_jax.objectives import reconstruct
from fm_jax.ops import patches as ops
from fm_jax.ops import random_masking
from tests.close import close, small
from tests.parity import convert
from tests.parity.changes import part
from tests.parity.comparison import TOLERANCE, expected, in_our_terms, shared
from tests.parity.distances import apart
from tests.parity.vision import vit as vits


def differs(name, change=lambda m, p: (m, p), *, scale=1.0):
    """Return the distances of a changed model or program, where the peer's embeddings were made `scale` as large."""
    peer = vits.peer(name)
    for parameter in peer.base_model.embeddings.parameters():
        parameter.data *= scale
    module, params, answer = in_our_terms(name, peer)
    module, params = change(module, params)
    return shared(name, vits.ours(module, vits.batch(name))(params), answer)


@pytest.mark.parametrize(("name", "wrong"), [("vit-labels", 1e-6), ("vit-oblong", 1e-5), ("mae", 1e-6)])
def test_a_wrong_epsilon_is_seen_where_variances_are_small(name, wrong):
    def change(model, params):
        return part(model, "norm", epsilon=wrong), params

    right = differs(name, scale=3e-3)
    found = differs(name, change, scale=3e-3)
    print({key: f"{value:.1e}" for key, value in found.items()})
    small(right["out"], TOLERANCE)
    assert found["out"] > 3 * TOLERANCE, found


def test_a_mean_over_registers_too_is_seen(monkeypatch):
    monkeypatch.setattr(vit.Config, "front", 1)
    found = differs("registers-gated")
    assert found["out"] > 3 * TOLERANCE, found


def _unplaced(kept, masking, fill):
    """Mask tokens behind the kept ones, as they stand before the patches are put back."""
    empty = jnp.broadcast_to(fill, (kept.shape[0], masking.rank.shape[1] - kept.shape[1], kept.shape[2]))
    return jnp.concatenate([kept, empty], axis=1)


def _channels_first(image, size):
    cut = REAL_PATCHIFY(image, size)
    return cut.reshape(*cut.shape[:2], size * size, -1).swapaxes(-1, -2).reshape(cut.shape)


def _columns_first(image, size):
    return REAL_PATCHIFY(image.swapaxes(1, 2), size)


def _biased(patches, epsilon=1e-6):
    mean, scale = patches.mean(-1, keepdims=True), jnp.sqrt(patches.var(-1, keepdims=True) + epsilon)
    return (patches - mean) / scale, mean, scale


REAL_PATCHIFY, REAL_MASK = ops.patchify, random_masking.mask
# what is changed -> (where, name, replacement, whether the prediction moves, whether the loss does)
BROKEN = {
    "patches not put back": (random_masking, "restore", _unplaced, True, True),
    "the loss's pixels with channels first": (ops, "patchify", _channels_first, False, True),
    "the loss's patches column by column": (ops, "patchify", _columns_first, False, True),
    "the encoder's pixels with channels first": (patch_embed, "patchify", _channels_first, True, True),
    "the encoder's patches column by column": (patch_embed, "patchify", _columns_first, True, True),
    "a biased variance": (ops, "standardise", _biased, False, True),
    "the largest noise kept": (random_masking, "mask", lambda n, k: REAL_MASK(-n, k), True, True),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_mae_is_seen(broken, monkeypatch):
    where, name, wrong, moves, costs = BROKEN[broken]
    monkeypatch.setattr(where, name, wrong)
    found = differs("mae")
    print(broken, {key: f"{value:.1e}" for key, value in found.items()})
    for error, seen in ((found["out"], moves), (found["loss"], costs)):
        if seen:
            assert error > 3 * TOLERANCE, found
        else:
            small(error, TOLERANCE)


def test_a_loss_over_all_patches_or_over_plain_pixels_is_seen():
    model, params, peer = expected("mae")
    rows = vits.batch("mae")
    fields = {"image": rows["image"], "noise": rows["noise"], "weights": np.ones(3)}

    def everywhere(*given, **options):
        drawing = model.apply(*given, **options)
        return drawing._replace(removed=jnp.ones_like(drawing.removed))

    plain = model.clone(cfg=replace(model.cfg, standardise=False))
    for apply, right in ((model.apply, True), (everywhere, False), (plain.apply, False)):
        total, weight, *_ = reconstruct.masked_patches(apply)(params, fields, None)
        error = apart(total / weight, peer["loss"])
        if right:
            small(error, TOLERANCE)
        else:
            assert error > 3 * TOLERANCE


@pytest.mark.parametrize("wrong", ["linear", "keys -0.5", "antialias"])
def test_another_way_to_resize_positions_is_seen(wrong, monkeypatch):
    real = ops.resize

    def other(table, old, new, how="bicubic"):
        if wrong == "linear":
            return real(table, old, new, "linear")
        grid = table.reshape(*old, -1)
        return jax.image.resize(grid, (*new, grid.shape[-1]), "cubic", antialias=wrong == "antialias").reshape(
            new[0] * new[1], -1
        )

    monkeypatch.setattr(patch_embed, "resize", other)
    assert differs("vit-interpolated")["out"] > 3 * TOLERANCE


def test_sines_and_cosines_stand_in_the_published_order():
    want = vits.sincos(5, 24)[0, 1:].numpy()
    close(ops.sincos((5, 5), 24), want)
    close(ops.sincos((5, 5), 24)[:, :12], want[:, :12])
    assert np.abs(ops.sincos((5, 5), 24) - np.roll(want, 12, axis=1)).max() > 0.1  # height first


@pytest.mark.parametrize(("how", "mode"), [("bicubic", "bicubic"), ("linear", "bilinear"), ("antialiased", "bicubic")])
@pytest.mark.parametrize("new", [(7, 3), (4, 9), (2, 2), (1, 1), (11, 13)])
def test_positions_are_resized_as_torch_does_it(how, mode, new):
    table = np.random.default_rng(0).normal(size=(4 * 6, 5)).astype(np.float32)
    grid = torch.from_numpy(table.reshape(1, 4, 6, 5)).permute(0, 3, 1, 2)
    smooth = how == "antialiased"
    want = torch.nn.functional.interpolate(grid, size=new, mode=mode, align_corners=False, antialias=smooth)
    want = want.permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    close(ops.resize(jnp.asarray(table), (4, 6), new, how), want, scale=np.abs(table).max())


@pytest.mark.parametrize("name", [name for name in vits.CASES if name != "vit-interpolated"])
def test_folders_go_both_ways(name, tmp_path):
    """What transformers saved opens here, and what is saved here opens there, with equal numbers."""
    peer = vits.peer(name)
    peer.save_pretrained(tmp_path / "theirs")
    found = pretrained.load(tmp_path / "theirs")
    model, params, _ = expected(name)
    assert found.module == model
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    pretrained.save(tmp_path / "ours", found.module, found.params)
    again, said = type(peer).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    got = again.state_dict()
    for key, want in peer.state_dict().items():
        if not key.endswith("mask_token") or key.startswith("decoder."):  # DINOv2's is for its pretraining only
            np.testing.assert_array_equal(got[key], want, err_msg=key)
    for key in (
        "layer_norm_eps", "hidden_act", "image_size", "patch_size", "num_channels", "qkv_bias", "norm_pix_loss",
        "mask_ratio", "layerscale_value", "mlp_ratio", "num_register_tokens", "id2label",
    ):  # fmt: skip
        if key != "hidden_act" or not getattr(peer.config, "use_swiglu_ffn", False):
            assert getattr(again.config, key, None) == getattr(peer.config, key, None), key


def test_a_bare_model_opens_in_both_directions(tmp_path):
    model, params, _ = expected("vit-labels")
    pretrained.save(tmp_path / "bare", model.backbone, params["backbone"])
    again, said = transformers.ViTModel.from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert set(said["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}  # there is none to give
    assert not said["unexpected_keys"]
    image = vits.batch("vit-labels")["image"]
    mine = model.backbone.apply({"params": params["backbone"]}, image, method="hidden")
    theirs = again.eval()(torch.from_numpy(image).permute(0, 3, 1, 2)).last_hidden_state.detach().numpy()
    close(mine, theirs, TOLERANCE, scale=theirs.std())
    again.save_pretrained(tmp_path / "again")  # with a pooler, and no prefix
    found = pretrained.load(tmp_path / "again")
    assert found.module == model.backbone
    jax.tree.map(np.testing.assert_array_equal, found.params, params["backbone"])


@pytest.mark.parametrize("size", ["base", "huge"])
def test_the_published_sizes_have_the_published_parameters(size):
    """The configs as they are published, built without memory."""
    options = {
        "base": {},
        "huge": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120,
                 "patch_size": 14},
    }[size]  # fmt: skip
    with torch.device("meta"):
        peer = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**options, norm_pix_loss=True))
    ours = convert.module({**peer.config.to_dict(), "architectures": ["ViTMAEForPreTraining"]})
    decoder, encoder = getattr(mae, f"mae_{size}")()
    norm = replace(encoder.norm, epsilon=1e-12)
    assert ours == mae.MAE(decoder, vit.ViT(replace(encoder, norm=norm)))
    assert tree.count(families.abstract(ours)) == sum(parameter.numel() for parameter in peer.parameters())
