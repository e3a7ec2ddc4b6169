"""The fused kernel of a TPU, interpreted on the CPU, against XLA's form: outputs and all three gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.ops import attention as ops
from fm_jax.ops import splash
from tests.close import close

B, T, S, H, G, K = 2, 256, 384, 4, 2, 16
SCALE = 0.3


def heads(length=T, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(B, *shape, K)), dtype) for shape in ((T, H), (length, G), (length, G)))


def packed():
    """Return documents of two rows, whose ends are not those of blocks; the last tokens are padding."""
    ends = np.array([[70, 200, 256], [129, 131, 230]])
    return jnp.asarray((np.arange(T)[None, None] >= ends[..., None]).sum(1), jnp.int32)


CASES = {
    "all": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window": 100},
    "segments": {"segments": packed()},
    "causal segments": {"is_causal": True, "segments": packed()},
    "padding": {"keys": jnp.arange(S)[None] < jnp.array([S, 77])[:, None]},
}


def both(form, query, key, value):
    """Return a form's output and the gradients of a sum that weighs every number of it otherwise."""
    out, pull = jax.vjp(form, query, key, value)
    return out, pull(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))


@pytest.mark.parametrize("case", CASES)
def test_it_is_xlas_form(case):
    how = {"scale": SCALE, **CASES[case]}
    inputs = heads(S if "keys" in how else T)
    got = both(jax.jit(partial(splash.attend, interpret=True, **how)), *inputs)
    close(got, both(jax.jit(partial(ops.attention, **how)), *inputs))
