"""COCO's twelve numbers by the official program, `pycocotools`, for results that are to be published.

`detection.py` gives the same numbers without it.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from fm_jax.core.errors import ConfigError
from fm_jax.evals.scores import detection
from fm_jax.evals.scores.detection import Coco, Found, Truth


def coco(truths: Sequence[Truth], found: Sequence[Found], num_classes: int) -> Coco:
    """Return `detection.coco` as `pycocotools` computes it.

    Raises:
        ConfigError: `pycocotools` is missing.
        DataError: as `detection.check`.
    """
    detection.check(truths, found, num_classes)
    evaluator = _evaluator()
    with contextlib.redirect_stdout(io.StringIO()):  # its progress
        evaluation = evaluator(*_indexed(truths, found, num_classes), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return Coco(evaluation.eval["precision"], evaluation.eval["recall"])


def _evaluator() -> Any:
    try:
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ConfigError(
            'scorer pycocotools is not installed; install "fm_jax[detection]", or set scorer numpy, which gives the '
            "same numbers"
        ) from error
    return COCOeval


def _indexed(truths: Sequence[Truth], found: Sequence[Found], num_classes: int) -> tuple[Any, Any]:
    """Return objects and detections as `pycocotools` indexes them; its ids start at 1, because 0 means none there."""
    from pycocotools.coco import COCO

    images = [{"id": place + 1} for place in range(len(truths))]
    categories = [{"id": number, "name": str(number)} for number in range(num_classes)]
    objects: list[dict[str, Any]] = []
    guesses: list[dict[str, Any]] = []
    for image, true, guess in zip(images, truths, found, strict=True):
        for row, label, ignored, area in zip(_rows(true.boxes), *(x.tolist() for x in true[1:]), strict=True):
            objects.append(
                {"id": len(objects) + 1, "image_id": image["id"], "category_id": label, "bbox": row, "area": area}
                | {"iscrowd": int(ignored)}
            )
        for row, label, score in zip(_rows(guess.boxes), *(x.tolist() for x in guess[1:]), strict=True):
            guesses.append(
                {"id": len(guesses) + 1, "image_id": image["id"], "category_id": label, "bbox": row, "score": score}
                | {"area": row[2] * row[3], "iscrowd": 0}
            )
    both = []
    for annotations in (objects, guesses):
        one = COCO()
        one.dataset = {"images": images, "categories": categories, "annotations": annotations, "info": {}}
        one.createIndex()
        both.append(one)
    return both[0], both[1]


def _rows(boxes: np.ndarray) -> list[list[float]]:
    rows: list[list[float]] = np.stack(detection.corners(boxes), axis=1).tolist()
    return rows
