"""The harness's rules about tokens, and the scores, against a few lines of numpy."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from flax.core import meta
from tokenizers import decoders, models, pre_tokenizers, processors

from fm_jax.core.errors import DataError, NumericError
from fm_jax.data.text import tokenizer as ours
from fm_jax.data.text.tokenizer import Tokenizer
from fm_jax.evals.scores import harness
from fm_jax.evals.scores.harness import Options, Pair
from fm_jax.models.language import decoder
from tests.close import close

TEXT = "the cat sat on the mat and the cat saw the rat that sat on the mat\n" * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return ours.train([TEXT], 270)


@pytest.fixture(scope="module")
def starting() -> Tokenizer:
    """Words, of which every framed text has a start token in front, as LLaMA's has."""
    words = {word: index for index, word in enumerate(["<s>", "</s>", "<unk>", "▁a", "▁b", "▁ab", "▁"])}
    inner = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.add_special_tokens(["<s>", "</s>", "<unk>"])
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    return Tokenizer(inner, {"start": "<s>", "end": "</s>", "unknown": "<unk>"})


@pytest.fixture(scope="module")
def model() -> decoder.Decoder:
    return decoder.Decoder(replace(decoder.tiny(), vocab_size=270, max_length=24))


@pytest.fixture(scope="module")
def params(model: decoder.Decoder) -> Any:
    drawn = meta.unbox(jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"])
    return jax.tree.map(lambda leaf: np.asarray(leaf) * 3, drawn)  # so that some tokens are much likelier than others


def likelihood(model: decoder.Decoder, params: Any, pair: Pair) -> tuple[float, bool]:
    ids = pair.context + pair.continuation
    logits = np.asarray(model.apply({"params": params}, np.array([ids[:-1]], np.int32)), np.float64)[0]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = range(len(pair.context) - 1, len(ids) - 1)
    return sum(logprobs[row, ids[row + 1]] for row in rows), all(logits[row].argmax() == ids[row + 1] for row in rows)


def test_scores_equal_the_sum_of_log_probabilities(model: decoder.Decoder, params: Any) -> None:
    rng = np.random.default_rng(0)
    shapes = [(1, 1), (5, 3), (1, 7), (12, 12), (3, 21), (9, 2), (16, 1)]
    pairs = [Pair(*(rng.integers(0, 270, size).tolist() for size in shape)) for shape in shapes]
    # one that the model would write itself: what is greedy is told apart
    logits = model.apply({"params": params}, np.array([pairs[1].context], np.int32))
    pairs.append(Pair(pairs[1].context, [int(np.asarray(logits)[0, -1].argmax())]))
    found = harness.score(model, params, pairs, batch_size=3)
    wanted = [likelihood(model, params, pair) for pair in pairs]
    close([total for total, _ in found], [total for total, _ in wanted], 2e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert found[-1][1] and not all(greedy for _, greedy in found)


def test_what_is_too_long_loses_its_beginning(model: decoder.Decoder, params: Any) -> None:
    ids = np.random.default_rng(1).integers(0, 270, 40).tolist()
    assert harness.window(Pair(ids[:30], ids[30:]), 24) == ids[15:39]
    assert harness.window(Pair(ids[:15], ids[15:25]), 24) == ids[:24]  # one more than is read, the last being a target
    found, short = harness.score(model, params, [Pair(ids[:30], ids[30:]), Pair(ids[15:30], ids[30:])])
    close(found[0], short[0])
    assert found[1] == short[1]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (Pair([], [1]), "an empty context"),
        (Pair([1], []), "an empty continuation"),
        (Pair([1], [2] * 25), "a continuation has 25 tokens, but the model reads at most 24"),
    ],
)
def test_what_cannot_be_scored_is_refused(pair: Pair, message: str, model: decoder.Decoder, params: Any) -> None:
    with pytest.raises(DataError, match=message):
        harness.score(model, params, [Pair([1], [2]), pair])


def test_a_score_that_is_no_number_is_refused(model: decoder.Decoder, params: Any) -> None:
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), params)
    with pytest.raises(NumericError, match="request 0 is nan"):
        harness.score(model, broken, [Pair([1], [2])])


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17, 30])
def test_rolling_windows_score_each_token_once_with_full_windows(count: int) -> None:
    ids = list(range(100, 100 + count))
    pairs = harness.rolling(ids, 0, 8)
    assert [token for pair in pairs for token in pair.continuation] == ids
    whole = [0, *ids]
    for pair in pairs:  # each is a stretch of the text, as long as the window allows
        stretch = pair.context + pair.continuation
        begin = whole.index(stretch[0])
        assert stretch == whole[begin : begin + len(stretch)]
        assert len(stretch) == min(9, count + 1) and len(harness.window(pair, 8)) <= 8
    assert all(len(pair.context) == 1 for pair in pairs[:-1])


def test_an_empty_text_has_no_windows() -> None:
    assert harness.rolling([], 0, 8) == []


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(tokenizer: Tokenizer) -> None:
    spaced = harness.split(tokenizer, "the cat ", "sat")
    assert spaced == harness.split(tokenizer, "the cat", " sat")
    assert spaced == Pair(tokenizer.encode("the cat").tolist(), tokenizer.encode(" sat").tolist())


def test_a_pair_is_encoded_as_one_text(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("the cat").tolist()
    assert tokenizer.token(whole[0]) == "th"  # the cut goes through it
    assert harness.split(tokenizer, "t", "he cat") == Pair(tokenizer.encode("t").tolist(), whole[1:])


def test_without_a_context_a_text_stands_behind_the_start_token(tokenizer: Tokenizer, starting: Tokenizer) -> None:
    assert harness.split(tokenizer, "", "the") == Pair([tokenizer.end_id], tokenizer.encode("the").tolist())
    assert harness.split(starting, "", "a b") == Pair([0], [3, 4])
    assert harness.split(starting, "", "<s>a b") == Pair([0], [3, 4])  # it is there already


def test_a_context_has_the_special_tokens_and_only_once(starting: Tokenizer) -> None:
    assert harness.split(starting, "a", " b") == Pair([0, 3], [4])
    assert harness.encode(starting, "a b") == harness.encode(starting, "<s>a b") == [0, 3, 4]


def test_options_are_read_as_the_harness_names_them() -> None:
    assert harness.options({"until": "\n"}) == Options(("\n",))
    assert harness.options({"until": ["a", "b"], "max_gen_toks": 5, "max_tokens": 9, "do_sample": False}) == Options(
        ("a", "b"), 5
    )
    assert harness.options({"temperature": 0.7, "do_sample": False, "top_p": 0.5}) == Options()
    assert harness.options({"temperature": 0.7}) == Options(temperature=0.7, top_k=50)
    drawn = {"temperature": 0.7, "do_sample": True, "top_k": 3, "top_p": 0.9, "max_new_tokens": 4}
    assert harness.options(drawn) == Options((), 4, 0.7, 3, 0.9)


@pytest.mark.parametrize(
    ("given", "message"), [({"num_beams": 4}, "'num_beams', which is not"), ({"do_sample": True}, "temperature")]
)
def test_options_that_are_not_known_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        harness.options(given)


def test_a_text_ends_at_its_first_stop_string() -> None:
    assert harness.cut("one\ntwo. three", (".", "\n")) == "one"
    assert harness.cut("one two", ("\n", "")) == "one two"
    assert harness.cut("xab", ("b", "ab")) == "xa"  # each looks at what the one before it left


class Writer:
    """Continues every prompt with the same text, and remembers what it was asked."""

    def __init__(self, new: list[int]) -> None:
        self.new, self.seen = new, list[harness.Prompts]()

    def __call__(self, prompts: harness.Prompts) -> tuple[np.ndarray, np.ndarray]:
        self.seen.append(prompts)
        rows, count = len(prompts.tokens), prompts.options.max_new_tokens
        new = np.zeros((rows, count), np.int32)
        new[:, : len(self.new)] = self.new
        return new, np.full(rows, min(len(self.new), count))


def test_texts_go_on_to_their_stop_string_and_no_further(tokenizer: Tokenizer) -> None:
    write = Writer([*tokenizer.encode(" sat on\nthe").tolist(), tokenizer.end_id])
    short, wide = Options(("\n",), 20), Options((), 22)
    asked = [("the cat", short), ("the rat saw the cat", wide), ("the", short)]
    assert harness.generate(write, tokenizer, asked, 64, batch_size=4) == [" sat on", " sat on\nthe", " sat on"]
    first = write.seen[0]
    assert first.stop == (tuple(tokenizer.encode("\n").tolist()),) and first.seeds.tolist() == [0, 2]
    ids = tokenizer.encode("the cat")
    np.testing.assert_array_equal(first.tokens[0, : first.lengths[0]], ids)


def test_a_context_makes_room_for_the_new_tokens(tokenizer: Tokenizer) -> None:
    write, ids = Writer([5]), tokenizer.encode(TEXT[:200]).tolist()
    harness.generate(write, tokenizer, [(TEXT[:200], Options((), 20))], 32)
    assert write.seen[0].tokens.shape == (1, 12) and write.seen[0].tokens[0].tolist() == ids[-12:]


@pytest.mark.parametrize(("context", "count"), [("the", 32), ("the", 0), ("", 4)])
def test_what_cannot_go_on_is_refused(context: str, count: int, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"max_gen_toks .* to 1 … 31|an empty context"):
        harness.generate(Writer([5]), tokenizer, [(context, Options((), count))], 32)


def test_few_shapes_are_compiled(model: decoder.Decoder, params: Any) -> None:
    rng = np.random.default_rng(2)
    pairs = [Pair(rng.integers(0, 270, size).tolist(), [1, 2]) for size in range(1, 23)]
    before = harness._score._cache_size()
    harness.score(model, params, pairs, batch_size=4)
    assert harness._score._cache_size() - before <= 4  # times 16 or 24, rows 4 or 2
