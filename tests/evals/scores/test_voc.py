"""VOC's two rules beside slow ones in plain Python."""

import numpy as np
import pytest

from fm_jax.evals.scores import detection
from fm_jax.evals.scores.detection import Found
from fm_jax.evals.scores.voc import voc
from tests.close import close
from tests.evals.scores.test_detection import box, drawn, one, seen, share


def slow(truths: list, found: list, number: int, threshold: float) -> tuple[float, float]:
    """One class's AP by both rules, detection by detection."""
    positives = sum(int(((t.labels == number) & ~t.ignored).sum()) for t in truths)
    if not positives:
        return float("nan"), float("nan")
    rows = [(i, k) for i, guess in enumerate(found) for k in range(len(guess.labels)) if guess.labels[k] == number]
    taken, right, count, points = set(), 0, 0, []
    for i, k in sorted(rows, key=lambda row: -found[row[0]].scores[row[1]]):
        objects = [n for n in range(len(truths[i].labels)) if truths[i].labels[n] == number]
        shares = {n: share(found[i].boxes[k], truths[i].boxes[n], inside=False) for n in objects}
        best = max(objects, key=shares.__getitem__, default=None)
        if best is not None and shares[best] >= threshold and truths[i].ignored[best]:
            continue
        hit = best is not None and shares[best] >= threshold and (i, best) not in taken
        taken |= {(i, best)} if hit else set()
        right, count = right + hit, count + 1
        points.append((right, right / count))
    tenths = [max((p for r, p in points if 10 * r >= tenth * positives), default=0.0) for tenth in range(11)]
    steps = [max((p for r, p in points if r >= reached), default=0.0) for reached in range(1, positives + 1)]
    return sum(tenths) / 11, sum(steps) / positives


@pytest.mark.parametrize("threshold", [0.5, 0.75])
def test_both_rules_are_those_of_the_kit(threshold: float) -> None:
    for seed in range(8):
        truths, found = drawn(seed, 20)
        got = voc(truths, found, 3, threshold=threshold)
        for number in range(2):
            close([got.points[number], got.area[number]], list(slow(truths, found, number, threshold)), scale=1.0)
        assert np.isnan(got.area[2]) and np.isnan(slow(truths, found, 2, threshold)[0])  # a class without objects


def test_a_hand_made_case_of_four_detections() -> None:
    truths = [one(box(0, 0, 10, 10)), one(box(0, 0, 10, 10)), one(box(0, 0, 10, 10))]
    there, away = box(0, 0, 10, 10), box(50, 50, 60, 60)
    found = [seen((there, 0, 0.9), (there, 0, 0.6)), seen((away, 0, 0.8), (there, 0, 0.7)), seen()]
    got = voc(truths, found, 1)  # right, wrong, right, wrong: recalls 1/3, 2/3, best precisions 1 and 2/3
    close(got.area, np.array([5 / 9]))
    close(got.points, np.array([6 / 11]))  # recalls 0 … 0.3, then 0.4 … 0.6
    close(got.summary(), {"voc2007": 6 / 11, "voc2010": 5 / 9})


def test_an_object_of_exactly_the_threshold_is_found_and_a_taken_one_is_not_replaced_by_the_second_best() -> None:
    assert voc([one(box(0, 0, 10, 10))], [seen((box(0, 0, 10, 5), 0, 0.9))], 1).area == [1.0]
    pair = one(np.concatenate([box(0, 0, 10, 10), box(0, 2, 10, 12)]))
    twice = [seen((box(0, 0, 10, 10), 0, 0.9), (box(0, 0, 10, 10), 0, 0.8))]
    assert voc([pair], twice, 1).area == [0.5]  # COCO gives the second to the other object
    assert detection.coco([pair], twice, 1).curves()[0].min() == 1


def test_a_difficult_object_is_neither_a_positive_nor_a_miss() -> None:
    lone, hard = one(box(0, 0, 10, 10)), one(box(0, 0, 10, 10), ignored=True)
    there = (box(0, 0, 10, 10), 0, 0.9)
    assert voc([hard, lone], [seen(there, there), seen(there)], 1).area == [1.0]
    assert voc([hard], [seen(there)], 1).summary() == {"voc2007": -1.0, "voc2010": -1.0}


def test_no_detections_have_ap_0() -> None:
    assert voc([one(box(0, 0, 1, 1))], [Found(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))], 1).points == [0.0]
