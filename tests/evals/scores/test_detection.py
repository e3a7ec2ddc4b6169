"""COCO's rule beside a slow one in plain Python and beside `pycocotools`; the confusion matrix by hand."""

import sys

import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.evals.scores import coco_official, detection
from fm_jax.evals.scores.detection import AREAS, LIMITS, RECALLS, THRESHOLDS, Found, Truth
from tests.close import close


def box(*sides: float) -> np.ndarray:
    return np.array([sides], np.float64)


def one(box: np.ndarray, label: int = 0, *, ignored: bool = False) -> Truth:
    return detection.truth(box, np.full(len(box), label), np.full(len(box), ignored))


def seen(*rows: tuple[np.ndarray, int, float]) -> Found:
    boxes, labels, scores = zip(*rows, strict=True) if rows else ((), (), ())
    return Found(np.concatenate(boxes) if rows else np.zeros((0, 4)), np.array(labels, np.int64), np.array(scores))


def drawn(seed: int, images: int, classes: int = 3, most: int = 8, *, dense: bool = False) -> tuple[list, list]:
    """Random images: crowds, all sizes, equal scores, equal boxes, classes and images without objects."""
    rng = np.random.default_rng(seed)
    truths, found = [], []
    for _ in range(images):
        count = int(rng.integers(0, most))
        corner = rng.integers(0, 60, (count, 2)).astype(np.float64)
        boxes = np.concatenate([corner, corner + rng.choice([4, 30, 31.5, 40, 97, 160], (count, 2))], axis=1)
        labels = rng.integers(0, classes - 1, count)
        crowd = rng.random(count) < 0.2
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) * rng.choice([1.0, 0.6], count)
        if count and rng.random() < 0.3:  # an object twice
            boxes, labels, crowd, areas = (np.concatenate([x, x[:1]]) for x in (boxes, labels, crowd, areas))
        truths.append(detection.truth(boxes, labels, crowd, areas))
        copies = np.repeat(boxes, 40 if dense else 3, axis=0)
        near = copies + rng.choice([0, 0, 1, 3, 8], copies.shape) * rng.choice([-1, 1], copies.shape)
        stray = rng.uniform(0, 60, (4, 2))
        near = np.concatenate([near, np.concatenate([stray, stray + rng.uniform(2, 120, (4, 2))], axis=1)])
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        kinds = np.concatenate([np.repeat(labels, 40 if dense else 3), rng.integers(0, classes, 4)])
        scores = rng.choice([0.1, 0.25, 0.5, 0.5, 0.9], len(near)) if rng.random() < 0.5 else rng.random(len(near))
        found.append(Found(near.astype(np.float32).astype(np.float64), kinds, scores))
    return truths, found


def share(one: np.ndarray, other: np.ndarray, *, inside: bool) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    if wide <= 0 or high <= 0:
        return 0.0
    own, its = ((b[2] - b[0]) * (b[3] - b[1]) for b in (one, other))
    return wide * high / (own if inside else own + its - wide * high)


def slow(truths: list, found: list, number: int, threshold: float, area: str, limit: int) -> tuple[float, float]:
    """One class's AP and highest recall, object by object, as the rule is written."""
    (low, high), rows, positives = AREAS[area], [], 0
    for true, guess in zip(truths, found, strict=True):
        mine = [n for n in range(len(true.labels)) if true.labels[n] == number]
        out = {n: bool(true.ignored[n]) or not low <= true.areas[n] <= high for n in mine}
        positives += sum(not out[n] for n in mine)
        theirs = [k for k in range(len(guess.labels)) if guess.labels[k] == number]
        taken: set[int] = set()
        for k in sorted(theirs, key=lambda k: -guess.scores[k])[:limit]:
            free = [n for n in mine if true.ignored[n] or n not in taken]
            shares = {n: share(guess.boxes[k], true.boxes[n], inside=true.ignored[n]) for n in free}
            fit = [n for n in free if shares[n] >= threshold]
            choice = max(reversed([n for n in fit if not out[n]] or fit), key=shares.__getitem__, default=None)
            taken |= {choice} - {None}
            left, top, right, bottom = guess.boxes[k]
            neither = out[choice] if choice is not None else not low <= (right - left) * (bottom - top) <= high
            if not neither:
                rows.append((guess.scores[k], choice is not None))
    if not positives:
        return -1.0, -1.0
    points, right = [], 0
    for count, (_, hit) in enumerate(sorted(rows, key=lambda row: -row[0]), start=1):
        right += hit
        points.append((right / positives, right / count))
    best = [max((precision for recall, precision in points if recall >= r), default=0.0) for r in RECALLS]
    return sum(best) / len(RECALLS), right / positives


def test_ap_and_recall_are_those_of_the_rule_object_by_object() -> None:
    truths, found = drawn(0, 12)
    tables = detection.coco(truths, found, 3)
    for t in (0, 5, 9):
        for a, area in enumerate(AREAS):
            for k, limit in enumerate(LIMITS):
                for number in range(3):
                    ap, recall = slow(truths, found, number, THRESHOLDS[t], area, limit)
                    close(tables.precision[t, :, number, a, k].mean(), ap, scale=1.0)
                    close(tables.recall[t, number, a, k], recall, scale=1.0)


@pytest.mark.parametrize("seed", range(6))
def test_every_table_equals_that_of_pycocotools_bit_for_bit(seed: int) -> None:
    truths, found = drawn(seed, 25, dense=seed % 2 == 1)
    ours, theirs = detection.coco(truths, found, 3), coco_official.coco(truths, found, 3)
    np.testing.assert_array_equal(ours.precision, theirs.precision)
    np.testing.assert_array_equal(ours.recall, theirs.recall)
    assert len(set(ours.summary().values())) > 8  # nothing is compared that is the same everywhere
    from pycocotools.cocoeval import COCOeval  # fm_jax[detection]

    evaluation = COCOeval(iouType="bbox")
    evaluation.eval = {"precision": theirs.precision, "recall": theirs.recall, "params": evaluation.params}
    evaluation.summarize()
    assert list(ours.summary().values()) == evaluation.stats.tolist()


def test_without_pycocotools_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    truths, found = drawn(0, 2)
    with pytest.raises(ConfigError, match=r'install "fm_jax\[detection\]", or set scorer numpy'):
        coco_official.coco(truths, found, 3)


def test_perfect_detections_have_ap_1_and_none_has_0() -> None:
    truths = [one(box(0, 0, 10, 10)), one(box(5, 5, 110, 110), 1)]
    perfect = [seen((box(0, 0, 10, 10), 0, 0.5)), seen((box(5, 5, 110, 110), 1, 0.1))]
    summary = detection.coco(truths, perfect, 3).summary()
    close(summary, dict.fromkeys(summary, 1.0) | {"ap_medium": -1.0, "ar_medium": -1.0})
    close(detection.coco(truths, perfect, 3).by_class(), np.array([1, 1, -1]))
    assert detection.coco(truths, [seen(), seen()], 3).summary()["ap"] == 0


def test_images_with_only_a_crowd_have_no_ap_and_a_detection_in_it_costs_nothing() -> None:
    crowd, lone = one(box(0, 0, 50, 50), ignored=True), one(box(100, 0, 110, 10))
    inside = [(box(x, 0, x + 10, 10), 0, 0.9) for x in (0, 10, 20)]
    assert detection.coco([crowd], [seen(*inside)], 1).summary()["ap"] == -1
    both = [crowd, lone], [seen(*inside), seen((box(100, 0, 110, 10), 0, 0.1))]
    close(detection.coco(*both, 1).summary()["ap"], 1.0)
    wrong = [lone, lone], [seen(*inside), seen((box(100, 0, 110, 10), 0, 0.1))]
    assert detection.coco(*wrong, 1).summary()["ap"] < 0.3


def test_a_cut_at_a_score_lowers_ap() -> None:
    truths, found = drawn(3, 20)
    cut = [Found(*(part[guess.scores >= 0.5] for part in guess)) for guess in found]
    assert detection.coco(truths, cut, 3).summary()["ap"] < detection.coco(truths, found, 3).summary()["ap"]


def test_the_order_of_images_and_of_detections_with_other_scores_changes_nothing() -> None:
    truths, found = drawn(4, 20)
    rng = np.random.default_rng(0)
    found = [Found(guess.boxes, guess.labels, rng.random(len(guess.scores))) for guess in found]
    turned = [Found(*(part[::-1] for part in guess)) for guess in found]
    order = rng.permutation(20)
    again = detection.coco([truths[i] for i in order], [turned[i] for i in order], 3)
    np.testing.assert_array_equal(again.precision, detection.coco(truths, found, 3).precision)


def test_confusion_counts_pairs_misses_and_detections_on_nothing() -> None:
    true = Truth(
        np.array([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 90, 30]], np.float64),
        np.array([0, 1, 1, 0]),
        np.array([False, False, False, True]),
        np.full(4, 100.0),
    )
    guess = seen(
        (box(0, 0, 10, 11), 0, 0.9),  # right
        (box(0, 0, 10, 10.5), 1, 0.3),  # a better box on the same object, of another class
        (box(21, 0, 30, 10), 0, 0.8),  # class 0 on an object of class 1
        (box(40, 0, 50, 10), 1, 0.2),  # below the score: its object is missed
        (box(60, 0, 70, 10), 1, 0.9),  # in the ignored object
        (box(200, 0, 210, 10), 1, 0.9),  # on nothing
    )
    counts = detection.confusion([true], [guess], 2)
    #                          found 0, 1, nothing
    assert counts.tolist() == [[0, 1, 0], [1, 0, 1], [1, 1, 0]]
    assert detection.confusion([one(box(0, 0, 1, 1))], [seen()], 1).tolist() == [[0, 1], [0, 0]]
    assert detection.confusion([one(np.zeros((0, 4)))], [seen((box(0, 0, 1, 1), 0, 1.0))], 1).tolist() == [
        [0, 0],
        [1, 0],
    ]


def test_what_cannot_be_scored_is_refused() -> None:
    truths = [one(box(0, 0, 1, 1))]
    for wrong, said in (
        (([], [], 1), "0 images"),
        ((truths, [], 1), "1 images with objects and 0"),
        ((truths, [seen((box(0, 0, 1, 1), 1, 1.0))], 1), "image 0: detections have class 1, outside 0 … 0"),
        ((truths, [seen((box(0, 0, 1, np.nan), 0, 1.0))], 1), "image 0: a detected box is not finite: nan"),
        ((truths, [seen((box(0, 0, 1, 1), 0, np.inf))], 1), "image 0: a score is not finite: inf"),
        ((truths, [Found(box(0, 0, 1, 1), np.zeros(2, int), np.zeros(1))], 1), "do not fit together"),
    ):
        with pytest.raises(DataError, match=said):
            detection.coco(*wrong)
