"""What a bidirectional encoder must do, held for several forms of it."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.core import tree
from fm_jax.core.errors import ConfigError
from fm_jax.interpret import capture
from fm_jax.layers.tap import Tap
from fm_jax.models.language import encoder
from fm_jax.models.language.encoder import Encoder
from tests.close import close

V, T, ROWS = 96, 16, 3
BERT = encoder.tiny()
FORMS = {
    "bert": BERT,
    "roberta": replace(BERT, num_types=1, position_offset=2),
    "distilbert": replace(BERT, num_types=0),
    "albert": replace(BERT, num_layers=3, embed_size=16, shared=True),
}
every_form = pytest.mark.parametrize("form", FORMS)
TOKENS = np.random.default_rng(0).integers(0, V, (ROWS, T), dtype=np.int32)
LENGTHS = np.array([16, 9, 1])
SEGMENTS = (np.arange(T) < LENGTHS[:, None]).astype(np.int32)


@cache
def fresh(cfg):
    """Return parameters whose queries are scaled up, so that attention is far from uniform."""
    init = jax.jit(lambda key: meta.unbox(Encoder(cfg).init(key, TOKENS)["params"]))(jax.random.key(0))
    return tree.map_with_path(lambda path, leaf: leaf * 4 if path.endswith("q/kernel") else leaf, init)


@cache
def forward(cfg):
    """Return the jitted (params, tokens, …) -> hidden states."""
    return jax.jit(lambda params, tokens, **where: Encoder(cfg).apply({"params": params}, tokens, **where))


@every_form
def test_what_stands_in_the_padding_moves_nothing_bit_for_bit(form):
    cfg, inside = FORMS[form], SEGMENTS > 0
    one, two = (
        forward(cfg)(fresh(cfg), np.where(inside, TOKENS, garbage), segments=SEGMENTS) for garbage in (0, V - 1)
    )
    np.testing.assert_array_equal(one[inside], two[inside])


@every_form
def test_a_padded_row_is_the_row_alone(form):
    cfg = FORMS[form]
    whole = forward(cfg)(fresh(cfg), TOKENS, segments=SEGMENTS)
    for row, length in enumerate(LENGTHS):
        alone = Encoder(cfg).apply({"params": fresh(cfg)}, TOKENS[row : row + 1, :length])
        close(whole[row, :length], alone[0])


@every_form
def test_packed_texts_are_the_texts_alone(form):
    cfg, cut = FORMS[form], 7
    segments = np.where(np.arange(T) < cut, 1, 2)[None].repeat(ROWS, axis=0)
    positions = np.concatenate([np.arange(cut), np.arange(T - cut)])[None].astype(np.int32)
    packed = forward(cfg)(fresh(cfg), TOKENS, segments=segments, positions=positions)
    for part in (slice(None, cut), slice(cut, None)):
        alone = Encoder(cfg).apply({"params": fresh(cfg)}, TOKENS[:, part])
        close(packed[:, part], alone)


@every_form
def test_every_token_of_its_segment_is_seen_and_no_other(form):
    cfg = FORMS[form]
    model = Encoder(cfg)

    @jax.jit
    def jacobian(params):
        def feature(delta, time):
            tap = Tap(add={"embed": delta})
            out, _ = capture.apply(model, params, TOKENS[1:2], tap=tap, segments=jnp.asarray(SEGMENTS[1:2]))
            return out[0, time, 3]

        return jax.vmap(jax.grad(feature), (None, 0))(jnp.zeros((1, T, cfg.d_model)), jnp.arange(T))

    flows = np.abs(np.asarray(jacobian(fresh(cfg))))[:, 0].max(axis=-1) > 0
    np.testing.assert_array_equal(flows, SEGMENTS[1][:, None] == SEGMENTS[1])


def test_a_shared_layer_is_a_stack_of_copies_of_itself():
    cfg = FORMS["albert"]
    params, apart = fresh(cfg), replace(cfg, shared=False)
    assert params["block"]["attn"]["q"]["kernel"].shape == (32, 32)  # one layer's, however deep the model
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * cfg.num_layers), params["block"])
    rest = {name: node for name, node in params.items() if name != "block"}
    reads = Tap(read=("block.resid_post", "block.attn.pattern"))
    got, read = capture.apply(Encoder(cfg), params, TOKENS, tap=reads)
    want, wanted = capture.apply(Encoder(apart), {**rest, "blocks": copies}, TOKENS, tap=reads)
    close(got, want)
    for site, activation in wanted.items():
        assert activation.shape[0] == cfg.num_layers
        close(read[site], activation)


@pytest.mark.parametrize(
    ("layers", "shared", "order"),
    [
        (4, (2, 1), (0, 0, 1, 1)),
        (5, (3, 1), (0, 0, 1, 1, 2)),
        (4, (1, 2), (0, 1, 0, 1)),
        (8, (2, 2), (0, 1, 0, 1, 2, 3, 2, 3)),
        (3, True, ()),
    ],
)
def test_groups_take_turns(layers, shared, order):
    assert encoder.copies(replace(FORMS["albert"], num_layers=layers, shared=shared)) == order


def test_groups_are_a_stack_of_copies():
    cfg = replace(FORMS["albert"], num_layers=4, shared=(1, 2))
    params, apart = fresh(cfg), replace(cfg, shared=False)
    assert params["block"]["0"]["attn"]["q"]["kernel"].shape == (32, 32)
    assert params["block"].keys() == {"0", "1"}
    turns = [params["block"][str(copy)] for copy in (0, 1, 0, 1)]
    stacked = {**{k: v for k, v in params.items() if k != "block"}, "blocks": jax.tree.map(stack_up, *turns)}
    reads = Tap(read=("block.resid_post",))
    got, read = capture.apply(Encoder(cfg), params, TOKENS, tap=reads)
    want, wanted = capture.apply(Encoder(apart), stacked, TOKENS, tap=reads)
    close(got, want)
    close(read["block.resid_post"], wanted["block.resid_post"])
    assert float(jnp.abs(turns[0]["attn"]["q"]["kernel"] - turns[1]["attn"]["q"]["kernel"]).max()) > 0.1


def stack_up(*leaves):
    return jnp.stack(leaves)


@pytest.mark.parametrize("shared", [(0, 2), (1, 1), (2, 2), (1, 3)])
def test_groups_that_cannot_be_are_refused(shared):
    with pytest.raises(ConfigError, match=f"shared is {shared[0]} groups of {shared[1]} layers: num_layers 2"):
        replace(encoder.tiny(), shared=shared)


def test_a_shared_layer_drops_other_units_at_every_depth():
    cfg = replace(FORMS["albert"], dropout=0.5)
    everywhere = np.ones((cfg.num_layers, 1, 1, 1), np.float32)
    tap = Tap(read=("block.resid_post",), put={"block.resid_pre": (everywhere > 0, everywhere)})
    _, read = capture.apply(Encoder(cfg), fresh(cfg), TOKENS, tap=tap, rngs={"dropout": jax.random.key(0)})
    first, second, third = read["block.resid_post"]  # every layer read the same, so only dropout tells them apart
    assert min(float(jnp.abs(first - second).max()), float(jnp.abs(second - third).max())) > 0.1


def test_positions_begin_at_the_offset():
    cfg = FORMS["roberta"]
    params = fresh(cfg)
    assert params["embed"]["positions"].shape[0] == cfg.max_length + 2
    moved = {**params, "embed": {**params["embed"], "positions": params["embed"]["positions"][2:]}}
    plain = Encoder(replace(cfg, position_offset=0)).apply({"params": moved}, TOKENS)
    close(forward(cfg)(params, TOKENS), plain)


def test_token_types_are_added_and_default_to_the_first():
    params = fresh(BERT)
    zeros, ones = np.zeros_like(TOKENS), np.ones_like(TOKENS)
    plain = forward(BERT)(params, TOKENS)
    close(forward(BERT)(params, TOKENS, types=zeros), plain)
    other = forward(BERT)(params, TOKENS, types=ones)
    swapped = forward(BERT)({**params, "types": params["types"][::-1]}, TOKENS)
    assert float(jnp.abs(other - plain).max()) > 0.01
    close(other, swapped)


def test_a_constant_embedding_has_finite_gradients_at_epsilon_1e_12():
    params = jax.tree.map(jnp.zeros_like, fresh(BERT))
    readout = np.random.default_rng(0).normal(size=(ROWS, T, 32)).astype(np.float32)
    gradient = jax.grad(lambda p: (forward(BERT)(p, TOKENS) * readout).sum())(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_the_published_sizes_have_the_published_parameters():
    counts = {
        "bert_base": 108.9, "bert_large": 334.1, "roberta_base": 124.1, "roberta_large": 354.3, "distilbert": 66.4,
        "electra_small": 13.5, "electra_base": 108.9, "albert_base": 11.1,
    }  # fmt: skip
    for name, millions in counts.items():
        model = Encoder(getattr(encoder, name)())
        found = tree.count(meta.unbox(jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]))
        assert round(found / 1e6, 1) == millions, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"embed_size": -1}, "embed_size must be at least 0"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"attention": replace(BERT.attention, causal=True)}, "attention.causal is true"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(BERT, **changes)


def test_a_text_too_long_and_types_without_a_table_are_refused():
    with pytest.raises(ConfigError, match="33 tokens exceed the model's max_length 32"):
        Encoder(BERT).init(jax.random.key(0), np.zeros((1, 33), np.int32))
    with pytest.raises(ConfigError, match="no token types"):
        Encoder(FORMS["distilbert"]).init(jax.random.key(0), TOKENS, types=TOKENS)
