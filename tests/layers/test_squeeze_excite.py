import jax
import numpy as np
from flax.core import meta

from fm_jax.layers.squeeze_excite import SqueezeExcite
from tests.close import close

X = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)


def test_the_gate_is_the_papers():
    params = meta.unbox(SqueezeExcite(2).init(jax.random.key(0), X))["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
    assert params["reduce"]["kernel"].shape == (1, 1, 8, 2)
    narrow = X.mean(axis=(1, 2)) @ params["reduce"]["kernel"][0, 0] + params["reduce"]["bias"]
    wide = (narrow / (1 + np.exp(-narrow))) @ params["expand"]["kernel"][0, 0] + params["expand"]["bias"]
    want = X / (1 + np.exp(-wide))[:, None, None]
    close(SqueezeExcite(2).apply({"params": params}, X), want)
