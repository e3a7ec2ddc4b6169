"""A split's detections from padded batches, and what is written of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.core.errors import DataError
from fm_jax.evals.scores import detection, detector
from fm_jax.evals.scores.detection import Found
from fm_jax.ops.boxes import Detections
from tests.close import close

IMAGES, BATCH = 5, 2
TRUE = [detection.truth(np.array([[4.0 * i, 2, 4 * i + 20, 42]]), np.array([i % 2])) for i in range(IMAGES)]


def batches() -> Iterator[dict[str, jax.Array]]:
    """Boxes at half size and moved by 3, as a letterbox does; the last batch is padded."""
    for first in range(0, IMAGES, BATCH):
        rows = [min(first + k, IMAGES - 1) for k in range(BATCH)]
        yield {
            "images": jnp.stack([jnp.full((8, 8, 3), i, jnp.float32) for i in rows]),
            "index": jnp.array(rows),
            "scale": jnp.full(BATCH, 0.5),
            "weights": jnp.array([float(first + k < IMAGES) for k in range(BATCH)]),
        }


@jax.jit
def oracle(shift: jax.Array, batch: Any) -> Detections:
    """Find the object of every image, with a score that falls with the index, and one detection that is not valid."""
    i = batch["index"].astype(jnp.float32)[:, None]
    box = jnp.stack([4 * i, 0 * i + 2, 4 * i + 20, 0 * i + 42], axis=-1) * 0.5 + 3 + shift
    scores = jnp.concatenate([0.9 - i / 10, 0 * i + 1], axis=1)
    labels = jnp.concatenate([batch["index"][:, None] % 2, batch["index"][:, None]], axis=1)
    valid = jnp.broadcast_to(jnp.array([[True, False]]), scores.shape)
    return Detections(jnp.concatenate([box, box], axis=1), scores, labels, valid)


def back(boxes: np.ndarray, row: Any) -> np.ndarray:
    assert set(row) == {"index", "scale", "weights"}  # not the pixels
    return (boxes - 3) / row["scale"]


def scored(shift: float = 0.0) -> detector.Scored:
    found = detector.collect(oracle, jnp.array(shift), batches(), back)
    return detector.Scored(TRUE, [found[i] for i in range(IMAGES)])


def test_detections_come_back_in_pixels_of_the_image_and_padding_counts_nowhere() -> None:
    got = scored()
    for true, found in zip(TRUE, got.found, strict=True):
        close(found.boxes, true.boxes)
        assert found.labels.tolist() == true.labels.tolist() and len(found.scores) == 1
    close(detector.tables(got, 2).summary()["ap"], 1.0)
    assert detector.tables(scored(shift=9.0), 2).summary()["ap"] == 0
    assert detector.tables(got, 2, "pycocotools").summary() == detector.tables(got, 2).summary()


def test_a_detection_that_is_not_finite_names_the_image() -> None:
    with pytest.raises(DataError, match="image 0: a detection is not finite"):
        detector.collect(oracle, jnp.array(jnp.nan), batches(), back)


def test_results_and_pictures_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = np.full((48, 48, 3), 90, np.uint8)
    splits = {"validation": scored(9.0), "test": scored()}
    measured = detector.write(
        tmp_path, splits, ["cat", "dog"], image=lambda index: image, extra={"mean_boxes": {"ap": 0.1}}
    )
    written = json.loads((tmp_path / "results.json").read_text())
    close(written, measured)
    close(
        written["test"] | {},
        written["test"] | {"ap": 1.0, "voc2007": 1.0, "voc2010": 1.0, "images": 5.0, "objects": 5.0},
    )
    close(written["class_ap"], {"cat": 1.0, "dog": 1.0})
    assert written["validation"]["ap"] == 0 and written["mean_boxes"] == {"ap": 0.1}
    assert "test: ap 1" in capsys.readouterr().out
    for name in ("precision_recall.png", "confusion.png", "detections.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_sheet_shows_sure_detections_beside_the_objects() -> None:
    image = np.full((448, 448, 3), 90, np.uint8)
    box = np.array([[100.0, 100, 200, 200]])
    unsure = Found(box, np.zeros(1, int), np.array([0.1]))
    sure = Found(box, np.zeros(1, int), np.array([0.9]))
    pages = [
        detector.sheet(detector.Scored([detection.truth(box, np.zeros(1))], [one]), ["cat"], lambda index: image)
        for one in (unsure, sure)
    ]
    left, right = (page[:, : page.shape[1] // 2] for page in pages), (page[:, page.shape[1] // 2 :] for page in pages)
    np.testing.assert_array_equal(*left)
    assert np.abs(np.subtract(*(half.astype(int) for half in right))).max() > 0
