"""Photographs of any size give boxes in their own pixels; files that cannot be read are named, and the rest is done."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments.vision import detect
from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.boxes import pipeline
from fm_jax.models.vision import yolox
from fm_jax.ops.boxes import Detections
from fm_jax.tasks import detection
from fm_jax.tasks.detection import Opened
from tests.close import close

CFG = detect.Config(images=Path("photos"), batch_size=2)
NAMES = ("cat", "dog", "hen")


def fake(_: Any) -> Any:
    """Find one box in the left half of the content, surely, and one that is not sure."""

    def find(params: Any, batch: Any) -> Detections:
        count = len(batch["images"])
        boxes = np.tile(np.array([[0, 0, 16, 16], [8, 8, 12, 12]], np.float32), (count, 1, 1))
        scores, classes = np.tile([[0.9, 0.1]], (count, 1)), np.tile([[1, 2]], (count, 1))
        return Detections(boxes, scores, classes, np.ones((count, 2), bool))  # type: ignore[arg-type]

    return find


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    for name, size in (("a.png", (64, 32)), ("deeper/b.png", (16, 32)), ("d.png", (32, 32))):
        Image.new("RGB", size, "grey").save(folder / name)
    (folder / "c.jpg").write_bytes(b"no image")
    opened = Opened(yolox.YOLOX(yolox.tiny()), {}, NAMES, pipeline.Config(size=(32, 32)))
    monkeypatch.setattr(detection, "load", lambda *_: opened)
    monkeypatch.setattr(detection, "finder", fake)
    return folder


def test_boxes_are_in_pixels_of_each_photograph(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = detect.run(replace(CFG, images=photos), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == measured
    found = measured["images"]
    assert {name: (one["height"], one["width"]) for name, one in found.items()} == {
        "a.png": (32, 64),
        "d.png": (32, 32),
        "deeper/b.png": (32, 16),
    }
    for name, box in {"a.png": [0, 0, 32, 32], "d.png": [0, 0, 16, 16], "deeper/b.png": [0, 0, 16, 16]}.items():
        (only,) = found[name]["objects"]  # the other one is below the score
        assert only["class"] == "dog"
        close(only["score"], 0.9)
        close(np.array(only["box"]), np.array(box))
        assert (tmp_path / "drawn" / f"{name}.png").exists()
    said = capsys.readouterr().out
    assert list(measured["unreadable"]) == ["c.jpg"] and "left out: " in said and "c.jpg" in said
    assert "4 of 4 images" in said and "3 objects of score ≥ 0.3 in 3 images; 1 unreadable" in said


def test_one_photograph_and_another_size(photos: Path, tmp_path: Path) -> None:
    cfg = replace(CFG, images=photos / "a.png", size=(64, 64), draw=False, score=0.0, classes=("x", "y", "z"))
    measured = detect.run(cfg, tmp_path)
    objects = measured["images"]["a.png"]["objects"]
    assert [one["class"] for one in objects] == ["y", "z"] and not (tmp_path / "drawn").exists()
    close(np.array(objects[0]["box"]), np.array([0, 0, 16, 16]))


def test_bad_settings_and_empty_folders_are_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="score must be in 0 to 1"):
        replace(CFG, score=2.0)
    with pytest.raises(ConfigError, match="size must be two numbers"):
        replace(CFG, size=(0, 8))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no image files"):
        detect.run(replace(CFG, images=tmp_path / "empty"), tmp_path)
    with pytest.raises(DataError, match=r"none of the 1 images can be read; the first: .*c\.jpg"):
        detect.run(replace(CFG, images=photos / "c.jpg"), tmp_path)
