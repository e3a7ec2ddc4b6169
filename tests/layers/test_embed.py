import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import NamedSharding, PartitionSpec

from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.layers.dense import normal
from fm_jax.layers.embed import Embed
from fm_jax.train.plan import hlo
from tests.close import close

TOKENS = jnp.array([[3, 1, 3], [0, 6, 2]])
POSITIONS = jnp.array([[0, 1, 2], [4, 0, 1]])


def made(max_length, dtype=jnp.float32):
    model = Embed(7, 4, max_length, normal(1.0), dtype)
    return model, meta.unbox(model.init(jax.random.key(0), TOKENS, POSITIONS))["params"]


def test_a_token_at_a_position_is_the_sum_of_two_rows():
    model, params = made(max_length=5)
    want = np.asarray(params["tokens"])[TOKENS] + np.asarray(params["positions"])[POSITIONS]
    np.testing.assert_array_equal(model.apply({"params": params}, TOKENS, POSITIONS), want)


def test_without_a_position_table_positions_do_nothing():
    model, params = made(max_length=0)
    assert set(params) == {"tokens"}
    np.testing.assert_array_equal(
        model.apply({"params": params}, TOKENS, POSITIONS), np.asarray(params["tokens"])[TOKENS]
    )


def test_the_tied_head_scores_against_the_table_in_float32():
    model, params = made(max_length=0, dtype=jnp.bfloat16)
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.bfloat16)
    got = model.apply({"params": params}, hidden, method="attend")
    assert got.dtype == jnp.float32
    table = np.asarray(params["tokens"].astype(jnp.bfloat16), np.float32)
    close(got, np.asarray(hidden, np.float32) @ table.T)


def test_a_row_outside_the_tables_is_not_a_number():
    """JAX would clamp an index in silence; a wrong id or position must be seen."""
    model, params = made(max_length=5)
    assert np.isnan(model.apply({"params": params}, jnp.array([[7]]), jnp.array([[0]]))).all()
    assert np.isnan(model.apply({"params": params}, jnp.array([[0]]), jnp.array([[5]]))).all()


def test_under_fsdp_the_table_is_gathered_once_and_its_lookups_gradient_is_split():
    tokens = np.random.default_rng(0).integers(0, 64, (8, 4)).astype(np.int32)
    table = np.random.default_rng(1).standard_normal((64, 16)).astype(np.float32)
    module = Embed(64, 16, 0, normal(1.0))

    def loss(table):
        x = module.apply({"params": {"tokens": table}}, tokens, tokens)
        return jnp.square(module.apply({"params": {"tokens": table}}, jnp.tanh(x), method="attend")).sum()

    value, grad = jax.jit(jax.value_and_grad(loss))(table)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    where = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(loss), out_shardings=(None, where), in_shardings=where)
        compiled = compiled.lower(jax.ShapeDtypeStruct(table.shape, table.dtype)).compile()
        split = compiled(jax.device_put(table, where))
    close(split[0], value)
    close(split[1], grad)
    gathers = [one for one in hlo.read(compiled.as_text()).collectives if one.kind == "all-gather"]
    assert [one.shape for one in gathers if 64 in one.shape] == [(64, 16)]
