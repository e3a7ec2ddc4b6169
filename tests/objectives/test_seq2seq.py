import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.core.errors import ConfigError
from fm_jax.models.language import encoder_decoder
from fm_jax.objectives.seq2seq import seq2seq
from tests.close import close

B, S, T, V = 3, 7, 5, 96
RNG = np.random.default_rng(0)
WEIGHTS = (np.arange(T) < np.array([[5], [3], [1]])).astype(np.float32)
TARGETS = np.where(WEIGHTS > 0, RNG.integers(2, V, (B, T)), 0).astype(np.int32)
BATCH = {
    "source": RNG.integers(2, V, (B, S), dtype=np.int32),
    "source_length": np.array([7, 4, 2], np.int32),
    "tokens": np.pad(TARGETS, ((0, 0), (1, 0)))[:, :-1],
    "targets": TARGETS,
    "weights": WEIGHTS,
}
MODEL = encoder_decoder.EncoderDecoder(encoder_decoder.with_dropout(encoder_decoder.tiny(), 0.3))


@pytest.fixture(scope="module")
def params():
    made = jax.jit(MODEL.init)(jax.random.key(0), BATCH["tokens"], BATCH["source"], BATCH["source_length"])
    return meta.unbox(made["params"])


@pytest.mark.parametrize(
    "options", [{}, {"z_loss": 0.01, "label_smoothing": 0.1}, {"chunk": 4, "z_loss": 0.01, "label_smoothing": 0.1}]
)
def test_the_loss_is_the_textbook_one(params, options):
    total, weight, metrics = jax.jit(seq2seq(MODEL.apply, **options))(params, BATCH)
    inputs = (BATCH[name] for name in ("tokens", "source", "source_length"))
    logits = np.asarray(jax.jit(MODEL.apply)({"params": params}, *inputs)).astype(np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    smoothed = options.get("label_smoothing", 0.0)
    wanted = np.eye(V)[TARGETS] * (1 - smoothed) + smoothed / V
    each = -(wanted * (logits - log_z[..., None])).sum(-1) + options.get("z_loss", 0.0) * log_z**2
    close(total, (each * WEIGHTS).sum())
    assert weight == WEIGHTS.sum()
    plain = log_z - np.take_along_axis(logits, TARGETS[..., None], -1)[..., 0]
    close(metrics["nll"][0], (plain * WEIGHTS).sum())
    assert metrics["accuracy"][1] == weight


def test_the_loss_reads_the_source_up_to_its_length(params):
    loss = jax.jit(seq2seq(MODEL.apply))
    plain = float(loss(params, BATCH)[0])
    beyond = np.arange(S) >= BATCH["source_length"][:, None]
    assert float(loss(params, {**BATCH, "source": np.where(beyond, 1, BATCH["source"])})[0]) == plain
    assert abs(float(loss(params, {**BATCH, "source": np.where(beyond, BATCH["source"], 1)})[0]) - plain) > 1e-2
    assert abs(float(loss(params, {**BATCH, "source_length": BATCH["source_length"] - 1})[0]) - plain) > 1e-2


def test_dropout_comes_with_a_key_only(params):
    loss = jax.jit(seq2seq(MODEL.apply))
    still, again, noisy = (float(loss(params, BATCH, key)[0]) for key in (None, None, jax.random.key(1)))
    assert still == again and abs(noisy - still) > 1e-2


def test_without_a_source_there_is_no_loss(params):
    batch = {name: field for name, field in BATCH.items() if not name.startswith("source")}
    with pytest.raises(ConfigError, match="an encoder-decoder needs a source"):
        seq2seq(MODEL.apply)(params, {name: jnp.asarray(field) for name, field in batch.items()})
