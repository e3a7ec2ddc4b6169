"""The sides of a detector's benchmark are timed only if they compute the same."""

import numpy as np
import pytest

from experiments.benchmarks import _detectors, detectors
from experiments.benchmarks._sides import Start
from fm_jax.core.errors import ConfigError, NumericError
from fm_jax.models.vision import yolox
from tests.close import close


def test_the_batch_has_padding_and_boxes_inside() -> None:
    batch = detectors.drawn(yolox.tiny(), 3, 64)
    assert batch["images"].shape == (3, 64, 64, 3) and batch["box_mask"].sum(axis=1).tolist() == [6, 6, 6]
    boxes = batch["boxes"][batch["box_mask"]]
    assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min() >= 0 and boxes.max() <= 64
    assert not batch["boxes"][~batch["box_mask"]].any() and batch["labels"].max() < 3


@pytest.mark.parametrize("kind", ["predictions", "loss"])
def test_sides_that_differ_are_not_timed(kind: str) -> None:
    value, near, far = {
        "predictions": ([10.0, 1.0], [10.001, 1.0], [10.0, 1.1]),
        "loss": (10.0, 10.001, 10.1),
    }[kind]
    detectors.agree("x", {"ours": {kind: value}, "libreyolo": {kind: near}})
    with pytest.raises(NumericError, match=f"x: {kind} of libreyolo differ from ours"):
        detectors.agree("x", {"ours": {kind: value}, "libreyolo": {kind: far}})
    with pytest.raises(NumericError):
        detectors.agree("x", {"ours": {kind: value}, "libreyolo": {kind: np.nan}})


def test_predictions_have_the_peers_form() -> None:
    offsets = np.zeros((1, 21, 4), np.float32)
    raw = yolox.Raw(offsets, np.zeros((1, 21), np.float32), np.zeros((1, 21, 2), np.float32))  # type: ignore[arg-type]
    found = np.asarray(_detectors.decoded(raw, (32, 32)))
    close(found[0, [0, 16, 20], :4], np.array([[0, 0, 8, 8], [0, 0, 16, 16], [0, 0, 32, 32]]))
    close(found[..., 4:], np.full((1, 21, 3), 0.5))
    assert len(_detectors.shown(found)) == _detectors.SHOWN


def test_only_the_peers_process_is_without_our_environment() -> None:
    assert Start("_detectors", "infer", {}).is_ours and not Start("_torch_detectors", "infer", {}).is_ours


def test_an_empty_comparison_is_refused() -> None:
    with pytest.raises(ConfigError, match="side 40 a multiple of 32"):
        detectors.Config(side=40)
