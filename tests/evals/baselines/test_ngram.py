"""The vectorised n-gram model against a dictionary written from the formula, and against sources of known entropy."""

import math
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.evals.baselines import ngram
from tests.close import close


def text(seed, length, symbols=b"abcde \x00\xff"):
    rng = np.random.default_rng(seed)
    return bytes(rng.choice(np.frombuffer(symbols, np.uint8), length, p=np.arange(1, 9) / 36).tobytes())


class Dictionary:
    """Interpolated Witten-Bell, as it is written on paper."""

    def __init__(self, train, order):
        self.after = defaultdict(Counter)
        for n in range(1, order + 1):
            for i in range(len(train) - n + 1):
                self.after[train[i : i + n - 1]][train[i + n - 1]] += 1

    def p(self, byte, context):
        below = 1 / 256 if not context else self.p(byte, context[1:])
        if not context:
            return self._mix(b"", byte, below)
        return self._mix(context, byte, below) if context in self.after else below

    def _mix(self, context, byte, below):
        seen = self.after[context]
        return (seen[byte] + len(seen) * below) / (sum(seen.values()) + len(seen))


@pytest.mark.parametrize("order", [1, 2, 3, 5, 8])
def test_every_order_equals_the_dictionary(order):
    train, test = text(0, 400), text(1, 120) + b"zz\x00\x00ab"
    slow, model = Dictionary(train, order), ngram.fit(train, order)
    sums = ngram.nll(model, test)
    for n in range(1, order + 1):
        wanted = -sum(math.log(slow.p(test[i], test[max(0, i - n + 1) : i])) for i in range(len(test)))
        close(sums[n - 1], wanted, 1e-9)


def test_probabilities_of_the_next_byte_sum_to_one_after_seen_and_unseen_contexts():
    train = text(0, 3000)
    model = ngram.fit(train, 5)
    rng = np.random.default_rng(0)
    seen = [train[i : i + 4] for i in rng.integers(0, 2990, 30)]
    partly = [b"\x80" + train[i : i + 3] for i in rng.integers(0, 2990, 30)]
    unseen = [rng.bytes(int(k)) for k in rng.integers(0, 9, 30)]
    for context in [*seen, *partly, *unseen, b"", train[-4:]]:
        p = ngram.distribution(model, context)
        assert p.shape == (256,) and p.min() > 0
        close(p.sum(), 1, 1e-9)


def test_a_text_costs_the_product_of_its_bytes_distributions():
    model, test = ngram.fit(text(0, 2000), 4), text(1, 50)
    chain = -sum(math.log(ngram.distribution(model, test[:i])[test[i]]) for i in range(len(test)))
    close(ngram.nll(model, test)[-1], chain, 1e-9)


def test_evaluation_does_not_depend_on_the_size_of_its_chunks(monkeypatch):
    model, test = ngram.fit(text(0, 2000), 5), text(1, 300)
    whole = ngram.nll(model, test)
    for size in (1, 3, 7, 299, 300):
        monkeypatch.setattr(ngram, "_CHUNK", size)
        close(ngram.nll(model, test), whole, 1e-9)


def markov(seed, length):
    """A source in which two bytes decide over the third, and its entropy rate in bits."""
    rng = np.random.default_rng(7)
    table = rng.dirichlet(np.full(6, 0.3), size=(6, 6))
    chain = np.zeros((36, 36))
    for a, b, c in np.ndindex(6, 6, 6):
        chain[a * 6 + b, b * 6 + c] = table[a, b, c]
    stationary = np.linalg.matrix_power(chain, 4096)[0]
    entropy = float(stationary @ -(table * np.log2(table)).sum(-1).ravel())
    uniform, out = np.random.default_rng(seed).random(length), [0, 1]
    limits = table.cumsum(-1)
    for u in uniform:
        out.append(min(int(np.searchsorted(limits[out[-2], out[-1]], u)), 5))
    return bytes(out), entropy


def test_more_context_helps_up_to_the_order_of_the_source_and_stops_at_its_entropy():
    train, entropy = markov(0, 60_000)
    bits = ngram.bits_per_byte_by_order(train, markov(1, 30_000)[0], orders=(1, 2, 3, 5))
    assert bits[1] > bits[2] + 0.1 > bits[3] + 0.2
    # Below the entropy only by the luck of 30,000 draws: 3 standard deviations are about 0.02 bits.
    assert entropy - 0.02 < bits[3] < entropy + 0.03
    assert bits[3] - 0.005 < bits[5] < bits[3] + 0.1


def test_no_model_beats_the_eight_bits_of_noise():
    rng = np.random.default_rng(0)
    bits = ngram.bits_per_byte_by_order(rng.bytes(50_000), rng.bytes(5_000))
    assert all(7.95 < value < 9 for value in bits.values())


def test_xz_pays_little_for_what_it_has_seen_and_eight_bits_for_noise():
    rng = np.random.default_rng(0)
    train = rng.bytes(100_000)
    assert ngram.xz_bits_per_byte(train, train[:20_000]) < 0.4  # the farthest part of the dictionary
    assert 7.9 < ngram.xz_bits_per_byte(train, rng.bytes(20_000)) < 8.3


def test_the_dictionary_of_xz_holds_both_texts(monkeypatch):
    import lzma

    sizes, compress = [], lzma.compress

    def spy(data, filters):
        sizes.append((len(data), filters[0]["dict_size"]))
        return compress(data, filters=filters)

    monkeypatch.setattr(lzma, "compress", spy)
    ngram.xz_bits_per_byte(bytes(9000), bytes(100))
    assert sizes == [(9000, 9100), (9100, 9100)]


def test_a_python_without_lzma_is_told_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "lzma", None)
    with pytest.raises(ConfigError, match="no lzma"):
        ngram.xz_bits_per_byte(b"abc", b"abc")


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda: ngram.fit(b"abc", 0), ConfigError, "not 0"),
        (lambda: ngram.fit(b"abc", 9), ConfigError, "not 9"),
        (lambda: ngram.fit(b"abc", 4), DataError, "has 3 bytes"),
        (lambda: ngram.fit("abc", 1), DataError, "not str"),
        (lambda: ngram.nll(ngram.fit(b"abc", 1), b""), DataError, "empty"),
        (lambda: ngram.bits_per_byte_by_order(b"abc", b"a", orders=()), ConfigError, r"\[\]"),
        (lambda: ngram.bits_per_byte_by_order(b"abc", b""), DataError, "test text is empty"),
        (lambda: ngram.xz_bits_per_byte(b"", b"a"), DataError, "training text is empty"),
    ],
)
def test_bad_input_is_refused(call, kind, said):
    with pytest.raises(kind, match=said):
        call()
