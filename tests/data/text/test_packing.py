import numpy as np
import pytest

from fm_jax.data.text.packing import pack


@pytest.mark.parametrize("seed", range(20))
def test_every_piece_is_in_one_row_and_no_row_overflows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 300))
    lengths = rng.integers(1, size + 1, rng.integers(0, 400))
    rows = pack(lengths, size)
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    assert all(0 < lengths[row].sum() <= size for row in rows)
    assert pack(lengths.tolist(), size) == rows
    # Johnson's bound, over the volume (a lower bound on the best).
    assert len(rows) <= 11 / 9 * len(lengths) and (not len(rows) or len(rows) >= lengths.sum() / size)


def test_pieces_fill_rows_that_they_fit() -> None:
    assert pack([6, 3, 5, 4, 7, 5], 10) == [[4, 1], [0, 3], [2, 5]]


def test_rows_are_nearly_full_for_many_short_pieces() -> None:
    lengths = np.random.default_rng(0).integers(1, 128, 5000)
    assert lengths.sum() / (128 * len(pack(lengths, 128))) > 0.99


@pytest.mark.parametrize("lengths", [[0], [11]])
def test_a_piece_that_fits_no_row_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="pieces must have 1 to 10 tokens"):
        pack(lengths, 10)
