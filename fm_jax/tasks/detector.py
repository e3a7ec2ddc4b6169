"""Train and evaluate a detector of any kind, from scratch or from a pretrained model."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from fm_jax.core import statistics, tree
from fm_jax.core.config import to_dict
from fm_jax.core.errors import ConfigError
from fm_jax.core.types import Batch, LossFn, Params
from fm_jax.data.boxes import pipeline
from fm_jax.data.boxes.pipeline import Evaluation, Training
from fm_jax.data.boxes.record import Annotated
from fm_jax.data.images.pictures import SPLITS
from fm_jax.data.stream.rows import spread
from fm_jax.evals.baselines import boxes as baselines
from fm_jax.evals.scores import detection as scores
from fm_jax.evals.scores import detector
from fm_jax.evals.scores.detection import Found, Truth
from fm_jax.evals.scores.detector import Scored, Scorer
from fm_jax.optim import schedule
from fm_jax.tasks import detection
from fm_jax.tasks.init import Init
from fm_jax.train import loop, stage, state

_NOTHING = Found(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0))


@dataclass(frozen=True, kw_only=True)
class Config(stage.Plan):
    """Everything that decides the numbers of a run, except the model and its loss."""

    data: pipeline.Config
    schedule: Literal["cosine", "linear", "constant", "steps"] = "cosine"
    final_ratio: float = 0.0  # schedule cosine and linear: last learning rate as a share of the highest
    drop: float = 0.1  # schedule steps: factor of the learning rate
    drop_at: tuple[float, ...] = ()  # schedule steps: where, as shares of the run
    ema_decay: float | None = None  # keep an EMA of the trained parameters and evaluate it; none: no EMA
    frozen: tuple[str, ...] = ()  # patterns of parameters that are not trained, such as backbone/stem/.*
    init: Init = Init()  # a detector of the same kind; for Faster R-CNN also a network with the same backbone
    scorer: Scorer = "numpy"  # numbers of both are equal; pycocotools is what is published
    baselines: bool = False  # also score each class's mean box, and blobs of colour
    measured: int = 500  # maximum training images in the final evaluation, and for the baselines

    def __post_init__(self) -> None:
        """Check that the fields fit together."""
        super().__post_init__()
        if not 0 <= self.final_ratio <= 1 or self.measured < 1:
            raise ConfigError(f"final_ratio {self.final_ratio} must be in 0 to 1, measured {self.measured} at least 1")
        if any(not 0 < share < 1 for share in self.drop_at):
            raise ConfigError(f"drop_at must be shares of the run, above 0 and below 1, not {self.drop_at}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay must be at least 0 and below 1, or none, not {self.ema_decay}")


def rates(cfg: Config) -> schedule.Config:
    """Return the learning-rate schedule, in steps."""
    at = tuple(round(share * cfg.fit.num_steps) for share in cfg.drop_at)
    return stage.rates(cfg, cfg.schedule, final_ratio=cfg.final_ratio, drop=cfg.drop, drop_at=at)


class Setup:
    """A prepared run; all errors in its settings are raised here, before any compilation."""

    def __init__(self, model: detection.Detector, loss: LossFn, cfg: Config, workdir: Path) -> None:
        """Open the three splits and the model to start from.

        Args:
            model: the detector, with as many classes as the data.
            loss: its loss.
            cfg: settings of the run.
            workdir: the run's; data sets are stored in it if `cfg.data_dir` is None.

        Raises:
            ConfigError: the model has another number of classes, or does not accept the images' size.
            DataError: a split is missing or has other classes.
            CheckpointError: weights do not fit the model; the message names all of them.
        """
        self.cfg, self.model, self.loss, self.mesh = cfg, model, loss, stage.open_mesh(cfg)
        self.images: dict[str, Annotated] = pipeline.open_splits(cfg.data, cfg.data_dir or workdir / "data")
        names = self.images["train"].classes
        count, has = cfg.data.num_classes or len(names), detection.count_classes(model)
        if count != has:
            raise ConfigError(
                f"the data has {count} classes, the model {has}; set model.num_classes {count}"
                + (", or data.num_classes to that of the model" if has > len(names) else "")
            )
        self.classes = (*names, *(f"class {number}" for number in range(len(names), count)))
        self.train = Training(self.images["train"], cfg.data)
        self.splits = {split: Evaluation(images, cfg.data) for split, images in self.images.items()}
        self.given = detection.start_of(cfg.init, model, workdir)
        self.find = detection.finder(model)
        self.inputs = (np.zeros((2, *cfg.data.size, 3), np.float32),)
        jax.eval_shape(self.start)  # raises if the weights do not fit

    def start(self) -> tuple[Params, Params]:
        """Return the initial (trained parameters, frozen parameters and running statistics)."""
        params = state.init_params(self.model, self.inputs, jax.random.key(self.cfg.seed), self.mesh)
        if self.given is not None:
            params = detection.onto(params, self.model, self.given, self.classes)
        trained, still = (tree.flatten(part) for part in statistics.split(params))
        for pattern in self.cfg.frozen:
            chosen = [path for path in trained if re.fullmatch(pattern, path)]
            if not chosen:
                raise ConfigError(f"frozen pattern {pattern!r} matches no trained parameter")
            still |= {path: trained.pop(path) for path in chosen}
        return tree.unflatten(trained), tree.unflatten(still)

    def batches(self, split: str) -> Iterator[Batch]:
        """Yield batches of one pass over a split (at most `measured` training images), on the devices."""
        rows = spread(self.splits[split], self.cfg.measured) if split == "train" else self.splits[split]
        yield from stage.one_pass(self.cfg, rows, self.mesh)

    def numbers(self, split: str) -> list[int]:
        """Return which images of a split `batches` has."""
        total, most = len(self.images[split]), self.cfg.measured
        few = total if split != "train" else min(total, most)
        return [number * total // few for number in range(few)]

    def scored(self, params: Params, split: str) -> Scored:
        """Return the objects of a split and what the model finds; an image that cannot be read has nothing found."""
        back = partial(_back, self.cfg.data)
        found = detector.collect(self.find, params, self.batches(split), back)
        numbers = self.numbers(split)
        return Scored(truths(self.images[split], numbers), [found.get(number, _NOTHING) for number in numbers])

    def validate(self, step: int, now: state.TrainState) -> dict[str, float]:
        """Return AP and AP50 of the validation split, and 1 - AP as the error."""
        with jax.set_mesh(self.mesh):
            scored = self.scored(evaluated(now), "validation")
        measured = detector.tables(scored, len(self.classes), self.cfg.scorer).summary()
        return {"ap": measured["ap"], "ap50": measured["ap50"], "error": 1 - measured["ap"]}

    def fit(self, workdir: Path, saved: Any) -> Params:
        """Train; return the parameters to evaluate (the EMA if there is one) with the running statistics.

        Args:
            workdir: the run's.
            saved: the full config as JSON data; `tasks/detection.py` reads its section "data".
        """
        cfg = self.cfg
        done = stage.train(
            cfg,
            workdir,
            stage.make_trainer(cfg, self.loss, rates(cfg), self.start, ema_decay=cfg.ema_decay),
            make_params=self.start,
            batches=stage.batches(cfg, self.train),
            mesh=self.mesh,
            model=self.model,
            meta={"config": saved, "classes": list(self.classes)},
            layout=state.layout(self.model, self.inputs, self.mesh),
            validate=self.validate,
            metric="error",
            work=loop.Work(cfg.batch_size, "images"),
        )
        return evaluated(done)

    def image(self, index: int) -> np.ndarray:
        """Return a test image, uint8 [H, W, 3]."""
        return self.images["test"][index][0]

    def baselines(self, scored: Scored) -> dict[str, dict[str, float]]:
        """Return the scores of detectors without a network on the test images.

        Raises:
            DataError: the training images have no objects, or none of a colour of its own.
        """
        train, numbers = self.images["train"], self.numbers("train")
        known = truths(train, numbers)
        sizes = [train.record(number).size for number in numbers]
        pictures = ((train[number][0], true) for number, true in zip(numbers, known, strict=True))
        simple: dict[str, Callable[[np.ndarray], Found]] = {
            "mean boxes": baselines.mean_boxes(known, sizes),
            "colour blobs": baselines.fit_blobs(pictures),
        }
        found: dict[str, list[Found]] = {name: [] for name in simple}
        for number in self.numbers("test"):
            pixels = self.image(number)
            for name, guess in simple.items():
                found[name].append(guess(pixels))
        measured = {}
        for name, guesses in found.items():
            own = Scored(scored.truths, guesses)
            measured[name] = detector.summary(own, detector.tables(own, len(self.classes), self.cfg.scorer))
        return measured


def truths(images: Annotated, numbers: list[int]) -> list[Truth]:
    """Return the objects of images as scoring needs them; crowds and difficult ones are ignored there."""
    records = (images.record(number).objects for number in numbers)
    return [scores.truth(one.boxes, one.labels, one.crowd | one.difficult, one.area) for one in records]


def evaluated(now: state.TrainState) -> Params:
    """Return the parameters to evaluate: the EMA of the trained ones if there is one, else themselves."""
    return tree.merge(now.params if now.ema is None else now.ema, now.frozen)


def run(model: detection.Detector, loss: LossFn, cfg: Config, workdir: Path) -> dict[str, Any]:
    """Train, evaluate, and return the metrics, also written to results.json.

    Args:
        model: see `Setup`.
        loss: see `Setup`.
        cfg: settings of the run.
        workdir: the run's.
    """
    setup = Setup(model, loss, cfg, workdir)
    params = setup.fit(workdir, to_dict(cfg))
    with jax.set_mesh(setup.mesh):
        splits = {split: setup.scored(params, split) for split in SPLITS}
    extra = {"baselines": setup.baselines(splits["test"])} if cfg.baselines else {}
    return detector.write(workdir, splits, setup.classes, scorer=cfg.scorer, image=setup.image, extra=extra)


def _back(cfg: pipeline.Config, boxes: np.ndarray, row: Mapping[str, np.ndarray]) -> np.ndarray:
    return pipeline.restore(cfg, boxes, [int(side) for side in row["size"]])
