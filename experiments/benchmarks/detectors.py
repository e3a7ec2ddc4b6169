"""Benchmark YOLOX beside libreyolo on torch, with the same weights: images per second of inference and of training.

Both sides open one folder of random weights that our hub has written, and read one batch. A turn of inference is the
decoded predictions of a batch; a turn of training is one step: forward and backward pass, SimOTA, SGD with Nesterov
momentum. Before anything is timed, 64 of the predicted numbers (within 1e-3 of the largest) and the first step's losses
(within 1e-3 of the loss) must agree. The time of our non-maximum suppression is told beside (`nms_s`), not compared:
that of libreyolo needs torchvision's compiled operators. `again` is our own side in a second process: its ratio shows
the noise, and it needs no torch.

    python -m experiments.benchmarks.detectors --workdir runs/detectors
    python -m experiments.benchmarks.detectors --workdir runs/detectors --models tiny --batches 1

Needs torch, safetensors and libreyolo 1.6.0, except for `--peers again`. Nothing has been measured on an idle machine
yet; the results go to `history.jsonl` (`--history PATH`: to another file; `--history none`: to none). Faster R-CNN has
no row: torchvision's own RoIAlign and suppression are compiled for CUDA in the wheels beside a torch for CPUs.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax.core import meta

from experiments.benchmarks import _pairs
from experiments.benchmarks._sides import Start
from fm_jax import cli
from fm_jax.core.config import check_least
from fm_jax.core.errors import ConfigError, NumericError
from fm_jax.hub import pretrained
from fm_jax.models.vision import yolox

Model = Literal["tiny", "s", "m"]
Peer = Literal["libreyolo", "again"]
SIZES = {"tiny": yolox.yolox_tiny, "s": yolox.yolox_s, "m": yolox.yolox_m}
_AGREE = 1e-3  # of the largest predicted number, or of the loss
_OBJECTS = 6  # of an image; two rows of padding follow
_RATE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Config(_pairs.Plan):
    """The models, the images and the peers."""

    models: tuple[Model, ...] = ("tiny", "s")
    side: int = 416  # pixels of the square images
    batches: tuple[int, ...] = (1, 8)  # images of a turn of inference
    train_batch: int = 8  # images of a training step; 0: no training
    small: bool = False  # models that compile in seconds; their times mean nothing
    peers: tuple[Peer, ...] = ("libreyolo",)

    def __post_init__(self) -> None:
        """Refuse an empty comparison."""
        super().__post_init__()
        check_least(self, side=32, train_batch=0)
        if not self.models or not self.peers or min(self.batches, default=1) < 1 or self.side % 32:
            raise ConfigError(
                f"models and peers must name at least one each, batches {self.batches} be at least 1, and side "
                f"{self.side} a multiple of 32"
            )


def config() -> Config:
    """Return YOLOX-tiny and -s at 416 pixels beside libreyolo."""
    return Config()


def debug() -> Config:
    """Return one pair of a tiny model, beside our own side."""
    sizes = {"models": ("tiny",), "side": 32, "batches": (2,), "train_batch": 2, "small": True}
    return Config(**sizes, peers=("again",), pairs=1, allow_busy=True, history=None)  # type: ignore[arg-type]


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Measure every model and batch, print the table; return the rows, also written to results.json."""
    _pairs.check(cfg, cfg.peers, needs=("torch", "safetensors", "libreyolo"))
    rows: list[dict[str, Any]] = []
    turns: dict[str, Any] = {}
    for name in cfg.models:
        net = yolox.tiny() if cfg.small else SIZES[name]()
        folder = workdir / "models" / name
        write(net, folder)
        work = [("infer", count) for count in cfg.batches] + [("train", cfg.train_batch)] * bool(cfg.train_batch)
        for kind, count in work:
            batch = workdir / f"batch_{count}.npz"
            np.savez(batch, allow_pickle=False, **drawn(net, count, cfg.side))
            starts = {side: start(side, kind, net, folder, batch) for side in ("ours", *cfg.peers)}
            family = f"yolox_{name} {kind} {count}"
            logs = workdir / "logs" / family.replace(" ", "_")
            measured, facts = _pairs.compare(cfg, starts, logs, partial(agree, family))
            for peer in cfg.peers:
                row = _pairs.row(cfg, family, peer, measured, ("ours", peer))
                for side, found in (("ours", facts["ours"]), ("peer", facts[peer])):
                    row |= {f"{side}_resident_gb": found["resident_gb"]}
                    if row[side] is not None:
                        row |= {f"{side}_images_a_second": round(count / row[side], 2)}
                rows.append(row | {key: facts["ours"][key] for key in ("nms_s", "loss") if key in facts["ours"]})
                _pairs.keep(workdir, rows)
            turns[family] = _pairs.as_data(measured)
    return _pairs.finish(cfg, workdir, "benchmarks.detectors", rows, turns=turns)


def write(net: yolox.Config, folder: Path) -> None:
    """Write a model with random weights."""
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run, perhaps of another size
    module = yolox.YOLOX(net)
    images = np.zeros((1, 32, 32, net.in_channels), np.float32)
    pretrained.save(folder, module, meta.unbox(jax.jit(module.init)(jax.random.key(0), images)["params"]))


def drawn(net: yolox.Config, count: int, side: int) -> dict[str, np.ndarray]:
    """Return a batch of random images of 0 to 255 with boxes, the last two rows of them padding."""
    rng = np.random.default_rng(count)
    low = rng.uniform(0, 0.6 * side, (count, _OBJECTS + 2, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.1 * side, 0.4 * side, low.shape)], axis=-1).astype(np.float32)
    mask = np.broadcast_to(np.arange(_OBJECTS + 2) < _OBJECTS, boxes.shape[:2])
    return {
        "images": rng.uniform(0, 255, (count, side, side, net.in_channels)).astype(np.float32),
        "boxes": boxes * mask[..., None],
        "labels": (rng.integers(0, net.num_classes, mask.shape) * mask).astype(np.int32),
        "box_mask": mask.copy(),
        "weights": np.ones(count, np.float32),
    }


def start(side: str, kind: str, net: yolox.Config, folder: Path, batch: Path) -> Start:
    """Return how a side starts: ours and `again` alike, the other with torch."""
    given: dict[str, Any] = {"folder": str(folder.absolute()), "batch": str(batch.absolute())}
    given |= {"learning_rate": _RATE} if kind == "train" else {}
    if side in ("ours", "again"):
        return Start("_detectors", kind, given | {"cache": jax.config.jax_compilation_cache_dir})  # type: ignore[attr-defined]
    return Start("_torch_detectors", kind, given | {"depth": net.depth, "width": net.width, "classes": net.num_classes})


def agree(family: str, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise NumericError unless all sides predict the same, or had the same loss in the first step."""
    kind = "loss" if "loss" in facts["ours"] else "predictions"
    ours = np.atleast_1d(facts["ours"][kind])
    for side, found in facts.items():
        theirs = np.atleast_1d(found[kind])
        if not np.abs(theirs - ours).max() <= _AGREE * np.abs(ours).max():
            worst = int(np.abs(theirs - ours).argmax())
            raise NumericError(
                f"{family}: {kind} of {side} differ from ours, {theirs[worst]:.6g} instead of {ours[worst]:.6g}: the "
                "sides do not compute the same, so nothing is timed"
            )


if __name__ == "__main__":
    cli.main(run, {"default": config, "debug": debug}, resumable=("*",))
