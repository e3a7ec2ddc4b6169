"""Evaluation of detectors: what a model finds in a split, AP by COCO's and VOC's rules, and pictures of both."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.core.types import Batch, Params
from fm_jax.evals import runner
from fm_jax.evals.report import boxes as pictures
from fm_jax.evals.report import report, results
from fm_jax.evals.scores import coco_official, detection
from fm_jax.evals.scores.detection import Coco, Found, Truth
from fm_jax.evals.scores.voc import voc
from fm_jax.ops.boxes import Detections

Scorer = Literal["numpy", "pycocotools"]
Detect = Callable[[Params, Batch], Detections]
"""(params, batch) -> detections in pixels of the network's input; jitted, so that one program serves every pass."""
Back = Callable[[np.ndarray, Mapping[str, np.ndarray]], np.ndarray]
"""(boxes [K, 4] in pixels of the network's input, the fields of the row) -> boxes in pixels of the image."""

SURE = 0.3  # least score of a detection that is drawn
_SHOWN = 6  # images on the sheet of detections


class Scored(NamedTuple):
    """The objects of a split's images, and what was found in them."""

    truths: Sequence[Truth]
    found: Sequence[Found]


def collect(detect: Detect, params: Params, batches: Iterable[Batch], back: Back) -> dict[int, Found]:
    """Return {index of the image: what is found in it}, in pixels of the image, without rows of weight 0.

    The next batch is read and started while the last one's detections are fetched. Every host gets all images.

    Args:
        detect: see `Detect`.
        params: its first argument.
        batches: a finite iterable, with "index" [B] and "weights" [B].
        back: see `Back`; it gets the row's small fields, not its pixels.

    Raises:
        DataError: a detection is not finite; the image is named by its index.
    """
    found: dict[int, Found] = {}
    running: tuple[Detections, Batch] | None = None

    def fetch() -> None:
        if running is None:
            return
        boxes, scores, labels, valid = map(runner.gather, running[0])
        batch = running[1]
        small = {name: runner.gather(value) for name, value in batch.items() if value.ndim <= 2}
        for row in np.flatnonzero(small["weights"] > 0):
            kept, index = valid[row], int(small["index"][row])
            if not (np.isfinite(boxes[row][kept]).all() and np.isfinite(scores[row][kept]).all()):
                raise DataError(f"image {index}: a detection is not finite; check the model's weights")
            mine = {name: value[row] for name, value in small.items()}
            moved = back(boxes[row][kept].astype(np.float64), mine)
            found[index] = Found(moved, labels[row][kept].astype(np.int64), scores[row][kept])

    for batch in batches:
        started = detect(params, batch), batch
        fetch()
        running = started
    fetch()
    return found


def tables(scored: Scored, num_classes: int, scorer: Scorer = "numpy") -> Coco:
    """Return COCO's tables by the scorer; the two give the same numbers.

    Raises:
        ConfigError: `pycocotools` is chosen, but not installed.
        DataError: as `detection.check`.
    """
    coco = coco_official.coco if scorer == "pycocotools" else detection.coco
    return coco(scored.truths, scored.found, num_classes)


def summary(scored: Scored, table: Coco) -> dict[str, float]:
    """Return COCO's twelve numbers, "voc2007" and "voc2010" at IoU 0.5, and the numbers of images and objects.

    A number is -1 where no object counts, as in COCO's own program.
    """
    counts = {"images": len(scored.truths), "objects": sum(int((~one.ignored).sum()) for one in scored.truths)}
    pascal = voc(scored.truths, scored.found, table.precision.shape[2]).summary()
    return table.summary() | pascal | {name: float(count) for name, count in counts.items()}


def write(
    workdir: Path,
    splits: Mapping[str, Scored],
    classes: Sequence[str],
    *,
    scorer: Scorer = "numpy",
    image: Callable[[int], np.ndarray],
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score and print splits; write results.json, and pictures of the last split.

    These are precision_recall.png (IoU 0.5), confusion.png (up to 50 classes; at a score of 0.3) and detections.png:
    objects and detections of the first images.

    Args:
        workdir: the folder to write to.
        splits: {name: objects and detections}.
        classes: names of the classes, in order.
        scorer: which program computes COCO's numbers.
        image: index -> image uint8 [H, W, 3] of the last split.
        extra: further entries of results.json, such as baselines.

    Returns:
        {split: `summary`, "class_ap": {class: AP in the last split}} and `extra`.
    """
    measured: dict[str, Any] = {}
    for split, scored in splits.items():
        table = tables(scored, len(classes), scorer)
        measured[split] = summary(scored, table)
        if jax.process_index() == 0:
            print(f"{split}:", "  ".join(f"{name} {value:.4g}" for name, value in measured[split].items()), flush=True)
    each = dict(zip(classes, table.by_class().tolist(), strict=True))
    measured |= {"class_ap": each, **(extra or {})}
    results.write(workdir / "results.json", measured)
    if jax.process_index() == 0:
        curves = {name: curve for name, curve in zip(classes, table.curves(), strict=True) if curve.min() >= 0}
        if curves:
            title = f"{split}: precision at IoU 0.5"
            pictures.precision_recall(workdir / "precision_recall.png", detection.RECALLS, curves, title=title)
        if len(classes) <= 50:
            counts = detection.confusion(scored.truths, scored.found, len(classes), score=SURE)
            title = f"{split}: confusion matrix, score ≥ {SURE:g}, IoU ≥ 0.5"
            report.confusion_matrix(workdir / "confusion.png", counts, (*classes, "background"), title=title)
        pictures.save(workdir / "detections.png", sheet(scored, classes, image))
    return measured


def sheet(
    scored: Scored, classes: Sequence[str], image: Callable[[int], np.ndarray], count: int = _SHOWN
) -> np.ndarray:
    """Return the first images, with their objects and with their detections beside: uint8 [H, W, 3]."""
    rows = []
    for index, (true, guess) in enumerate(zip(scored.truths[:count], scored.found[:count], strict=True)):
        pixels, sure = image(index), guess.scores >= SURE
        objects = pictures.draw(pixels, true.boxes, true.labels, classes)
        rows.append(
            [objects, pictures.draw(pixels, guess.boxes[sure], guess.labels[sure], classes, guess.scores[sure])]
        )
    beside = [[*first, *(second or [])] for first, second in zip_longest(rows[::2], rows[1::2])]
    heads = ["objects", f"detections, score {SURE:g} or more"]  # Pillow's font has no sign for it
    return pictures.sheet(beside, heads * (len(beside[0]) // 2))
