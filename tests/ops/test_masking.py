import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.ops import masking


def test_causal_compares_positions_not_rows():
    queries, keys = jnp.array([[2, 5]]), jnp.arange(6)[None]
    assert masking.causal(queries, keys)[0].astype(int).tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("size", [0, 1, 3, 8])
def test_a_window_counts_the_query_itself_and_zero_means_all(size):
    index = jnp.arange(6)
    seen = masking.causal(index, index) & masking.window(index, index, jnp.array(size))
    for query in range(6):
        first = max(0, query - size + 1) if size else 0
        assert np.flatnonzero(seen[query]).tolist() == list(range(first, query + 1))


def test_segments_see_themselves_only():
    segments = jnp.array([[1, 1, 2, 0]])
    assert masking.same_segment(segments, segments)[0].astype(int).tolist() == [
        [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1],
    ]  # fmt: skip
