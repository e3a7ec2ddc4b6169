"""What is peculiar to T5's folders: a head that the config does not tell of, its scale told in two ways, leftovers."""

import jax
import numpy as np
import pytest

from fm_jax.core.errors import CheckpointError
from fm_jax.hub import families, table
from fm_jax.hub.fields import Fields
from fm_jax.hub.files.weights import Arrays
from fm_jax.hub.language import t5
from fm_jax.models.language.decoder import Decoder
from fm_jax.models.language.decoder import tiny as decoder_tiny
from fm_jax.models.language.encoder_decoder import EncoderDecoder

CONFIG = {
    "model_type": "t5", "vocab_size": 40, "d_model": 16, "d_kv": 6, "d_ff": 20, "num_layers": 2,
    "num_decoder_layers": 1, "num_heads": 3, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16, "is_encoder_decoder": True,
}  # fmt: skip


def build(**changes):
    fields = Fields({**CONFIG, **changes}, "config.json")
    module = families.reading(fields).module(fields)
    fields.close()
    return module


def stored(module):
    """A module's parameters as tensors of a file."""
    rng = np.random.default_rng(0)
    made = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), families.abstract(module))
    return dict(table.write(t5.table(module), made))


@pytest.mark.parametrize(
    ("changes", "tied", "scaled"),
    [
        ({}, True, True),
        ({"tie_word_embeddings": False}, False, False),  # as v1.1 was published
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, True, False),  # as transformers 5 writes it
        ({"model_type": "mt5", "tie_word_embeddings": True}, True, False),
        ({"model_type": "mt5", "tie_word_embeddings": False}, False, False),
    ],
)
def test_the_config_tells_of_the_heads_scale(changes, tied, scaled):
    cfg = build(**changes).cfg
    assert (cfg.tied, cfg.scale_head) == (tied, scaled)


@pytest.mark.parametrize(
    ("word", "activation", "gated"),
    [("relu", "relu", False), ("gated-gelu", "gelu_tanh", True), ("gated-silu", "silu", True), ("gelu", "gelu", False)],
)
def test_the_feed_forward_words(word, activation, gated):
    module = build(feed_forward_proj=word)
    assert (module.cfg.mlp.activation, module.cfg.mlp.gated) == (activation, gated)
    assert t5.fields(module)["feed_forward_proj"] == word
    assert ("encoder.block.0.layer.1.DenseReluDense.wi_1.weight" in stored(module)) == gated


def test_the_usual_word_is_the_familys():
    assert build().cfg.mlp.activation == "relu"
    assert build(model_type="mt5").cfg.mlp.gated


def test_a_head_in_the_file_counts_whatever_the_config_says():
    module = build(scale_decoder_outputs=False)
    tensors = stored(module)
    assert "lm_head.weight" not in tensors
    for head, tied in ((None, True), (tensors["shared.weight"], True), (tensors["shared.weight"] + 1, False)):
        file = Arrays({**tensors, **({} if head is None else {"lm_head.weight": head})})
        found = families.settled(t5, module, file)
        assert found.cfg.tied == tied and not found.cfg.scale_head
        params = table.read(t5.table(found), families.abstract(found), file)
        assert ("head" in params) == (not tied)
        if not tied:
            np.testing.assert_array_equal(params["head"]["kernel"], head.T)


def test_copies_and_leftovers_of_old_files_are_read_past():
    module = build()
    tensors = stored(module)
    shared = tensors["shared.weight"]
    old = {
        **tensors,
        "encoder.embed_tokens.weight": shared,
        "decoder.embed_tokens.weight": shared,
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": np.ones((8, 3), np.float32),
    }
    params = table.read(t5.table(module), families.abstract(module), Arrays(old))
    np.testing.assert_array_equal(params["embed"]["tokens"], shared)
    old["decoder.embed_tokens.weight"] = shared + 1
    with pytest.raises(CheckpointError, match=r"decoder\.embed_tokens\.weight differs from shared\.weight"):
        table.read(t5.table(module), families.abstract(module), Arrays(old))


def test_every_tensor_has_its_place():
    """No two leaves are exchanged: each number of the file is found at the path that its name says."""
    module = build(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    tensors = stored(module)
    marked = {name: np.full(x.shape, place, np.float32) for place, (name, x) in enumerate(tensors.items())}
    params = table.read(t5.table(module), families.abstract(module), Arrays(marked))
    place = {name: float(x.ravel()[0]) for name, x in marked.items()}
    first, cross = params["encoder"]["blocks"], params["decoder"]["blocks"]
    assert first["mlp"]["gate"]["kernel"][1, 0, 0] == place["encoder.block.1.layer.1.DenseReluDense.wi_0.weight"]
    assert first["mlp"]["up"]["kernel"][1, 0, 0] == place["encoder.block.1.layer.1.DenseReluDense.wi_1.weight"]
    assert cross["cross"]["k"]["kernel"][0, 0, 0] == place["decoder.block.0.layer.1.EncDecAttention.k.weight"]
    assert cross["norm_mlp"]["scale"][0, 0] == place["decoder.block.0.layer.2.layer_norm.weight"]
    table_name = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert params["decoder"]["bias"]["table"][0, 0] == place[table_name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["T5EncoderModel"]}, "architectures is T5EncoderModel"),
        ({"is_decoder": True}, "is_decoder is true, but only false is supported"),
        ({"feed_forward_proj": "gated-swish"}, "feed_forward_proj 'gated-swish' is not supported"),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}, 'dense_act_fn is "gelu", but only "gelu_new"'),
        ({"prefix_length": 3}, "prefix_length"),
    ],
)
def test_what_is_not_supported_is_named(changes, message):
    with pytest.raises(CheckpointError, match=message):
        build(**changes)


def test_other_modules_have_no_name_here():
    with pytest.raises(CheckpointError, match="a Decoder is not an encoder-decoder"):
        t5.table(Decoder(decoder_tiny()))
    assert isinstance(build(), EncoderDecoder)
