"""A table of names with every kind of entry, the tree of its leaves, and how a mesh would cut them."""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fm_jax.core import tree
from fm_jax.hub import table
from fm_jax.hub.table import Entry, Table, flipped, linear, norm, same

L, D, F, V = 3, 8, 16, 24
TABLE = Table(
    (
        same("embed/tokens", "transformer.wte.weight"),
        *norm("norm_final", "transformer.ln_f"),
        *norm("blocks/norm", "transformer.h.{}.ln_1"),
        *(
            Entry(f"blocks/attn/{head}/{ours}", f"transformer.h.{{}}.attn.c_attn.{theirs}", part=part, parts=3)
            for part, head in enumerate("qkv")
            for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
        ),
        *linear("blocks/mlp/up", "transformer.h.{}.mlp.up"),
        flipped("head/kernel", "lm_head.weight"),
        Entry("conv/kernel", "conv.weight", axes=(2, 3, 1, 0)),  # HWIO from OIHW
        Entry("first", "first_token", singles=2),
        *(
            Entry(f"blocks/{ours}/kernel", "transformer.h.{}.both.weight", axes=(1, 0), part=part, parts=2, singles=1)
            for part, ours in enumerate(("gate", "into"))
        ),
        *linear("absent", "transformer.absent"),
    ),
    rename=((r"((?:wte|ln_f|h\.\d+)\..*)", r"transformer.\1"), (r"(.*)\.gamma", r"\1.weight")),
    skip=(r".*\.masked_bias", r"transformer\.h\.\d+\.attn\.bias"),
    tied=(("copy.weight", "transformer.wte.weight"),),
)
SHAPES = {
    "embed/tokens": (V, D),
    "norm_final/scale": (D,),
    "norm_final/bias": (D,),
    "blocks/norm/scale": (L, D),
    "blocks/norm/bias": (L, D),
    **{f"blocks/attn/{head}/kernel": (L, D, D) for head in "qkv"},
    **{f"blocks/attn/{head}/bias": (L, D) for head in "qkv"},
    "blocks/mlp/up/kernel": (L, D, F),
    "blocks/mlp/up/bias": (L, F),
    "head/kernel": (D, V),
    "conv/kernel": (2, 3, 4, D),
    "first": (D,),
    "blocks/gate/kernel": (L, D, F // 2),
    "blocks/into/kernel": (L, D, F // 2),
}
AXES = {  # as the model's rules would cut them on a mesh of fsdp=2, tensor=4
    "embed/tokens": ("tensor", "fsdp"),
    **{f"blocks/attn/{head}/kernel": (None, "fsdp", "tensor") for head in "qkv"},
    **{f"blocks/attn/{head}/bias": (None, "tensor") for head in "qkv"},
    "blocks/mlp/up/kernel": (None, "fsdp", "tensor"),
    "blocks/mlp/up/bias": (None, "tensor"),
    "head/kernel": ("fsdp", "tensor"),
    "conv/kernel": (None, None, "fsdp", "tensor"),
    "first": ("fsdp",),
    "blocks/gate/kernel": (None, "fsdp", "tensor"),
    "blocks/into/kernel": (None, "fsdp", "tensor"),
}


class Counting:
    """Weights that remember every read."""

    def __init__(self, weights):
        self.weights, self.where, self.reads = weights, weights.where, []

    @property
    def specs(self):
        return self.weights.specs

    def read(self, name, index, out=None):
        found = self.weights.read(name, index, out)
        self.reads.append((name, found.size))
        return found


def params(dtype=np.float32):
    rng = np.random.default_rng(0)
    return tree.unflatten({path: rng.standard_normal(shape).astype(dtype) for path, shape in SHAPES.items()})


def wanted(dtype=np.float32, mesh=None, shapes=SHAPES):
    def leaf(path, shape):
        where = None if mesh is None else NamedSharding(mesh, PartitionSpec(*AXES.get(path, ())))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    return tree.unflatten({path: leaf(path, shape) for path, shape in shapes.items()})


def theirs(dtype=np.float32):
    return dict(table.write(TABLE, params(dtype)))


def assert_equal(found, expected):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].dtype == leaf.dtype, path
        assert np.array_equal(np.asarray(found[path]), leaf), path
