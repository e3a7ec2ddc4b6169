import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fm_jax.checkpoint import surgery
from fm_jax.core import tree
from fm_jax.core.errors import CheckpointError


def _params(shift: float = 0.0, **changed) -> dict:
    flat = {
        "embed/tokens": np.arange(12.0, dtype=np.float32).reshape(4, 3),
        "embed/positions": np.arange(6.0, dtype=np.float32).reshape(2, 3),
        "blocks/attn/q/kernel": np.ones((2, 3, 3), np.float32),
        "blocks/mlp/up/kernel": np.full((2, 3, 5), 2, jnp.bfloat16),
        "head/kernel": np.full((3, 2), 3, np.float32),
    }
    flat = {path: leaf + np.asarray(shift, leaf.dtype) for path, leaf in flat.items()} | changed
    return tree.unflatten({path: jnp.asarray(leaf) for path, leaf in flat.items() if leaf is not None})


def _moved(params: dict, **names: str) -> dict:
    flat = tree.flatten(params)
    for old, new in names.items():
        flat[new] = flat.pop(old.replace("__", "/"))
    return tree.unflatten(flat)


def _message(*args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as caught:
        surgery.load(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_equal_trees_give_the_source():
    source = _params(1)
    loaded = surgery.load(_params(), source)
    jax.tree.map(np.testing.assert_array_equal, loaded, source)
    assert jax.tree.map(lambda x: x.dtype, loaded) == jax.tree.map(lambda x: x.dtype, source)


def test_rename_fresh_unused_and_reshape_together():
    source = _moved(
        _params(
            1, **{"head/kernel": np.zeros((3, 9)), "embed/positions": np.array([[0.0, 0, 0], [6, 6, 6]], np.float32)}
        ),
        blocks__attn__q__kernel="h/attention/query/kernel",
        blocks__mlp__up__kernel="h/ffn/kernel",
    )
    target = _params(**{"embed/positions": np.zeros((6, 3), np.float32)})
    loaded = surgery.load(
        target,
        source,
        rename=[("h/attention/query/(.*)", r"blocks/attn/q/\1"), ("h/ffn/(.*)", r"blocks/mlp/up/\1"), ("h/.*", "no")][
            :2
        ],
        fresh=["head/.*"],
        unused=["head/.*"],
        reshape={"embed/positions": surgery.interpolate},
    )
    assert loaded["head"]["kernel"] is target["head"]["kernel"]
    np.testing.assert_array_equal(loaded["blocks"]["attn"]["q"]["kernel"], 2)
    np.testing.assert_array_equal(np.asarray(loaded["blocks"]["mlp"]["up"]["kernel"], np.float32), 3)
    column = np.asarray(loaded["embed"]["positions"])[:, 0]
    assert column[0] == 0 and column[-1] == 6 and np.all(np.diff(column) >= 0) and len(set(column)) == 6 - 2


def test_fresh_holds_even_where_the_source_has_the_name():
    target, source = _params(), _params(1)
    assert "head/kernel: is in the source, but head/kernel stays fresh" in _message(target, source, fresh=["head/.*"])
    loaded = surgery.load(target, source, fresh=["head/.*"], unused=["head/.*"])
    np.testing.assert_array_equal(loaded["head"]["kernel"], 3)
    np.testing.assert_array_equal(loaded["embed"]["tokens"], source["embed"]["tokens"])


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        (_params(**{"head/kernel": None}), {}, ["head/kernel: not in the source"]),
        (_params(**{"extra/bias": np.ones(2)}), {}, ["extra/bias: in the source, not in the target"]),
        (
            _moved(_params(), head__kernel="heads/kernel"),
            {},
            ["head/kernel: not in the source; nearest unmatched is heads/kernel", "nearest unmatched is head/kernel"],
        ),
        (
            _params(**{"head/kernel": np.ones((3, 7), np.float32)}),
            {},
            ["head/kernel: source has float32[3,7], target float32[3,2]"],
        ),
        (_params(**{"head/kernel": np.ones((3, 2), np.float16)}), {}, ["source has float16[3,2], target float32[3,2]"]),
        (_params(), {"fresh": ["haed/.*"]}, ["fresh pattern 'haed/.*' matches no target leaf"]),
        (_params(), {"unused": ["nothing"]}, ["unused pattern 'nothing' matches no source leaf"]),
        (_params(), {"unused": "nothing"}, ["1 problem: unused pattern 'nothing'"]),
        (
            _params(),
            {"rename": [("layer/(.*)", r"blocks/\1")]},
            ["rename pattern 'layer/(.*)' is applied to no source"],
        ),
        (
            _params(),
            {"rename": [("head/.*", "embed/tokens")]},
            ["embed/tokens: comes from both embed/tokens and head/ke"],
        ),
        (_params(), {"reshape": {"position": surgery.cast}}, ["reshape pattern 'position' matches no loaded leaf"]),
        (_params(), {"reshape": {"head/.*": lambda x, w: x[:1]}}, ["source has float32[1,2], target float32[3,2]"]),
        (_params(), {"reshape": {"head/.*": lambda x, w: x @ x}}, ["head/kernel: reshape failed: TypeError"]),
        (_params(), {"fresh": ["(head"]}, ["fresh pattern '(head' is not a regular expression"]),
        (_params(), {"rename": [("head/(.*)", r"\2")]}, [r"rename replacement '\\2' for head/kernel"]),
    ],
)
def test_errors_name_leaf_and_cure(source, options, said):
    message = _message(_params(), source, **options)
    for part in said:
        assert part in message


def test_all_problems_come_in_one_message_ten_in_words():
    target = {f"leaf{i:02d}": jnp.zeros(2) for i in range(30)}
    source = {f"leaf{i:02d}": jnp.zeros(3) for i in range(25)}
    message = _message(target, source, fresh=["no"])
    assert message.startswith("weights do not match, 31 problems: fresh pattern 'no'")
    assert message.endswith("; and 21 more")
    assert message.count("; and ") == 1


def test_a_fresh_leaf_needs_a_value():
    abstract = jax.eval_shape(_params)
    assert "head/kernel: is fresh, but the target has no value" in _message(
        abstract, _params(), fresh=["head/.*"], unused=["head/.*"]
    )
    loaded = surgery.load(abstract, _params(1))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))


def test_cast_converts_the_dtype_and_nothing_else():
    source = jax.tree.map(lambda x: np.asarray(x, np.float32), _params(1))
    loaded = surgery.load(_params(), source, reshape={"blocks/mlp/.*": surgery.cast})
    assert loaded["blocks"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    assert "target bfloat16" in _message(_params(), source)


def test_leaves_go_where_the_target_lies():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, P("data"))
    target = {"w": jax.device_put(jnp.zeros((8, 2)), split), "v": jnp.zeros(3)}
    loaded = surgery.load(target, {"w": np.ones((8, 2), np.float32), "v": np.ones(3, np.float32)})
    assert loaded["w"].sharding == split
    assert not loaded["v"].committed  # as the target's: free to follow other arrays onto a mesh
    np.testing.assert_array_equal(loaded["w"], 1)
    abstract = {"w": jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=split)}
    assert surgery.load(abstract, {"w": jnp.ones((8, 2))})["w"].sharding == split


def test_shapes_stand_in_for_weights_while_shapes_are_asked_for_and_never_else():
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), _params())
    wanted = jax.eval_shape(lambda: surgery.load(_params(1.0), _params()))
    assert jax.eval_shape(lambda: surgery.load(jax.tree.map(jnp.copy, _params(1.0)), shapes)) == wanted
    with pytest.raises(CheckpointError, match=r"weights were not read, only their shapes: .*blocks/attn/q/kernel"):
        surgery.load(_params(1.0), shapes)
