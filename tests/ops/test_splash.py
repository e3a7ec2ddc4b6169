"""The fused kernel of a TPU, interpreted on the CPU, against XLA's form: outputs and all three gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.ops import attention as ops
from fm_jax.ops import splash
from tests.close import close

B, T, S, H, G, K = 2, 384, 384, 4, 2, 16  # three blocks of 128 each way
SCALE = 0.3
ENDS = np.array([[70, 200, 384], [129, 131, 350]])  # of two rows' documents; what follows the last is padding
PACKED = jnp.asarray((np.arange(T)[None, None] >= ENDS[..., None]).sum(1), jnp.int32)
REAL = jnp.arange(S)[None] < jnp.array([S, 77])[:, None]

CASES = {
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window": 100},
    "segments": {"segments": PACKED},
    "causal segments": {"is_causal": True, "segments": PACKED},
    "padding": {"keys": REAL},
}


def heads(time=T, length=S, groups=G, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = (time, H), (length, groups), (length, groups)
    return tuple(jnp.asarray(rng.normal(size=(B, *shape, K)), dtype) for shape in shapes)


def both(form, **how):
    """Return what gives a form's output and the gradients of a sum that weighs every number of it otherwise."""

    @jax.jit
    def run(*inputs, **traced):
        out, pull = jax.vjp(partial(form, scale=SCALE, **how, **traced), *inputs)
        return out, pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape).astype(out.dtype))

    return run


kernel = partial(splash.attend, interpret=True)


@pytest.mark.parametrize("case", CASES)
def test_it_is_xlas_form(case):
    how, inputs = CASES[case], heads(128 if case == "padding" else T)
    close(both(kernel, **how)(*inputs), both(ops.attention, **how)(*inputs))


def test_each_layer_of_a_stack_may_have_a_window_of_its_own():
    traced = both(kernel, is_causal=True, windows=(0, 100, 0))
    for window in (0, 100):
        want = both(ops.attention, is_causal=True, window=window)(*heads())
        close(traced(*heads(), window=jnp.array(window)), want)


def test_on_a_mesh_every_device_computes_its_part():
    """Rows, heads and queries are split; two parts of the heads share the one key head."""
    inputs, how = heads(256, 256, groups=1), {"is_causal": True, "segments": PACKED[:, :256]}
    want = both(ops.attention, **how)(*inputs)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2, sequence=2))):
        run = both(kernel, **how).lower(*inputs).compile()
        got = run(*inputs)
    close(got, want)
    assert "all-reduce" in run.as_text()  # of the keys' gradients


def test_half_precision_is_as_near_to_the_truth_as_xlas():
    exact = both(ops.attention, is_causal=True)(*heads())
    half = heads(dtype=jnp.bfloat16)
    for form in (kernel, ops.attention):
        out, grads = both(form, is_causal=True)(*half)
        assert {leaf.dtype for leaf in (out, *grads)} == {jnp.bfloat16.dtype}
        close(jax.tree.map(lambda leaf: leaf.astype(np.float32), (out, grads)), exact, 0.1)


def test_a_row_without_a_real_key_gives_the_mean_of_its_values_and_no_gradient():
    how = {"keys": REAL.at[1].set(False)}
    (out, grads), (want, _) = (both(form, **how)(*heads(128)) for form in (kernel, ops.attention))
    close(out, want)
    assert all(leaf[0].any() and not leaf[1].any() for leaf in grads)


FITS = {
    "bfloat16": ({"dtype": jnp.bfloat16}, True),
    "float32": ({}, True),
    "float16": ({"dtype": jnp.float16}, False),
    "five blocks of 128": ({"time": 640}, True),
    "half a block": ({"time": 576}, False),
    "too short to gain": ({"time": 384}, False),
    "a memory of another length": ({"length": 1024, "is_causal": False}, True),
    "a cache": ({"length": 1024}, False),
    "heads over devices": ({"mesh": MeshConfig(tensor=4)}, True),
    "one key head for them": ({"mesh": MeshConfig(tensor=4), "groups": 1}, True),
    "heads that do not divide": ({"mesh": MeshConfig(data=1, tensor=8)}, False),
    "nothing known of eight devices": ({"mesh": None}, False),
    "bfloat16 at a higher precision": ({"dtype": jnp.bfloat16, "precision": "highest"}, False),
    "float32 at a higher precision": ({"precision": "highest"}, True),
}


@pytest.mark.parametrize("case", FITS)
def test_it_gets_what_it_takes(case):
    form, fits = FITS[case]
    form = {"mesh": MeshConfig(), "time": 512, "groups": G, "dtype": jnp.float32, "is_causal": True, **form}
    query = jax.ShapeDtypeStruct((8, form["time"], H, K), form["dtype"])
    key = jax.ShapeDtypeStruct((8, form.get("length", form["time"]), form["groups"], K), form["dtype"])
    with jax.default_matmul_precision(form.get("precision")):
        if form["mesh"] is None:
            assert splash.fits(query, key, form["is_causal"]) == fits
            return
        with jax.set_mesh(make_mesh(form["mesh"])):
            assert splash.fits(query, key, form["is_causal"]) == fits


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_only_the_program_of_a_tpu_has_the_kernel(monkeypatch, platform):
    monkeypatch.setattr(ops, "platform", lambda: platform)
    inputs = [jax.ShapeDtypeStruct((8, 512, heads, K), jnp.float32) for heads in (H, G, G)]
    segments = jax.ShapeDtypeStruct((8, 512), jnp.int32)

    def total(query, key, value, segments):
        return ops.attention(query, key, value, scale=SCALE, is_causal=True, segments=segments).sum()

    with jax.set_mesh(make_mesh(MeshConfig())):
        traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(*inputs, segments)
        assert str(traced.jaxpr).count("pallas_call") == (3 if platform == "tpu" else 0)
        if platform != "tpu":
            text = traced.lower().as_text()
            assert "x512x512x" in text
            assert not [name for name in ("tpu_custom_call", "splash", "shmap") if name in text]
