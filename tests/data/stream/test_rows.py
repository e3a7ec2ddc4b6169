import numpy as np
import pytest

from fm_jax.core.errors import DataError
from fm_jax.data.stream.loader import Batches, Epoch
from fm_jax.data.stream.rows import Rows, spread


class Numbers:
    name, fingerprint, limits = "numbers", "f", {"x": 100}

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"x": np.int32(index), "weights": np.float32(1)}


class Noisy(Numbers):
    def draw(self, index, rng):
        return {"x": np.int32(index * 10 + rng.integers(10)), "weights": np.float32(1)}


def test_the_rows_come_in_the_order_given_and_only_they():
    assert [int(row["x"]) for row in map(Rows(Numbers(), [7, 2, 2]).__getitem__, range(3))] == [7, 2, 2]
    (batch,) = Epoch(Rows(Numbers(), [7, 2]), 3)
    np.testing.assert_array_equal(batch["weights"], [1, 1, 0])


def test_a_source_that_draws_still_draws_and_another_does_not():
    drawn = next(Batches(Rows(Noisy(), [3, 4]), 2).iterate(0))["x"]
    assert sorted(x // 10 for x in drawn) == [3, 4] and set(drawn) != {30, 40}
    assert sorted(next(Batches(Rows(Numbers(), [3, 4]), 2).iterate(0))["x"]) == [3, 4]


def test_other_rows_are_another_stream():
    prints = {Rows(Numbers(), rows).fingerprint for rows in ([1, 2], [2, 1], [1, 2, 3])}
    assert len(prints) == 3 and Numbers.fingerprint not in prints


@pytest.mark.parametrize("row", [-1, 10])
def test_a_row_that_is_not_there_is_refused(row):
    with pytest.raises(DataError, match=f"numbers has no row {row}"):
        Rows(Numbers(), [0, row])


def test_rows_are_spread_over_the_whole():
    assert [int(spread(Numbers(), 3)[i]["x"]) for i in range(3)] == [0, 3, 6]
    assert len(spread(Numbers(), 10)) == len(spread(Numbers(), 99)) == 10
