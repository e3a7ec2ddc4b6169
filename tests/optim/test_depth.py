import jax
import numpy as np
import pytest

from fm_jax.core import tree
from fm_jax.core.errors import ConfigError
from fm_jax.optim import depth
from tests.close import close


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


@pytest.mark.parametrize(
    ("path", "shape", "layers", "rank"),
    [
        ("blocks/attn/q/kernel", (3, 8, 8), 3, 2),
        ("blocks/attn/q/bias", (3, 8), 3, 1),
        ("encoder/blocks/mlp/up/kernel", (5, 8, 32), 5, 2),
        ("lora/blocks/attn/q/kernel/a", (3, 8, 2), 3, 2),
        ("head/kernel", (8, 12), 0, 2),
        ("myblocks/kernel", (8, 12), 0, 2),
        ("blocks_3/kernel", (8, 12), 0, 2),
        ("stem/kernel", (3, 3, 4, 8), 0, 4),
    ],
)
def test_only_what_stands_under_blocks_has_layers(path, shape, layers, rank):
    assert (depth.layers(path, leaf(*shape)), depth.rank(path, leaf(*shape))) == (layers, rank)


def test_a_scalar_under_blocks_is_refused():
    with pytest.raises(ConfigError, match="blocks/gain"):
        depth.layers("blocks/gain", leaf())


def test_factors_fall_from_the_head_to_the_embeddings():
    params = {
        "embed": {"tokens": leaf(12, 8)},
        "blocks": {"q": {"kernel": leaf(3, 8, 8), "bias": leaf(3, 8)}},
        "norm_final": {"scale": leaf(8)},
        "head": {"kernel": leaf(8, 12)},
    }
    factors = tree.flatten(depth.multipliers(params, 0.5))
    assert factors["head/kernel"] == factors["norm_final/scale"] == 1
    close(factors["blocks/q/kernel"], np.reshape([1 / 8, 1 / 4, 1 / 2], (3, 1, 1)))
    close(factors["blocks/q/bias"], np.reshape([1 / 8, 1 / 4, 1 / 2], (3, 1)))
    assert factors["embed/tokens"] == 1 / 16


def test_the_top_layers_alone_keep_the_factors_they_have_in_the_whole():
    whole = depth.multipliers({"blocks": {"bias": leaf(6, 8)}}, 0.7)["blocks"]["bias"]
    top = depth.multipliers({"blocks": {"bias": leaf(2, 8)}}, 0.7)["blocks"]["bias"]
    close(top, whole[4:])
