from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.core.errors import ConfigError
from fm_jax.interpret import capture
from fm_jax.layers import relative
from fm_jax.layers.tap import Tap
from fm_jax.models.language import encoder_decoder
from fm_jax.models.language.encoder_decoder import EncoderDecoder
from tests.close import about, close

B, S, T = 3, 11, 6
RNG = np.random.default_rng(0)
SOURCE, TOKENS = (RNG.integers(0, 96, (B, time), dtype=np.int32) for time in (S, T))
LENGTH = np.array([11, 7, 2], np.int32)
INPUTS = TOKENS, SOURCE, LENGTH
READ = RNG.normal(size=(1, 1, 96)).astype(np.float32)  # what makes one number of a position's logits
TINY = encoder_decoder.tiny()
V1_1 = replace(TINY, mlp=replace(TINY.mlp, activation="gelu_tanh", gated=True), tied=False, scale_head=False)

PRESETS = {
    "t5_small": 60_506_624, "t5_base": 222_903_552, "t5_large": 737_668_096, "t5_3b": 2_851_598_336,
    "t5_11b": 11_307_321_344, "t5_v1_1_small": 76_961_152, "t5_v1_1_base": 247_577_856, "t5_v1_1_large": 783_150_080,
    "t5_v1_1_xl": 2_849_757_184, "t5_v1_1_xxl": 11_135_332_352, "mt5_small": 300_176_768, "mt5_base": 582_401_280,
    "mt5_large": 1_229_581_312, "mt5_xl": 3_742_619_648, "mt5_xxl": 12_921_057_280,
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_published_number_of_parameters(preset):
    model, one = EncoderDecoder(getattr(encoder_decoder, preset)()), jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), one, one)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PRESETS[preset]


@cache
def made(cfg=TINY):
    model = EncoderDecoder(cfg)
    fresh = meta.unbox(jax.jit(model.init)(jax.random.key(0), *INPUTS)["params"])
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32), fresh)


@cache
def run(cfg=TINY):
    model, _ = made(cfg)
    return jax.jit(lambda params, *inputs, **more: model.apply({"params": params}, *inputs, **more))


@pytest.mark.parametrize("cfg", [TINY, V1_1], ids=["v1.0", "v1.1"])
def test_a_position_reads_what_is_not_after_it_and_the_real_source(cfg):
    model, params = made(cfg)

    def flow(source, tokens):
        """Return [T, S] and [T, T]: how much each position's output moves with the embedding of each input."""

        def outputs(before, here):
            tap = Tap(add={"encoder.embed": before, "embed": here})
            return (capture.apply(model, params, tokens, source, LENGTH, tap=tap)[0] * READ).sum(-1)[1]

        zeros = jnp.zeros((B, S, 32)), jnp.zeros((B, T, 32))
        return [jnp.abs(slope[:, 1]).sum(-1) for slope in jax.jacobian(outputs, argnums=(0, 1))(*zeros)]

    of_source, of_tokens = jax.jit(flow)(SOURCE, TOKENS)
    assert (np.asarray(of_source > 0) == (np.arange(S) < LENGTH[1])).all()
    assert (np.asarray(of_tokens > 0) == np.tri(T, dtype=bool)).all()


def test_what_pads_the_source_changes_nothing():
    _, params = made()
    plain = run()(params, *INPUTS)
    beyond = np.where(np.arange(S) < LENGTH[:, None], SOURCE, 10_000)  # an id that looks up NaN
    np.testing.assert_array_equal(run()(params, TOKENS, beyond, LENGTH), plain)
    wider = np.pad(SOURCE, ((0, 0), (0, 5)), constant_values=3)
    close(run()(params, TOKENS, wider, LENGTH), plain)
    for row in range(B):
        alone = run()(params, TOKENS[row : row + 1], SOURCE[row : row + 1, : LENGTH[row]])
        close(alone[0], plain[row])


def test_packed_targets_are_those_of_each_alone():
    """They read one source, and start again at position 0."""
    _, params = made()
    where = {"positions": np.array([[0, 1, 2, 0, 1, 2]] * B), "segments": np.array([[0, 0, 0, 1, 1, 1]] * B)}
    packed = run()(params, *INPUTS, **where)
    for part in (slice(0, 3), slice(3, 6)):
        close(packed[:, part], run()(params, TOKENS[:, part], SOURCE, LENGTH))


def test_a_stack_looks_its_bias_up_once(monkeypatch):
    model, params = made(replace(TINY, num_encoder_layers=3, num_decoder_layers=4))
    calls, real = [], relative.bucket
    monkeypatch.setattr(relative, "bucket", lambda *args, **how: calls.append(how) or real(*args, **how))
    jax.eval_shape(lambda params: model.apply({"params": params}, *INPUTS), params)
    assert calls == [{"bidirectional": True}, {"bidirectional": False}]
    assert params["encoder"]["bias"]["table"].shape == params["decoder"]["bias"]["table"].shape == (8, 4)


def test_it_starts_as_in_the_paper():
    """Queries smaller by sqrt(K), the rest by fan-in, the table of unit variance; a tied head gives logits near 1."""
    cfg = encoder_decoder.t5(1, 256, 8, 512, 32, vocab_size=512)
    one = np.zeros((1, 64), np.int32)
    model, tokens = EncoderDecoder(cfg), np.arange(64, dtype=np.int32)[None]
    params = meta.unbox(jax.jit(model.init)(jax.random.key(0), one, one)["params"])
    for side, kinds in {"encoder": ("attn",), "decoder": ("attn", "cross")}.items():
        blocks = params[side]["blocks"]
        for kind in kinds:
            spread = {name: float(blocks[kind][name]["kernel"].std()) for name in "qkvo"}
            want = {"q": (256 * 32) ** -0.5, "k": 256**-0.5, "v": 256**-0.5, "o": 256**-0.5}
            for name in want:
                about(spread[name], want[name], 0.03)
        about(float(blocks["mlp"]["up"]["kernel"].std()), 256**-0.5, 0.03)
        about(float(blocks["mlp"]["down"]["kernel"].std()), 512**-0.5, 0.03)
        about(float(params[side]["bias"]["table"].std()), 256**-0.5, 0.2)
    about(float(params["embed"]["tokens"].std()), 1.0, 0.03)
    logits = model.apply({"params": params}, tokens, tokens)
    assert 0.5 < float(logits.std()) < 1.5


def test_dropout_acts_in_every_place_and_with_a_key_only():
    cfg = encoder_decoder.with_dropout(TINY, 0.5)
    _, params = made()
    plain = run()(params, *INPUTS)
    assert cfg.attention.dropout == cfg.mlp.dropout == cfg.dropout == 0.5
    close(run(cfg)(params, *INPUTS), plain)
    attention, mlp = replace(TINY, attention=cfg.attention), replace(TINY, mlp=cfg.mlp)
    for one in (attention, mlp, replace(TINY, dropout=0.5)):
        dropped = EncoderDecoder(one).apply({"params": params}, *INPUTS, rngs={"dropout": jax.random.key(0)})
        assert float(jnp.abs(dropped - plain).max()) > 0.1


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputing_changes_no_gradient(remat):
    _, params = made()

    def gradient(cfg):
        def read(params):
            return (EncoderDecoder(cfg).apply({"params": params}, *INPUTS) * READ).sum()

        return jax.jit(jax.grad(read))(params)

    want, got = gradient(TINY), gradient(replace(TINY, remat=remat))
    close(got, want, 5e-5)


def test_half_precision_gives_float32_logits_near_the_whole_ones():
    _, params = made()
    half = run(replace(TINY, dtype="bfloat16"))(params, *INPUTS)
    assert half.dtype == jnp.float32
    whole = run()(params, *INPUTS)
    close(half, whole, 0.2)
    assert float(jnp.abs(half - whole).max() / jnp.abs(whole).max()) > 1e-4  # it was computed in half


def test_without_a_source_it_needs_a_cache_that_holds_one():
    model, params = made()
    for mutable in (False, ["cache"]):
        with pytest.raises(ConfigError, match="needs a source, or a mutable cache filled from one"):
            model.apply({"params": params}, TOKENS, mutable=mutable)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_decoder_layers": 0}, "num_decoder_layers must be at least 1, not 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0"),
        ({"attention": replace(TINY.attention, causal=False)}, "attention is that of the decoder"),
        ({"attention": replace(TINY.attention, windows=(4,))}, "windows to 0"),
    ],
)
def test_what_cannot_be_built_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)
