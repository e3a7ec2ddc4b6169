from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.core.errors import ConfigError
from fm_jax.generate import decode
from fm_jax.generate.decode import generate
from fm_jax.generate.sample import GREEDY, Config
from tests.close import close
from tests.generate import toy

LENGTHS = np.array([3, 6, 1], np.int32)
PROMPTS = np.random.default_rng(0).integers(0, 19, (3, 6)).astype(np.int32)
NEW = 8
SAMPLED = Config(temperature=0.9, top_k=12, top_p=0.95, repetition_penalty=1.1)


def rows(out: decode.Output) -> list[list[int]]:
    return [tokens[:count].tolist() for tokens, count in zip(np.asarray(out.tokens), out.lengths, strict=True)]


@pytest.mark.parametrize("form", [toy.gpt, toy.llama, partial(toy.markov, 19)])
def test_cached_logits_equal_a_full_forward_at_every_step(form):
    model, params = form()
    texts = np.random.default_rng(1).integers(0, 19, (3, 6 + NEW)).astype(np.int32)
    expected = [toy.full(model, params, text) for text in texts]
    for at, logits in toy.cached(model, params, texts, LENGTHS):
        for row in range(3):
            close(logits[row], expected[row][at[row] - 1], 2e-5)


@pytest.fixture(scope="module")
def greedy() -> decode.Output:
    return generate(*toy.gpt(), PROMPTS, LENGTHS, max_new_tokens=NEW)


@pytest.fixture(scope="module")
def sampled() -> decode.Output:
    return generate(*toy.gpt(), PROMPTS, LENGTHS, max_new_tokens=NEW, cfg=SAMPLED, key=jax.random.key(0))


def test_greedy_is_the_argmax_of_a_full_forward_at_every_step(greedy):
    model, params = toy.gpt()
    for row, new in enumerate(rows(greedy)):
        text = [*PROMPTS[row, : LENGTHS[row]], *new]
        logits = toy.full(model, params, text)[LENGTHS[row] - 1 : -1]
        assert new == logits.argmax(-1).tolist() and len(new) == NEW
    assert not greedy.finished.any() and int(greedy.steps) == NEW - 1


def test_logprobs_are_those_of_the_model_itself(greedy, sampled):
    model, params = toy.gpt()
    for out in (greedy, sampled):
        for row, new in enumerate(rows(out)):
            logits = toy.full(model, params, [*PROMPTS[row, : LENGTHS[row]], *new])[LENGTHS[row] - 1 : -1]
            expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(NEW), new]
            close(out.logprobs[row], expected)


def test_a_row_is_the_same_alone_and_under_any_padding(greedy, sampled):
    model, params = toy.gpt()
    drawn = {"cfg": SAMPLED, "key": jax.random.key(0)}
    for row, out, options in ((0, greedy, {}), (1, sampled, drawn)):
        own = PROMPTS[row : row + 1, : LENGTHS[row]]
        alone = generate(model, params, own, LENGTHS[row : row + 1], max_new_tokens=NEW, seeds=[row], **options)
        assert rows(alone) == [rows(out)[row]]
        close(alone.logprobs[0], out.logprobs[row])
        beyond = np.where(np.arange(6) < LENGTHS[:, None], PROMPTS, 10_000)  # an id that looks up NaN
        assert rows(generate(model, params, beyond, LENGTHS, max_new_tokens=NEW, **options)) == rows(out)


def test_the_key_and_the_seed_alone_decide_what_is_drawn(sampled):
    again = partial(generate, *toy.gpt(), PROMPTS, LENGTHS, max_new_tokens=NEW, cfg=SAMPLED)
    assert rows(again(key=jax.random.key(0))) == rows(sampled)
    assert rows(again(key=jax.random.key(1))) != rows(sampled)
    same = generate(
        *toy.gpt(),
        np.repeat(PROMPTS[1:2], 3, 0),
        np.array([6, 6, 6]),
        max_new_tokens=NEW,
        cfg=SAMPLED,
        key=jax.random.key(0),
        seeds=np.array([1, 1, 5]),
    )
    texts = rows(same)
    assert texts[0] == texts[1] == rows(sampled)[1] and texts[2] != texts[0]


def test_every_step_draws_anew():
    model, params = toy.Markov(toy.Config(50)), {"table": jnp.zeros((50, 50, 50))}
    out = generate(
        model, params, np.ones((4, 1), int), np.ones(4, int), max_new_tokens=20, cfg=Config(), key=jax.random.key(0)
    )
    # 20 draws from 50 equal tokens hold 16.6 different ones on average
    assert min(len(set(new)) for new in rows(out)) > 10
    assert len(set(map(tuple, rows(out)))) == 4


def test_equal_calls_compile_once_and_work_inside_jit(greedy):
    model, params = toy.gpt()
    compiled = decode._generate._cache_size()
    generate(type(model)(model.cfg), params, PROMPTS[:, ::-1], LENGTHS, max_new_tokens=NEW)
    assert decode._generate._cache_size() == compiled
    inside = jax.jit(partial(generate, model, max_new_tokens=NEW, cfg=GREEDY))(params, PROMPTS, LENGTHS)
    assert rows(inside) == rows(greedy)


def test_a_batch_split_over_devices_gives_the_same_text(sampled):
    model, params = toy.gpt()
    mesh = jax.make_mesh((3,), ("data",), devices=jax.devices()[:3], axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("data"))
    prompts, lengths = jax.device_put((PROMPTS, LENGTHS), split)
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    out = generate(model, params, prompts, lengths, max_new_tokens=NEW, cfg=SAMPLED, key=jax.random.key(0))
    assert rows(out) == rows(sampled)


def test_the_loop_ends_with_the_last_row():
    # 0 → 1 → 2 → … → 9 (the end) → 0
    model, params = toy.chain({token: (token + 1) % 10 for token in range(10)}, 10)
    run = partial(generate, model, params, max_new_tokens=12, pad_id=99)
    out = run(np.array([[5], [7]]), np.array([1, 1]), eos_id=9)
    assert rows(out) == [[6, 7, 8, 9], [8, 9]]
    assert out.finished.all() and int(out.steps) == 3
    assert (np.asarray(out.tokens)[1, 2:] == 99).all() and (np.asarray(out.logprobs)[1, 2:] == 0).all()
    several = run(np.array([[5], [7]]), np.array([1, 1]), eos_id=(7, 9))
    assert rows(several) == [[6, 7], [8, 9]] and int(several.steps) == 1


def test_stop_sequences_count_generated_tokens_only():
    model, params = toy.chain({token: (token + 1) % 10 for token in range(10)}, 10)
    stop = ((6, 7), (2, 3, 4))
    out = generate(model, params, np.array([[5, 6], [4, 5], [9, 0]]), np.array([2, 2, 2]), max_new_tokens=14, stop=stop)
    # the 6 of row 0 and the 9, 0 of row 2 stand in the prompts and do not count
    assert rows(out) == [[7, 8, 9, 0, 1, 2, 3, 4], [6, 7], [1, 2, 3, 4]]
    assert out.finished.all() and int(out.steps) == 7


def test_one_new_token_needs_no_loop():
    out = generate(*toy.markov(19), PROMPTS, LENGTHS, max_new_tokens=1)
    model, params = toy.markov(19)
    first = [toy.full(model, params, PROMPTS[row, : LENGTHS[row]])[-1].argmax() for row in range(3)]
    assert rows(out) == [[token] for token in first] and int(out.steps) == 0


def test_the_repetition_penalty_follows_the_text():
    model, params = toy.markov(19)
    out = generate(
        model, params, PROMPTS, LENGTHS, max_new_tokens=NEW, cfg=Config(temperature=0, repetition_penalty=3.0)
    )
    for row, new in enumerate(rows(out)):
        text = PROMPTS[row, : LENGTHS[row]].tolist()
        for token in new:
            logits = toy.full(model, params, text)[-1].copy()
            past = list(set(text))
            logits[past] = np.where(logits[past] > 0, logits[past] / 3.0, logits[past] * 3.0)
            assert token == logits.argmax()
            text.append(token)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 15}, r"prompts of 6 tokens \+ max_new_tokens 15 = 21 exceed max_length 20"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"lengths": np.array([3, 0, 1])}, "the length of prompt 1 must be between 1 and 6, not 0"),
        ({"lengths": np.array([3, 6, 7])}, "the length of prompt 2 must be between 1 and 6, not 7"),
        ({"lengths": np.array([3, 6])}, r"prompts must be \[B, T\] and lengths \[B\]"),
        ({"cfg": Config()}, "temperature 1.0 needs a key"),
        ({"stop": ((1,), ())}, "stop sequence 1 is empty"),
        ({"prompts": PROMPTS - 30}, "prompt 0 has token id -.* at position 0; the model has rows 0 … 18"),
        (
            {"prompts": PROMPTS + np.eye(3, 6, 1, int) * 30},
            "prompt 0 has token id 42 at position 1; the model has rows",
        ),
        ({"prompts": PROMPTS + 0.5}, "prompt ids must be integers, not float64"),
        ({"context": {"source": np.full((3, 2), 19)}}, "source 0 has token id 19 at position 0"),
    ],
)
def test_what_cannot_work_is_refused_before_compute(change, message):
    model, params = toy.gpt()
    options = {"prompts": PROMPTS, "lengths": LENGTHS, "max_new_tokens": NEW} | change
    compiled = decode._generate._cache_size()
    with pytest.raises(ConfigError, match=message):
        generate(model, params, **options)
    assert decode._generate._cache_size() == compiled


def test_too_long_is_refused_while_tracing_too():
    model, params = toy.gpt()
    with pytest.raises(ConfigError, match="exceed max_length 20"):
        jax.eval_shape(partial(generate, model, max_new_tokens=15), params, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS))
