"""Training an image classifier on any backbone: its data, its model, where it starts from, and its evaluation."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np

from fm_jax.checkpoint import seal, surgery
from fm_jax.core import statistics, tree
from fm_jax.core.config import to_dict
from fm_jax.core.errors import ConfigError, DataError
from fm_jax.core.types import Batch, Params
from fm_jax.data.images import pictures
from fm_jax.data.images.mixup import Mix, Mixed
from fm_jax.data.stream.rows import spread
from fm_jax.evals.scores import image_classification
from fm_jax.hub.pretrained import Pretrained
from fm_jax.layers.patch_embed import regrid
from fm_jax.models.vision.classifier import ImageClassifier
from fm_jax.models.vision.vit import ViT
from fm_jax.objectives.classify import softmax
from fm_jax.optim import schedule
from fm_jax.tasks import vision as vision_models
from fm_jax.tasks.init import Init
from fm_jax.train import loop, stage, state


@dataclass(frozen=True, kw_only=True)
class Config(stage.Plan):
    """Everything that decides the numbers of a run but the backbone."""

    data: pictures.Config
    accumulate: int = 1  # parts a step's batch is worked through in; batch normalisation sees a part at a time
    schedule: Literal["cosine", "linear", "constant", "steps"] = "cosine"
    drop: float = 0.1  # steps: what the rate is multiplied by
    drop_at: tuple[float, ...] = ()  # steps: where, in shares of the run
    drop_every: float = 0.0  # steps: or how often, in shares of the run
    label_smoothing: float = 0.0
    dropout: float = 0.0  # of the features that the head reads
    mix: Mix | None = None
    repeats: int = 1  # views of each image in a batch (Hoffer et al. 2020)
    ema_decay: float | None = None  # keep a running mean of the trained leaves, and evaluate that
    init: Init = Init()  # whose backbone this one starts from
    measured: int = 5000  # training images, at most, that the last evaluation sees as well

    def __post_init__(self) -> None:
        """Refuse parts that do not fit together."""
        super().__post_init__()
        for name in ("label_smoothing", "dropout", "drop_every"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        if any(not 0 < share < 1 for share in self.drop_at):
            raise ConfigError(f"drop_at holds shares of the run, above 0 and below 1, not {self.drop_at}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay must be at least 0 and below 1, or none, not {self.ema_decay}")
        if self.data.recipe.views != 1 or self.data.recipe.small:
            raise ConfigError("a classifier sees one view of an image: set data.recipe.views 1 and data.recipe.small 0")
        if self.measured < 1 or not 1 <= self.repeats <= self.batch_size:
            raise ConfigError(
                f"measured {self.measured} must be at least 1, repeats {self.repeats} within 1 and batch_size"
            )


def rates(cfg: Config) -> schedule.Config:
    """Return the schedule in steps."""
    steps = cfg.fit.num_steps
    at, every = tuple(round(share * steps) for share in cfg.drop_at), round(cfg.drop_every * steps)
    return stage.rates(cfg, cfg.schedule, drop=cfg.drop, drop_at=at, drop_every=every)


class Setup:
    """A run made ready: everything that can be refused is refused here, before anything is compiled."""

    def __init__(self, backbone: nn.Module, cfg: Config, workdir: Path, found: Pretrained | None = None) -> None:
        """Open the three splits and what the run starts from.

        Args:
            backbone: has `features(image) -> [B, D]`.
            cfg: of the run.
            workdir: where tensorflow-datasets are kept if `cfg` names no place.
            found: what `cfg.init.from_` holds, where it has been read already.

        Raises:
            ConfigError: images of a size or with channels that the backbone does not take, or an impossible batch.
            DataError: a split that is missing or has other classes, or only one class in all.
            CheckpointError: weights that do not fit the backbone, all of them named.
        """
        self.cfg, self.mesh, self.rates = cfg, stage.open_mesh(cfg), rates(cfg)
        data_dir = cfg.data_dir or workdir / "data"
        opened = {split: pictures.pictures(cfg.data, split, data_dir) for split in pictures.SPLITS}
        self.splits = {split: pictures.Evaluation(shown, cfg.data) for split, shown in opened.items()}
        self.train = pictures.Training(opened["train"], cfg.data)
        count, names = self.train.limits["label"], opened["train"].classes
        if count < 2:  # of whatever image it would be right, at a loss of 0
            raise DataError(f"{self.train.name} has one class, {names[0]!r}: is it the folder of the classes' folders?")
        self.classes = (*names, *(f"class {number}" for number in range(len(names), count)))
        self.model = ImageClassifier(backbone, count, cfg.dropout)
        # a run that goes on has all of it in its own checkpoint
        if found is None and cfg.init.from_ is not None and not seal.steps(workdir / "checkpoints"):
            found = vision_models.load(cfg.init.from_, revision=cfg.init.revision)
        if found is not None:
            vision_models.remind(found, cfg.data)
        self.found = found
        self.loss = softmax(self.model.apply, ("image",), label_smoothing=cfg.label_smoothing)
        self.inputs = (np.zeros((2, cfg.data.size, cfg.data.size, 3), np.float32),)
        jax.eval_shape(self.start)  # for what it refuses

    def batches(self, split: str) -> Iterator[Batch]:
        """Yield a split once, on the devices; of the training split at most `measured` images."""
        rows = spread(self.splits[split], self.cfg.measured) if split == "train" else self.splits[split]
        yield from stage.one_pass(self.cfg, rows, self.mesh)

    def logits(self, params: Params, batch: Batch) -> jax.Array:
        """Return a batch's logits [B, C] in evaluation."""
        logits: jax.Array = self.model.apply({"params": params}, batch["image"])
        return logits

    def start(self) -> tuple[Params, Params]:
        """Return (trained, running statistics) before the first step."""
        fresh = state.init_params(self.model, self.inputs, jax.random.key(self.cfg.seed), self.mesh)
        return statistics.split(self._loaded(fresh))

    def fit(self, workdir: Path, validate: Callable[[int, Params], Mapping[str, float]], saved: Any) -> Params:
        """Train, and return the parameters that are evaluated: running statistics of batches, and the mean if kept.

        Args:
            workdir: of the run.
            validate: (step, whole parameters) -> metrics, of which "nll" decides which step is best.
            saved: the whole config as JSON data; `tasks/vision.py` reads its section "data".
        """
        cfg = self.cfg
        drawn = stage.batches(cfg, self.train, repeats=cfg.repeats)
        done = stage.train(
            cfg,
            workdir,
            stage.make_trainer(cfg, self.loss, self.rates, self.start, ema_decay=cfg.ema_decay),
            make_params=self.start,
            batches=Mixed(drawn, cfg.mix, len(self.classes)) if cfg.mix else drawn,
            mesh=self.mesh,
            model=self.model,
            meta={"config": saved, "classes": list(self.classes)},
            layout=state.layout(self.model, self.inputs, self.mesh),
            validate=lambda step, now: validate(step, whole(now)),
            metric="nll",
            work=loop.Work(cfg.batch_size, "images"),
        )
        return whole(done)

    def _loaded(self, fresh: Params) -> Params:
        """Return drawn parameters with the pretrained backbone's in their place; the head stays as drawn."""
        if self.found is None:
            return fresh
        old, new, reshape = self.found.module, self.model.backbone, dict[str, surgery.Reshape]()
        afresh: tuple[str, ...] = ()
        if isinstance(old, ViT) and isinstance(new, ViT):
            before, after = old.cfg.patches, new.cfg.patches
            if (before.grid, before.cls) != (after.grid, after.cls):
                reshape["backbone/embed/positions"] = regrid(before, after)
            if (new.cfg.pool == "mean_norm") != (old.cfg.pool == "mean_norm"):  # tokens' norm is no norm of their mean
                afresh = ("backbone/norm_final/.*",)
        given = {"backbone": self.found.params}
        return surgery.load(fresh, given, fresh=("head/.*", *afresh), unused=afresh, reshape=reshape)


def whole(now: state.TrainState) -> Params:
    """Return the parameters that are evaluated: the running mean of the trained leaves if there is one."""
    return tree.merge(now.params if now.ema is None else now.ema, now.frozen)


def run(
    backbone: nn.Module,
    cfg: Config,
    workdir: Path,
    found: Pretrained | None = None,
    *,
    saved: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, and return (and write to results.json) what was measured.

    Args:
        backbone: see `Setup`.
        cfg: of the run.
        workdir: of the run.
        found: see `Setup`.
        saved: see `Setup.fit`; `cfg` by default.
    """
    setup = Setup(backbone, cfg, workdir, found)
    validate = image_classification.validation(setup.loss, partial(setup.batches, "validation"))
    params = setup.fit(workdir, validate, to_dict(cfg) if saved is None else saved)
    with jax.set_mesh(setup.mesh):
        splits = {split: setup.batches(split) for split in pictures.SPLITS}
        return image_classification.write(workdir, setup.logits, params, splits, setup.classes)
