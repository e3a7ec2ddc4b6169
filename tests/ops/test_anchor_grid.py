import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.core.errors import ConfigError
from fm_jax.ops import anchor_grid
from tests.close import close

SIZE, STRIDES = (16, 24), (8, 4)  # 2 × 3 and 4 × 6 cells
ANCHORS = (((6.0, 5.0), (8.0, 12.0)), ((2.0, 3.0),))
GRID = anchor_grid.grid(SIZE, STRIDES, ANCHORS)


def test_candidates_are_numbered_by_scale_row_column_and_anchor():
    number = 0
    for scale, stride in enumerate(STRIDES):
        for row in range(SIZE[0] // stride):
            for column in range(SIZE[1] // stride):
                for pair in ANCHORS[scale]:
                    assert tuple(GRID.cells[number]) == (column, row)
                    assert GRID.strides[number] == stride and tuple(GRID.anchors[number]) == pair
                    number += 1
    assert number == len(GRID.strides) == 2 * 3 * 2 + 4 * 6


def test_zeros_stand_for_an_anchor_in_the_middle_of_its_cell():
    boxes = np.asarray(anchor_grid.decode(jnp.zeros((2, len(GRID.strides), 4)), GRID))
    assert boxes.shape == (2, 36, 4)
    close(boxes[1, 5], np.array([20 - 4, 4 - 6, 20 + 4, 4 + 6]))  # third cell of the first row, second anchor
    close(boxes[0, 12 + 7], np.array([6 - 1, 6 - 1.5, 6 + 1, 6 + 1.5]))


def test_what_a_box_should_predict_is_decoded_to_the_box():
    rng = np.random.default_rng(0)
    centre, side = rng.uniform((0, 0), SIZE[::-1], (50, 2)), rng.uniform(1, 15, (50, 2))
    boxes = np.concatenate([centre - side / 2, centre + side / 2], axis=1).astype(np.float32)
    found = anchor_grid.match(jnp.asarray(boxes), SIZE, STRIDES, ANCHORS)
    inside = np.clip(np.asarray(found.centre), 1e-6, 1 - 1e-6)
    offsets = np.zeros((len(boxes), len(GRID.strides), 4), np.float32)
    number, candidate = np.arange(len(boxes)), np.asarray(found.candidate)
    offsets[number, candidate] = np.concatenate([np.log(inside / (1 - inside)), found.size], axis=1)
    close(np.asarray(anchor_grid.decode(jnp.asarray(offsets), GRID))[number, candidate], boxes)


def test_the_shape_alone_chooses_among_the_anchors_of_all_scales():
    boxes = jnp.asarray([[9.0, 9.0, 11.0, 12.0], [4.0, 4.0, 12.0, 16.0], [7.0, 1.0, 13.0, 6.0]])
    found = anchor_grid.match(boxes, SIZE, STRIDES, ANCHORS)
    want = [12 + 2 * 6 + 2, (1 * 3 + 1) * 2 + 1, (0 * 3 + 1) * 2]
    assert found.candidate.tolist() == want
    close(found.size, np.zeros((3, 2)), scale=1.0)


def test_a_centre_on_the_edge_or_outside_belongs_to_the_nearest_cell():
    boxes = jnp.asarray([[23.0, 14.5, 25.0, 17.5], [29.0, -6.5, 31.0, -3.5]])
    found = anchor_grid.match(boxes, SIZE, STRIDES, ANCHORS)
    assert found.candidate.tolist() == [12 + 23, 12 + 5]
    assert found.centre.tolist() == [[1, 1], [1, 0]]


def test_a_box_without_area_has_finite_targets():
    found = anchor_grid.match(jnp.asarray([[0.0, 0, 0, 0], [5.0, 5, 5, 9]]), SIZE, STRIDES, ANCHORS)
    assert np.isfinite(found.size).all() and np.isfinite(found.centre).all()


@pytest.mark.parametrize("size", [(20, 24), (16, 12), (0, 24)])
def test_an_image_that_cells_do_not_tile_is_refused(size):
    with pytest.raises(ConfigError, match="multiples of 8"):
        anchor_grid.grid(size, STRIDES, ANCHORS)
