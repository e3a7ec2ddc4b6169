import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.core import tree
from fm_jax.core.errors import ConfigError

TREE = {"b": {"x": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}, "a": {"kernel": jnp.ones(4)}}


def same(one, two):
    return jax.tree.structure(one) == jax.tree.structure(two) and all(
        map(np.array_equal, *map(jax.tree.leaves, (one, two)))
    )


def test_flatten_names_leaves_by_path_in_sorted_order():
    assert list(tree.flatten(TREE)) == ["a/kernel", "b/x/bias", "b/x/kernel"]


def test_unflatten_undoes_flatten():
    assert same(tree.unflatten(tree.flatten(TREE)), TREE)


def test_select_matches_whole_paths():
    assert tree.select(TREE, ["a/kernel", "b/.*/bias"]) == {"a/kernel", "b/x/bias"}
    with pytest.raises(ConfigError, match=r"'kernel' matches no parameter; known are a/kernel"):
        tree.select(TREE, ["kernel"])


@pytest.mark.parametrize("patterns", [[], [".*kernel"], ["a/.*", "b/x/bias"], [".*"]])
def test_merge_undoes_partition(patterns):
    inside, outside = tree.partition(TREE, patterns)
    assert set(tree.flatten(inside)) == tree.select(TREE, patterns)
    assert same(tree.merge(inside, outside), TREE)


def test_merge_refuses_an_overlap():
    with pytest.raises(ValueError, match="a/kernel"):
        tree.merge(TREE, {"a": {"kernel": 1}})


def test_map_with_path_gives_each_leaf_its_path():
    assert tree.map_with_path(lambda path, leaf: (path, leaf.size), TREE) == {
        "b": {"x": {"kernel": ("b/x/kernel", 6), "bias": ("b/x/bias", 3)}}, "a": {"kernel": ("a/kernel", 4)},
    }  # fmt: skip


def test_count_counts_scalars_of_abstract_arrays_too():
    assert tree.count(TREE) == tree.count(jax.eval_shape(lambda: TREE)) == 6 + 3 + 4
    assert tree.count({"scalar": jnp.zeros(())}) == 1
