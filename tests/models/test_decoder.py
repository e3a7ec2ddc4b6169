"""What a causal language model must do, held for several forms of it."""

import math
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.core import tree
from fm_jax.core.errors import ConfigError
from fm_jax.generate import decode
from fm_jax.interpret import capture
from fm_jax.layers.cache import init_cache
from fm_jax.layers.tap import Tap
from fm_jax.models.language import decoder
from fm_jax.objectives.language import next_token
from fm_jax.ops.positions import Rope
from tests.close import about, close

V, T, ROWS = 96, 16, 4
GPT = decoder.tiny()
LLAMA = replace(decoder.llama(2, 32, 4, 2, 48, vocab_size=V), max_length=64, init_std=0.0)


def windows(cfg, *sizes):
    return replace(cfg, attention=replace(cfg.attention, windows=sizes))


FORMS = {
    "gpt": GPT,
    "gpt3": windows(GPT, 0, 4),
    "mistral": windows(LLAMA, 5),
    "qwen3": replace(LLAMA, attention=replace(LLAMA.attention, qk_norm=True, num_kv_heads=1)),
}
every_form = pytest.mark.parametrize("form", FORMS)


@cache
def initialised(cfg):
    model = decoder.Decoder(cfg)
    return jax.jit(lambda key: meta.unbox(model.init(key, jnp.zeros((1, 4), jnp.int32))["params"]))(jax.random.key(0))


@cache
def fresh(cfg, scale=4.0):
    """Return parameters whose queries are scaled up, so that attention is far from uniform; windows have none."""
    params = initialised(windows(cfg, 0))
    return tree.map_with_path(lambda path, leaf: leaf * scale if path.endswith("q/kernel") else leaf, params)


@cache
def forward(cfg):
    """Return the jitted (params, tokens, positions, segments) -> logits."""
    model = decoder.Decoder(cfg)
    return jax.jit(
        lambda params, tokens, positions=None, segments=None: model.apply(
            {"params": params}, tokens, positions=positions, segments=segments
        )
    )


def tokens(rows=ROWS, time=T, seed=0):
    return np.random.default_rng(seed).integers(0, V, (rows, time), dtype=np.int32)


def reach(cfg):
    """Return how many tokens back, itself included, an output can depend on; None for all."""
    sizes = [cfg.attention.windows[i % len(cfg.attention.windows)] for i in range(cfg.num_layers)]
    return None if 0 in sizes else sum(sizes) - len(sizes) + 1


@every_form
def test_a_token_moves_nothing_before_it_bit_for_bit(form):
    cfg, rows = FORMS[form], tokens()
    plain = forward(cfg)(fresh(cfg), rows)
    for time in range(T):
        other = rows.copy()
        other[:, time] = (other[:, time] + 1) % V
        moved = np.asarray(forward(cfg)(fresh(cfg), other) != plain).any(axis=-1)
        assert not moved[:, :time].any()
        assert moved[:, time].all()
        if reach(cfg):
            assert not moved[:, time + reach(cfg) :].any()


@every_form
def test_gradients_flow_from_exactly_the_tokens_that_may_be_seen(form):
    cfg = FORMS[form]
    model, rows = decoder.Decoder(cfg), tokens(rows=1)

    @jax.jit
    def jacobian(params):
        def logit(delta, time):
            out, _ = capture.apply(model, params, rows, tap=Tap(add={"embed": delta}))
            return out[0, time, 3]

        return jax.vmap(jax.grad(logit), (None, 0))(jnp.zeros((1, T, cfg.d_model)), jnp.arange(T))

    flows = np.abs(np.asarray(jacobian(fresh(cfg))))[:, 0].max(axis=-1) > 0
    far = np.arange(T)[:, None] - np.arange(T)
    np.testing.assert_array_equal(flows, (far >= 0) & (far < (reach(cfg) or T)))


@every_form
def test_decoding_from_a_cache_is_the_full_forward_pass(form):
    """Prompts of different lengths, padded on the right; then tokens one by one, then eight at once."""
    cfg, rows, lengths = FORMS[form], tokens(), np.array([4, 3, 2, 1])
    model, params = decoder.Decoder(cfg), fresh(cfg)
    full = np.asarray(forward(cfg)(params, rows))
    cached = jax.jit(
        lambda params, cache, tokens, positions: model.apply(
            {"params": params, "cache": cache}, tokens, positions=positions, mutable=["cache"]
        )
    )
    prompt = np.where(np.arange(8) < lengths[:, None], rows[:, :8], 77)  # garbage in the padding
    places = np.broadcast_to(np.arange(8), (ROWS, 8))
    logits, kept = cached(params, init_cache(model, params, ROWS, T), prompt, places)
    for row, length in enumerate(lengths):
        close(logits[row, :length], full[row, :length], 5e-5)
    for width in (1, 1, 1, 1, 8):
        places = lengths[:, None] + np.arange(width)
        logits, kept = cached(params, kept["cache"], np.take_along_axis(rows, places, axis=1), places)
        close(logits, np.take_along_axis(full, places[..., None], axis=1), 5e-5)
        lengths = lengths + width


@every_form
def test_packed_documents_do_not_see_each_other(form):
    cfg, lengths = FORMS[form], (7, 1, 5)
    documents = [tokens(rows=1, time=length, seed=length) for length in lengths]
    places = [np.arange(length)[None] for length in lengths]
    numbers = [np.full((1, length), i + 1) for i, length in enumerate(lengths)]
    pad = np.zeros((1, T - sum(lengths)), np.int32)
    packed, positions, segments = (np.concatenate([*parts, pad], axis=1) for parts in (documents, places, numbers))
    apart = np.concatenate([np.pad(row, ((0, 0), (0, T - row.shape[1]))) for row in (*documents, documents[0])])
    together = forward(cfg)(fresh(cfg), packed, positions, segments)
    separate, start = forward(cfg)(fresh(cfg), apart), 0
    for row, length in enumerate(lengths):
        close(together[0, start : start + length], separate[row, :length])
        start += length
    assert np.isfinite(together).all()
    mixed = forward(cfg)(fresh(cfg), packed, positions, np.ones_like(segments))
    assert np.abs(np.asarray(mixed - together))[0, 7:13].max() > 1e-3  # it is the segments that keep them apart


def test_a_window_of_one_sees_itself_and_a_windowless_layer_sees_all():
    cfg, rows = windows(GPT, 1), tokens()
    other = rows.copy()
    other[:, :8] = (other[:, :8] + 1) % V
    alone = forward(cfg)(fresh(GPT), other) - forward(cfg)(fresh(GPT), rows)
    assert not alone[:, 8:].any()
    assert np.isfinite(alone).all()


@pytest.mark.parametrize("size", [1, 3, 0])
def test_windows_by_layer_compute_what_a_fixed_one_does(size):
    """Two windows of which only the first is used go by the traced path, one by the static one."""
    one = replace(GPT, num_layers=1)
    params = tree.map_with_path(lambda path, leaf: leaf[:1] if path.startswith("blocks/") else leaf, fresh(GPT))
    traced, static = windows(one, size, 7), windows(one, size)
    close(forward(traced)(params, tokens()), forward(static)(params, tokens()))


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputing_changes_no_gradient(remat):
    batch = {"tokens": tokens(), "targets": tokens(seed=1), "weights": np.ones((ROWS, T), np.float32)}

    def gradient(cfg):
        return jax.jit(jax.grad(lambda params: next_token(decoder.Decoder(cfg).apply)(params, batch, None)[0]))

    want = tree.flatten(gradient(GPT)(fresh(GPT)))
    got = tree.flatten(gradient(replace(GPT, remat=remat))(fresh(GPT)))
    scale = max(float(np.abs(leaf).max()) for leaf in want.values())  # a key bias has no gradient but rounding
    close(got, want, scale=scale)


@pytest.fixture(scope="module", name="run")
def dropout_run():
    """Return key -> (logits, what was read) of a model with every kind of dropout."""
    model = decoder.Decoder(TestDropout.cfg)
    sites = ("embed", "block.resid_pre", "block.resid_mid", "block.resid_post", "block.attn.z", "block.attn.v")

    @jax.jit
    def run(params, key):
        return capture.apply(model, params, tokens(), tap=Tap(read=sites), rngs={"dropout": key})

    return lambda key: run(fresh(GPT), key)


class TestDropout:
    cfg = replace(GPT, dropout=0.5, attention=replace(GPT.attention, dropout=0.5))

    def test_it_is_off_without_a_key(self):
        close(forward(self.cfg)(fresh(GPT), tokens()), forward(GPT)(fresh(GPT), tokens()))

    def test_it_follows_the_key(self, run):
        key = jax.random.key(0)
        one, again, other = (run(jax.random.fold_in(key, step))[0] for step in (1, 1, 2))
        np.testing.assert_array_equal(one, again)
        assert np.abs(np.asarray(one - other)).max() > 0.01

    def test_each_layer_and_each_half_drops_its_own_half_of_the_update(self, run):
        _, read = run(jax.random.key(0))
        updates = [
            read["block.resid_mid"] - read["block.resid_pre"],
            read["block.resid_post"] - read["block.resid_mid"],
        ]
        dropped = [np.asarray(update[layer] == 0).ravel() for update in updates for layer in range(2)]
        dropped.append(np.asarray(read["embed"] == 0).ravel())
        for i, one in enumerate(dropped):
            about(one.mean(), 0.5, 0.12)
            for other in dropped[:i]:
                about((one == other).mean(), 0.5, 0.12)

    def test_attention_drops_weights_and_scales_the_rest(self, run):
        """The first token attends to itself alone: its z is its v, twice or not at all, by head."""
        _, read = run(jax.random.key(0))
        ratio = np.asarray(read["block.attn.z"][:, :, 0] / read["block.attn.v"][:, :, 0])  # [L, B, H, K]
        kept = np.round(ratio[..., 0])
        close(ratio, np.broadcast_to(kept[..., None], ratio.shape))
        assert set(kept.flat) == {0.0, 2.0}
        assert (kept[0] != kept[1]).any()


@pytest.mark.parametrize(("form", "excess"), [("gpt", 0.0), ("gpt3", 0.0), ("mistral", 0.5)])
def test_a_fresh_model_knows_nothing(form, excess):
    """ln V at the start; a head of its own, of unit variance a logit, costs 1/2 more in expectation."""
    log_p = jax.nn.log_softmax(forward(FORMS[form])(fresh(FORMS[form], 1.0), tokens()))
    assert abs(-log_p.mean() - math.log(V) - excess) < 0.05  # the mean over all targets


def test_a_tied_table_learns_from_both_its_ends():
    batch = {"tokens": tokens(), "targets": tokens(seed=1), "weights": np.ones((ROWS, T), np.float32)}

    def gradient(cfg, params):
        return jax.jit(jax.grad(lambda params: next_token(decoder.Decoder(cfg).apply)(params, batch, None)[0]))(params)

    tied = gradient(GPT, fresh(GPT))
    apart = gradient(replace(GPT, tied=False), {**fresh(GPT), "head": {"kernel": fresh(GPT)["embed"]["tokens"].T}})
    both = apart["embed"]["tokens"] + apart["head"]["kernel"].T
    close(tied["embed"]["tokens"], both)
    assert np.abs(apart["embed"]["tokens"]).max() > 0 and np.abs(apart["head"]["kernel"]).max() > 0


@pytest.mark.parametrize("init_std", [0.0, 0.02])
def test_every_layer_is_drawn_with_its_own_numbers_and_the_right_spread(init_std):
    cfg = replace(GPT, d_model=64, num_layers=3, mlp=replace(GPT.mlp, d_ff=192), tied=False, init_std=init_std)
    cfg = replace(cfg, attention=replace(cfg.attention, head_dim=24))
    flat = tree.flatten(fresh(cfg, 1.0))
    for path, fan_in in {"attn/q": 64, "attn/k": 64, "attn/v": 64, "mlp/up": 64, "attn/o": 96, "mlp/down": 192}.items():
        kernels = np.asarray(flat[f"blocks/{path}/kernel"])
        std = (init_std or fan_in**-0.5) / (6**0.5 if path in ("attn/o", "mlp/down") else 1)
        assert kernels.shape[:2] == (3, fan_in)
        assert np.abs(kernels.std(axis=(1, 2)) / std - 1).max() < 0.05
        assert np.corrcoef(kernels[0].ravel(), kernels[1].ravel())[0, 1] < 0.1
    about(flat["head/kernel"].std(), init_std or 64**-0.5, 0.05)
    about(flat["embed/tokens"].std(), 0.02, 0.05)
    assert not any(leaf.any() for path, leaf in flat.items() if path.endswith("bias"))
    assert all((leaf == 1).all() for path, leaf in flat.items() if path.endswith("scale"))


@pytest.mark.parametrize("form", ["gpt", "mistral"])
def test_half_precision_is_of_the_computation_only(form):
    cfg = replace(FORMS[form], dtype="bfloat16")
    model = decoder.Decoder(cfg)

    @jax.jit
    def compute(params):
        def score(params):
            logits = model.apply({"params": params}, tokens())
            return jnp.square(logits).sum(), logits

        return jax.grad(score, has_aux=True)(params)

    gradient, logits = compute(fresh(FORMS[form], 1.0))
    assert {leaf.dtype for leaf in jax.tree.leaves((fresh(cfg), gradient))} == {jnp.dtype("float32")}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert logits.dtype == jnp.float32
    exact = np.asarray(forward(FORMS[form])(fresh(FORMS[form], 1.0), tokens()))
    close(logits, exact, 0.2)
    assert np.abs(logits - exact).max() / exact.std() > 1e-4
    assert (logits != logits.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9  # summed in float32, not rounded


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, not 0"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(GPT, **change)
    with pytest.raises(ConfigError, match="d_model 30 must be a multiple of num_heads 4"):
        decoder.gpt(2, 30, 4)


def test_a_longer_input_than_the_context_is_refused():
    with pytest.raises(ConfigError, match="33 tokens exceed the model's max_length 32"):
        jax.eval_shape(decoder.Decoder(GPT).init, jax.random.key(0), jnp.zeros((1, 33), jnp.int32))


def test_scores_are_divided_by_the_number_of_their_layer():
    cfg, rows = replace(GPT, scale_by_depth=True), tokens(rows=1)
    read = Tap(read=("block.attn.scores", "block.resid_pre"))
    _, divided = capture.apply(decoder.Decoder(cfg), fresh(GPT), rows, tap=read)
    _, plain = capture.apply(decoder.Decoder(GPT), fresh(GPT), rows, tap=read)
    close(divided["block.attn.scores"][0], plain["block.attn.scores"][0])
    # the same input in layer 2 shows the factor: it is put there
    put = Tap(
        read=("block.attn.scores",), put={"block.resid_pre": (np.ones((2, 1, 1, 1)) > 0, plain["block.resid_pre"])}
    )
    _, again = capture.apply(decoder.Decoder(cfg), fresh(GPT), rows, tap=put)
    close(again["block.attn.scores"][1], plain["block.attn.scores"][1] / 2)


@pytest.mark.parametrize("method", ["dynamic", "longrope"])
def test_a_prompt_beyond_the_original_length_is_turned_as_the_text_is(method):
    """Eight positions are the original length; the rows have sixteen."""
    divisors = {"short_factors": (1.0,) * 4, "long_factors": (2.0,) * 4} if method == "longrope" else {}
    rope = Rope(scaling=method, factor=4.0, original_length=8, **divisors)
    cfg = replace(LLAMA, attention=replace(LLAMA.attention, rope=rope))
    model, params, rows = decoder.Decoder(cfg), fresh(LLAMA), tokens(rows=2)
    logits, _ = decode.prefill(model, params, init_cache(model, params, 2, T), rows, jnp.array([T, T]))
    close(logits, forward(cfg)(params, rows)[:, -1])
    plain = forward(LLAMA)(params, rows)[:, -1]
    assert float(jnp.abs(logits - plain).max()) > 0.05 * float(plain.std())
