from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.core.errors import ConfigError
from fm_jax.generate.beam import Config, Output, search
from fm_jax.generate.decode import generate
from tests.close import close
from tests.generate import toy

VOCAB, NEW, EOS = 4, 4, 0
PROMPTS = np.array([[1, 2, 3], [3, 3, 1]], np.int32)
LENGTHS = np.array([3, 2], np.int32)


def brute_force(table: np.ndarray, prompt, length_penalty: float) -> list[tuple[float, list[int]]]:
    """Every text of up to NEW tokens that ends with EOS or for want of room, best score first."""
    logprobs = np.asarray(jax.nn.log_softmax(table))
    found = {}
    for tokens in product(range(VOCAB), repeat=NEW):
        tokens = tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens
        text = [*prompt, *tokens]
        total = sum(logprobs[text[at - 2], text[at - 1], text[at]] for at in range(len(prompt), len(text)))
        found[tokens] = total / len(tokens) ** length_penalty
    return sorted(((score, list(tokens)) for tokens, score in found.items()), reverse=True)


def texts(out: Output, row: int) -> list[list[int]]:
    return [
        tokens[:count].tolist() for tokens, count in zip(np.asarray(out.tokens)[row], out.lengths[row], strict=True)
    ]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5, -1.0])
def test_a_wide_search_equals_brute_force(length_penalty):
    model, params = toy.markov(VOCAB, seed=3)
    # at most 27 texts are open and at most 36 are to be ranked before the last token: nothing is dropped until then
    cfg = Config(36, length_penalty, early_stopping="never")
    out = search(model, params, PROMPTS, LENGTHS, max_new_tokens=NEW, cfg=cfg, eos_id=EOS, pad_id=9)
    for row in range(2):
        expected = brute_force(params["table"], PROMPTS[row, : LENGTHS[row]], length_penalty)
        close(out.scores[row], np.array([score for score, _ in expected[:36]]))
        # by their scores, since texts that go round a cycle from another token tie
        known = {tuple(tokens): score for score, tokens in expected}
        found = [tuple(tokens) for tokens in texts(out, row)]
        assert len(set(found)) == 36
        close(out.scores[row], np.array([known[tokens] for tokens in found]))
        assert out.finished[row].tolist() == [tokens[-1] == EOS for tokens in found]


@pytest.mark.parametrize(("length_penalty", "eos"), [(1.0, (EOS,)), (0.0, (EOS,)), (3.0, (0, 2))])
def test_a_narrow_search_equals_a_loop_over_lists(length_penalty, eos):
    model, params = toy.markov(VOCAB, seed=5)
    logprobs = np.asarray(jax.nn.log_softmax(params["table"]))
    prompts = list(product(range(VOCAB), repeat=2))
    cfg = Config(2, length_penalty, early_stopping="never")
    out = search(model, params, np.array(prompts), np.full(16, 2), max_new_tokens=NEW, cfg=cfg, eos_id=eos)
    for row in range(16):
        prompt = list(prompts[row])
        beams, pool = [(0.0, [])], []
        for length in range(1, NEW + 1):
            grown = [
                (score + logprobs[(prompt + new)[-2], (prompt + new)[-1], token], [*new, token])
                for score, new in beams
                for token in range(VOCAB)
            ]
            grown.sort(reverse=True)
            over = [
                (score / length**length_penalty, new) for score, new in grown[:2] if new[-1] in eos or length == NEW
            ]
            pool = sorted([*pool, *over], reverse=True)[:2]
            beams = [beam for beam in grown if beam[1][-1] not in eos][:2]
        assert texts(out, row) == [new for _, new in pool]
        close(out.scores[row], np.array([score for score, _ in pool]))


@pytest.fixture(scope="module")
def found() -> Output:
    return search(*toy.gpt(), PROMPTS, LENGTHS, max_new_tokens=8, cfg=Config(3), eos_id=2, pad_id=18)


def test_scores_and_logprobs_equal_a_full_forward(found):
    # fails unless the cache follows the beams when they change places
    model, params = toy.gpt()
    for row, prompt in enumerate(PROMPTS):
        for beam, new in enumerate(texts(found, row)):
            logits = toy.full(model, params, [*prompt[: LENGTHS[row]], *new])[LENGTHS[row] - 1 : -1]
            expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(new)), new]
            close(found.logprobs[row, beam, : len(new)], expected)
            close(found.scores[row, beam], expected.sum() / len(new))
            assert (np.asarray(found.tokens)[row, beam, len(new) :] == 18).all()
            assert (np.asarray(found.logprobs)[row, beam, len(new) :] == 0).all()
        assert (np.diff(found.scores[row]) <= 0).all()


def test_a_row_is_the_same_alone(found):
    alone = search(*toy.gpt(), PROMPTS[1:, :2], LENGTHS[1:], max_new_tokens=8, cfg=Config(3), eos_id=2, pad_id=18)
    assert texts(alone, 0) == texts(found, 1)
    close(alone.scores[0], found.scores[1])


@pytest.mark.parametrize("eos_id", [None, 0, (0, 5, 7)])
def test_one_beam_is_greedy(eos_id):
    model, params = toy.markov(11, seed=1)
    prompts, lengths = np.arange(11)[:, None], np.ones(11, np.int32)
    greedy = generate(model, params, prompts, lengths, max_new_tokens=6, eos_id=eos_id)
    beam = search(model, params, prompts, lengths, max_new_tokens=6, cfg=Config(1), eos_id=eos_id)
    np.testing.assert_array_equal(beam.tokens[:, 0], greedy.tokens)
    np.testing.assert_array_equal(beam.lengths[:, 0], greedy.lengths)
    np.testing.assert_array_equal(beam.finished[:, 0], greedy.finished)
    close(beam.logprobs[:, 0], greedy.logprobs)


def test_four_beams_find_likelier_texts_than_one():
    model, params = toy.markov(11, seed=1)
    prompts, lengths = np.arange(11)[:, None], np.ones(11, np.int32)
    run = partial(search, model, params, prompts, lengths, max_new_tokens=6)
    one, four = run(cfg=Config(1)).scores[:, 0], run(cfg=Config(4)).scores[:, 0]
    assert four.mean() > one.mean() + 0.01 and (four > one + 1e-3).sum() > (four < one - 1e-3).sum()


def test_the_length_penalty_chooses_between_short_and_long():
    # from 1: the end at once (p = 0.5), or the certain 2 2 2 … (p = 0.5, then 0.9 a token)
    table = np.full((4, 4, 4), -30.0, np.float32)
    table[:, 1, [0, 2]] = np.log(0.5)
    table[:, 2, [0, 2]] = np.log([0.1, 0.9])
    run = partial(
        search, toy.Markov(toy.Config(4)), {"table": jnp.asarray(table)}, np.array([[1]]), np.array([1]),
        max_new_tokens=6, eos_id=0,
    )  # fmt: skip
    short = run(cfg=Config(2, length_penalty=0.0, early_stopping="never"))
    long = run(cfg=Config(2, length_penalty=1.0, early_stopping="never"))
    assert texts(short, 0)[0] == [0] and texts(long, 0)[0] == [2] * 6
    close(long.scores[0, 0], (np.log(0.5) + 5 * np.log(0.9)) / 6)


def test_early_stopping_ends_the_search_sooner():
    # each token is followed by the end (p = 0.4) or by 2 (p = 0.6)
    table = np.full((4, 4, 4), -30.0, np.float32)
    table[:, :, [0, 2]] = np.log([0.4, 0.6])
    run = partial(
        search, toy.Markov(toy.Config(4)), {"table": jnp.asarray(table)}, np.array([[1]]), np.array([1]),
        max_new_tokens=12, eos_id=0,
    )  # fmt: skip
    steps = {
        early: int(run(cfg=Config(2, length_penalty=1.0, early_stopping=early)).steps) for early in (True, "never")
    }
    assert steps == {True: 1, "never": 11}  # two ended texts after two tokens; a longer one stays possible
    assert int(run(cfg=Config(2, length_penalty=0.0, early_stopping=False)).steps) == 2


def test_places_without_a_text_are_marked():
    model, params = toy.markov(2, seed=0)
    out = search(model, params, np.array([[1]]), np.array([1]), max_new_tokens=1, cfg=Config(5), eos_id=0, pad_id=9)
    assert np.isfinite(out.scores[0]).sum() == 2
    assert out.lengths[0].tolist() == [1, 1, 0, 0, 0] and (np.asarray(out.tokens)[0, 2:] == 9).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_beams": 0}, "num_beams must be a whole number of at least 1, not 0"),
        ({"length_penalty": float("inf")}, "length_penalty must be a number"),
        ({"early_stopping": "always"}, "early_stopping must be true, false or \"never\", not 'always'"),
    ],
)
def test_values_out_of_range_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Config(**change)


def test_too_long_is_refused():
    with pytest.raises(ConfigError, match=r"prompts of 3 tokens \+ max_new_tokens 18 = 21 exceed max_length 20"):
        search(*toy.gpt(), PROMPTS, LENGTHS, max_new_tokens=18)
