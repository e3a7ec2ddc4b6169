"""What the experiments with detectors share: drawn scenes."""

from dataclasses import replace
from typing import Any

from fm_jax.data.boxes import pipeline, scenes

COCO_TRAIN = 118_287  # images of train2017


def drawn(side: int, **options: Any) -> pipeline.Config:
    """Return scenes of one to three of four shapes, of `side` pixels; `options` are fields of `pipeline.Config`."""
    source = scenes.Config(side=side, validation=128, test=512)
    return pipeline.Config(source, (side, side), max_boxes=4, **options)


def few(cfg: pipeline.Config) -> pipeline.Config:
    """Return the scenes in small numbers, for a run of two steps."""
    source = scenes.Config(side=cfg.size[0], train=8, validation=4, test=4)
    return replace(cfg, source=source, max_boxes=8)
