"""Generation with layers of their own gives what it gives with a stack, and reads no weight from a stack."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.generate import beam, decode
from fm_jax.generate.sample import Config
from fm_jax.layers.cache import init_cache
from fm_jax.layers.stack import unstacked
from tests.close import close
from tests.generate import toy
from tests.generate.test_context import CONTEXT, t5

LENGTHS = np.array([3, 6, 1], np.int32)
PROMPTS = np.random.default_rng(0).integers(0, 19, (3, 6)).astype(np.int32)
NEW = 8
SAMPLED = Config(temperature=0.9, top_k=12, top_p=0.95, repetition_penalty=1.1)


def stacked(monkeypatch, run):
    """Return run() with the loop over a stack: the reference."""
    with monkeypatch.context() as patch:
        for module in (decode, beam):
            patch.setattr(module, "unstacked", lambda tree: tree)
        return run()


@pytest.mark.parametrize(("make", "context"), [(toy.llama, None), (t5, CONTEXT)])
def test_drawn_texts_are_those_of_the_stack(make, context, monkeypatch):
    options = {"cfg": SAMPLED, "key": jax.random.key(0), "eos_id": 5, "stop": ((3, 7), (11,)), "context": context}
    run = partial(decode.generate, *make(), PROMPTS, LENGTHS, max_new_tokens=NEW, **options)
    got, want = run(), stacked(monkeypatch, run)
    for name in ("tokens", "lengths", "finished", "steps"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    close(got.logprobs, want.logprobs, 1e-6)


def test_beams_are_those_of_the_stack(monkeypatch):
    run = partial(beam.search, *toy.gpt(), PROMPTS, LENGTHS, max_new_tokens=NEW, cfg=beam.Config(3), eos_id=5)
    got, want = run(), stacked(monkeypatch, run)
    for name in ("tokens", "lengths", "finished", "steps"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    close(got.logprobs, want.logprobs, 1e-6)


def test_parameters_may_be_given_in_either_form_and_compile_once():
    model, params = toy.gpt()
    run = partial(decode.generate, model, prompts=PROMPTS, lengths=LENGTHS, max_new_tokens=NEW)
    first = run(params)
    compiled = decode._generate._cache_size()
    np.testing.assert_array_equal(run(unstacked(params)).tokens, first.tokens)
    assert decode._generate._cache_size() == compiled


def test_a_cache_of_the_callers_own_may_be_stacked():
    model, params = toy.gpt()

    def own(model, params, batch, length, context):
        cache = init_cache(model, params, batch, length, context)
        return {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *cache["blocks"].values())}

    run = partial(decode.generate, model, params, PROMPTS, LENGTHS, max_new_tokens=NEW)
    np.testing.assert_array_equal(run(init_cache=own).tokens, run().tokens)


def test_split_parameters_give_the_same_text():
    model, params = toy.gpt()
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.tree.map(
        lambda leaf: jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*[None] * (leaf.ndim - 1), "tensor"))), params
    )
    run = partial(decode.generate, model, prompts=PROMPTS, lengths=LENGTHS, max_new_tokens=NEW)
    np.testing.assert_array_equal(run(split).tokens, run(params).tokens)


def test_the_token_loop_has_no_scan(monkeypatch):
    model, params = toy.gpt()
    run = partial(decode.generate, model, prompts=PROMPTS, lengths=LENGTHS, max_new_tokens=NEW)

    def scans():  # a new function each time, because traces are cached by function
        return str(jax.make_jaxpr(lambda params: run(params))(params)).count("scan[")

    assert scans() == 0
    assert stacked(monkeypatch, scans) == 2  # prefill and loop
