import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from fm_jax.core import sharding
from fm_jax.core.errors import ConfigError
from fm_jax.core.mesh import AXES, MeshConfig, make_mesh


def boxed(shape, *names):
    return nn.Partitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names=names)


def test_every_rule_names_axes_of_the_mesh():
    for name, axes in sharding.RULES.items():
        assert set(() if axes is None else (axes,) if isinstance(axes, str) else axes) <= set(AXES), name


def test_a_spec_refuses_an_unknown_name():
    assert sharding.spec(("batch", None, "mlp")) == PartitionSpec(("data", "fsdp"), None, "tensor")
    with pytest.raises(ValueError, match=r"\['heights'\]; known are batch"):
        sharding.spec(("heights",))


def test_shardings_follow_the_boxes_and_repeat_the_rest():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    made = sharding.shardings({"a": {"kernel": boxed((8, 6), "embed", "mlp")}, "b": jnp.zeros(3)}, mesh)
    assert made["a"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
    assert made["a"]["kernel"].shard_shape((8, 6)) == (2, 3)
    assert made["b"].is_fully_replicated


def test_a_dimension_that_does_not_divide_is_named():
    mesh = make_mesh(MeshConfig(data=1, tensor=8))
    with pytest.raises(ConfigError, match=r"a/kernel: dimension 'mlp' of size 12 .* mesh axis tensor of size 8"):
        sharding.shardings({"a": {"kernel": boxed((4, 12), "embed", "mlp")}}, mesh)


def test_constrain_is_nothing_without_a_mesh():
    traced = jax.make_jaxpr(lambda x: sharding.constrain(x, "batch", "time", "width"))(jnp.zeros((8, 4, 2)))
    assert not traced.eqns


def test_constrain_lays_out_what_divides_and_leaves_the_rest_whole():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))
    with jax.set_mesh(mesh):
        constrain = jax.jit(lambda x: sharding.constrain(x, "batch", "time", "width"))
        assert constrain(jnp.zeros((8, 4, 2))).sharding.shard_shape((8, 4, 2)) == (2, 2, 2)
        assert constrain(jnp.zeros((8, 1, 2))).sharding.shard_shape((8, 1, 2)) == (2, 1, 2)  # one decoded token
        assert constrain(jnp.zeros((6, 4, 2))).sharding.shard_shape((6, 4, 2)) == (6, 2, 2)  # a short batch


def test_constrain_is_nothing_for_axes_that_a_mapped_function_holds():
    def body(x):
        return sharding.constrain(x, "batch", "time") * 1.0

    x = jnp.arange(32.0).reshape(8, 4)
    assert (jax.pmap(body, axis_name="replica")(x[:, None])[:, 0] == x).all()
    mesh = make_mesh(MeshConfig(data=8))
    with jax.set_mesh(mesh):
        by_rows = PartitionSpec("data")
        mapped = jax.shard_map(body, mesh=mesh, in_specs=by_rows, out_specs=by_rows)
        assert (jax.jit(mapped)(x) == x).all()


def test_a_batch_is_split_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert sharding.batch_sharding(mesh).shard_shape((8, 5)) == (2, 5)
    assert sharding.batch_ways(mesh) == 4
    assert sharding.replicated(mesh).shard_shape((8, 5)) == (8, 5)


def test_a_vocabulary_that_does_not_divide_is_whole_and_said_so(capsys):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    table = {"a": {"tokens": boxed((50257, 8), "vocab", "embed")}}
    made = sharding.shardings(table, mesh)["a"]["tokens"]
    assert made.spec == PartitionSpec(None, "fsdp")
    assert made.shard_shape((50257, 8)) == (50257, 2)
    assert "a/tokens: its 50257 rows are not divisible by mesh axis tensor of size 2" in capsys.readouterr().err
    assert sharding.shardings({"a": boxed((50256, 8), "vocab", "embed")}, mesh)["a"].spec == PartitionSpec(
        "tensor", "fsdp"
    )


def test_ways_are_those_of_the_mesh_in_scope():
    assert sharding.ways("embed") == 1
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=4))):
        assert sharding.ways("embed") == 4
        assert sharding.ways("vocab") == 1
