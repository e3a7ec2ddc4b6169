import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from fm_jax.core.errors import ConfigError
from fm_jax.models.language import encoder
from fm_jax.models.language.masked_lm import MaskedLM
from fm_jax.objectives.masked_lm import Masked, masked_lm, masking
from tests.close import close

V, T, MASK, SPECIAL = 96, 24, 4, (0, 1, 2, 3, 4)
BERT = masking(MASK, V, SPECIAL)
RNG = np.random.default_rng(0)


def rows(count=512, time=T, seed=0):
    """Return right-padded rows of [CLS] … [SEP] and words of one to three tokens."""
    rng = np.random.default_rng(seed)
    length = rng.integers(time // 2, time + 1, count)[:, None]
    at = np.arange(time)
    tokens = rng.integers(5, V, (count, time))
    tokens = np.where(at == 0, 2, np.where(at == length - 1, 3, np.where(at < length, tokens, 0)))
    first = rng.uniform(size=(count, time)) < 0.6
    words = np.where((at == 0) | (at >= length - 1), -1, np.cumsum(first, axis=1))
    return {
        "tokens": tokens.astype(np.int32),
        "weights": (at < length).astype(np.float32),
        "words": words.astype(np.int32),
    }


def chi_square(counts, shares):
    expected = counts.sum() * np.asarray(shares)
    return float((np.square(counts - expected) / expected).sum())


def draw(choose, batch, seed=0):
    return jax.tree.map(np.asarray, jax.jit(choose)(jax.random.key(seed), batch))


def marked(masked, shape):
    """Return which positions were asked for, [B, T]."""
    asked = np.zeros(shape, np.int32)
    np.add.at(asked, (np.arange(shape[0])[:, None], masked.places), masked.weights.astype(int))
    return asked


def test_fifteen_percent_of_each_rows_words_are_asked_for_and_nothing_special():
    batch = rows()
    masked = draw(BERT, batch)
    asked = marked(masked, batch["tokens"].shape)
    assert asked.max() == 1  # no position twice
    free = (batch["weights"] > 0) & ~np.isin(batch["tokens"], SPECIAL)
    assert not asked[~free].any()
    np.testing.assert_array_equal(asked.sum(axis=1), np.maximum(1, np.round(0.15 * free.sum(axis=1))))
    np.testing.assert_array_equal(masked.targets, np.take_along_axis(batch["tokens"], masked.places, axis=1))
    np.testing.assert_array_equal(masked.tokens[asked == 0], batch["tokens"][asked == 0])


def test_of_these_eighty_percent_are_masked_ten_replaced_and_ten_kept():
    """Chi-square with 2 degrees of freedom, 13.8 at p = 0.001; the replaced ones spread evenly over the vocabulary."""
    batch = rows(16384, 32)
    masked = draw(BERT, batch)
    asked = marked(masked, batch["tokens"].shape) > 0
    read, were = masked.tokens[asked], batch["tokens"][asked]
    assert len(read) > 40_000
    counts = np.array([(read == MASK).sum(), ((read != MASK) & (read != were)).sum(), (read == were).sum()])
    by_chance = 0.1 / V  # a replacement may be [MASK], or the token itself
    shares = np.array([0.8 + by_chance, 0.1 - 2 * by_chance, 0.1 + by_chance])
    assert chi_square(counts, shares) < 13.8
    assert chi_square(counts, [0.85, 0.1, 0.05]) > 100  # the measure sees a wrong mixture
    others = np.bincount(read[(read != MASK) & (read != were)], minlength=V)
    others = np.delete(others, MASK)
    assert chi_square(others, np.full(V - 1, 1 / (V - 1))) < 140.9  # 94 degrees of freedom, p = 0.001


def test_every_place_is_as_likely_as_any_other():
    batch = rows(16384, 16)
    batch["tokens"][:], batch["weights"][:] = RNG.integers(5, V, batch["tokens"].shape), 1
    counts = marked(draw(BERT, batch), batch["tokens"].shape).sum(axis=0)
    assert counts.sum() == 2 * 16384
    assert chi_square(counts, np.full(16, 1 / 16)) < 37.7  # 15 degrees of freedom, p = 0.001


def test_words_are_taken_whole():
    batch = rows(2048)
    masked = draw(masking(MASK, V, SPECIAL, whole_word=True), batch)
    asked = marked(masked, batch["tokens"].shape)
    free = batch["words"] >= 0
    budget = np.maximum(1, np.round(0.15 * free.sum(axis=1)))
    sizes = []
    for row in range(len(asked)):
        for word in np.unique(batch["words"][row][free[row]]):
            pieces = asked[row][batch["words"][row] == word]
            assert pieces.min() == pieces.max()
            sizes.append((len(pieces), pieces[0]))
    assert not asked[~free].any()
    assert (asked.sum(axis=1) <= budget).all()
    assert asked.sum() > 0.9 * budget.sum()  # the rest are words too long for what was left
    assert max(size for size, taken in sizes if taken) >= 3


def test_word_numbers_may_begin_anywhere_and_begin_again():
    """A pair counts its words twice, a window of a long text begins in the middle: only neighbours tell words apart."""
    batch, middle = rows(64), np.arange(T) - T // 2
    words = np.where(middle == 0, -1, batch["words"])
    again = np.where(
        words < 0, -1, words - (middle > 0) + 1000
    )  # two words left and right of the middle share a number
    assert ((again[:, T // 2 - 1] == again[:, T // 2 + 1]) & (again[:, T // 2 + 1] >= 0)).sum() > 10
    whole = masking(MASK, V, SPECIAL, whole_word=True, rate=0.3)
    first, second = (draw(whole, {**batch, "words": x.astype(np.int32)}).tokens for x in (words, again))
    np.testing.assert_array_equal(first, second)


def test_a_row_is_masked_the_same_in_whatever_batch_it_stands():
    batch = rows(16)
    whole = draw(BERT, batch)
    part = draw(BERT, {name: field[5:9] for name, field in batch.items()})
    np.testing.assert_array_equal(whole.tokens[5:9], part.tokens)
    assert (draw(BERT, batch, seed=1).tokens != whole.tokens).any(axis=1).mean() > 0.9
    twin = {name: np.repeat(field[:1], 2, axis=0) for name, field in batch.items()}
    twin["tokens"][1, 3] += 1  # a row of its own
    assert (marked(draw(BERT, twin), (2, T))[0] != marked(draw(BERT, twin), (2, T))[1]).any()


@pytest.mark.parametrize("choose", [BERT, masking(MASK, V, SPECIAL, whole_word=True)])
def test_a_row_of_nothing_but_special_tokens_is_asked_nothing(choose):
    batch = {**rows(2), "tokens": np.full((2, T), 3, np.int32), "words": np.full((2, T), -1, np.int32)}
    masked = draw(choose, batch)
    assert masked.weights.sum() == 0
    np.testing.assert_array_equal(masked.tokens, batch["tokens"])


@pytest.mark.parametrize("options", [{"rate": 0.0}, {"rate": 1.0}])
def test_a_rate_out_of_range_is_refused(options):
    with pytest.raises(ConfigError, match="rate of masked tokens"):
        masking(MASK, V, SPECIAL, **options)
    with pytest.raises(ConfigError, match="mask_id 96"):
        masking(96, V, SPECIAL)


MODEL = MaskedLM(encoder.Encoder(encoder.tiny()), next_sentence=True)
BATCH = {**rows(6), "not_next": np.array([0, 1, 1, 0, 1, 0], np.int32)}
BATCH["types"] = (np.arange(T) > 7).astype(np.int32) * (BATCH["weights"] > 0).astype(np.int32)
BATCH["weights"][5] = 0  # a row that only fills the batch
PARAMS = jax.jit(lambda key: meta.unbox(MODEL.init(key, BATCH["tokens"])["params"]))(jax.random.key(0))


def oracle(masked, batch=BATCH):
    """Return the sums of word and next-sentence losses and their weights, in numpy from the model's logits."""
    where = {"types": batch["types"], "segments": (batch["weights"] > 0).astype(np.int32)}
    hidden = MODEL.apply({"params": PARAMS}, masked.tokens, **where, method="hidden")
    logits = np.asarray(MODEL.apply({"params": PARAMS}, hidden, method="logits"), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    asked = [(b, t, y) for b in range(6) for t, y, w in zip(*(x[b] for x in masked[1:]), strict=True) if w]
    pair = np.asarray(MODEL.apply({"params": PARAMS}, hidden, method="pair"), np.float64)
    log_q = pair - np.log(np.exp(pair).sum(-1, keepdims=True))
    words = -sum(log_p[b, t, y] for b, t, y in asked)
    return words, len(asked), -sum(log_q[b, batch["not_next"][b]] for b in range(5)), 5


def test_the_loss_is_the_textbook_one_at_exactly_the_places_asked_for():
    masked = draw(BERT, BATCH)
    loss = jax.jit(masked_lm(MODEL.apply, lambda key, batch: Masked(*map(jnp.asarray, masked))))
    total, weight, metrics = loss(PARAMS, BATCH)
    words, count, pairs, texts = oracle(masked)
    assert weight == count == masked.weights.sum()
    close(metrics["nll"][0], words)
    close(metrics["next_nll"][0], pairs)
    assert metrics["next_nll"][1] == texts
    close(total, words + masked.places.shape[1] * pairs)
    alone = {name: field for name, field in BATCH.items() if name != "not_next"}
    close(loss(PARAMS, alone)[0], words)


def test_neither_padding_nor_filling_rows_matter():
    loss = jax.jit(jax.value_and_grad(lambda params, batch, key: masked_lm(MODEL.apply, _fixed)(params, batch, key)[0]))
    other = {**BATCH, "tokens": np.where(BATCH["weights"] > 0, BATCH["tokens"], 77).astype(np.int32)}
    one, two = (loss(PARAMS, batch, None) for batch in (BATCH, other))
    close(one[0], two[0])
    close(one[1], two[1])


def _fixed(key, batch):
    """Ask for the first two places, and take them out."""
    places = jnp.broadcast_to(jnp.array([[1, 2]]), (6, 2))
    targets = jnp.take_along_axis(batch["tokens"], places, axis=1)
    tokens = batch["tokens"].at[:, 1:3].set(MASK) if hasattr(batch["tokens"], "at") else batch["tokens"]
    weights = jnp.take_along_axis(batch["weights"], places, axis=1)
    return Masked(tokens, places, jnp.where(weights > 0, targets, 0), weights)


def test_evaluation_is_the_same_every_time_and_training_is_not():
    loss = jax.jit(masked_lm(MODEL.apply, BERT))
    assert loss(PARAMS, BATCH, None)[0] == loss(PARAMS, BATCH)[0]
    one, two = (float(loss(PARAMS, BATCH, jax.random.key(seed))[0]) for seed in (1, 2))
    assert one != two
    assert one == float(loss(PARAMS, BATCH, jax.random.key(1))[0])


def test_logits_exist_at_the_places_asked_for_only():
    batch = {name: BATCH[name] for name in ("tokens", "weights", "types")}
    gradient = jax.make_jaxpr(jax.grad(lambda params: masked_lm(MODEL.apply, BERT)(params, batch)[0]))(PARAMS)
    shapes = {tuple(v.aval.shape) for eqn in _all(gradient.jaxpr) for v in eqn.outvars}
    assert (6, 4, V) in shapes  # 4 of 24 places
    assert not [shape for shape in shapes if V in shape and np.prod(shape, dtype=int) >= 6 * T * V]


def _all(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _all(inner)


def test_a_model_without_the_head_cannot_be_asked_for_pairs():
    plain = MaskedLM(encoder.Encoder(encoder.tiny()))
    params = {name: PARAMS[name] for name in ("backbone", "head")}
    with pytest.raises(ConfigError, match="next_sentence=True"):
        masked_lm(plain.apply, BERT)(params, BATCH)
