"""Train and evaluate an image classifier with any backbone, from scratch or from a pretrained backbone."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np

from fm_jax.checkpoint import surgery
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
from fm_jax.tasks.init import Init, resumes
from fm_jax.train import loop, stage, state


@dataclass(frozen=True, kw_only=True)
class Config(stage.Plan):
    """Everything that decides the numbers of a run, except the backbone."""

    data: pictures.Config
    accumulate: int = 1  # gradient accumulation steps; batch statistics are those of one part
    schedule: Literal["cosine", "linear", "constant", "steps"] = "cosine"
    drop: float = 0.1  # schedule steps: factor of the learning rate
    drop_at: tuple[float, ...] = ()  # schedule steps: where, as shares of the run
    drop_every: float = 0.0  # schedule steps: or how often, as a share of the run
    label_smoothing: float = 0.0
    dropout: float = 0.0  # on the head's input features
    mix: Mix | None = None  # mixup and CutMix; none: neither
    repeats: int = 1  # augmented views of each image per batch (Hoffer et al. 2020)
    ema_decay: float | None = None  # keep an EMA of the trained parameters and evaluate it; none: no EMA
    init: Init = Init()  # model whose backbone the run starts from
    measured: int = 5000  # maximum training images in the final evaluation

    def __post_init__(self) -> None:
        """Check that the fields fit together."""
        super().__post_init__()
        for name in ("label_smoothing", "dropout", "drop_every"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        if any(not 0 < share < 1 for share in self.drop_at):
            raise ConfigError(f"drop_at must be shares of the run, above 0 and below 1, not {self.drop_at}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay must be at least 0 and below 1, or none, not {self.ema_decay}")
        if self.data.recipe.views != 1 or self.data.recipe.small:
            raise ConfigError(
                "a classifier needs one view of each image: set data.recipe.views 1 and data.recipe.small 0"
            )
        if self.measured < 1 or not 1 <= self.repeats <= self.batch_size:
            raise ConfigError(
                f"measured {self.measured} must be at least 1, repeats {self.repeats} between 1 and batch_size"
            )


def rates(cfg: Config) -> schedule.Config:
    """Return the learning-rate schedule, in steps."""
    steps = cfg.fit.num_steps
    at, every = tuple(round(share * steps) for share in cfg.drop_at), round(cfg.drop_every * steps)
    return stage.rates(cfg, cfg.schedule, drop=cfg.drop, drop_at=at, drop_every=every)


class Setup:
    """A prepared run; all errors in its settings are raised here, before any compilation."""

    def __init__(self, backbone: nn.Module, cfg: Config, workdir: Path, pretrained: Pretrained | None = None) -> None:
        """Open the three splits and the pretrained backbone.

        Args:
            backbone: module with `features(image) -> [B, D]`.
            cfg: settings of the run.
            workdir: the run's; data sets are stored in it if `cfg.data_dir` is None.
            pretrained: the model of `cfg.init.from_`, if it is already loaded.

        Raises:
            ConfigError: the backbone does not accept the images' size or channels, or the batch is impossible.
            DataError: a split is missing or has other classes, or there is only one class.
            CheckpointError: weights do not fit the backbone; the message names all of them.
        """
        self.cfg, self.mesh, self.rates = cfg, stage.open_mesh(cfg), rates(cfg)
        data_dir = cfg.data_dir or workdir / "data"
        opened = {split: pictures.pictures(cfg.data, split, data_dir) for split in pictures.SPLITS}
        labels = pictures.labels(opened["train"], cfg.data)
        self.splits = {split: pictures.Evaluation(shown, cfg.data, labels) for split, shown in opened.items()}
        self.train = pictures.Training(opened["train"], cfg.data, labels)
        count, names = self.train.limits["label"], opened["train"].classes
        if count < 2:  # every prediction would be right, with loss 0
            raise DataError(
                f"{self.train.name} has one class, {names[0]!r}; give the folder that contains one folder per class"
            )
        self.classes = (*names, *(f"class {number}" for number in range(len(names), count)))
        self.model = ImageClassifier(backbone, count, cfg.dropout)
        # a resumed run reads its own checkpoint instead
        if pretrained is None and cfg.init.from_ is not None and not resumes(workdir):
            pretrained = vision_models.load(cfg.init.from_, **cfg.init.options)
        if pretrained is not None:
            vision_models.remind(pretrained, cfg.data)
        self.pretrained = pretrained
        self.loss = softmax(self.model.apply, ("image",), label_smoothing=cfg.label_smoothing)
        self.inputs = (np.zeros((2, cfg.data.size, cfg.data.size, 3), np.float32),)
        jax.eval_shape(self.start)  # raises if the pretrained weights do not fit

    def batches(self, split: str) -> Iterator[Batch]:
        """Yield batches of one pass over a split (at most `measured` training images), on the devices."""
        rows = spread(self.splits[split], self.cfg.measured) if split == "train" else self.splits[split]
        yield from stage.one_pass(self.cfg, rows, self.mesh)

    def logits(self, params: Params, batch: Batch) -> jax.Array:
        """Return a batch's logits [B, C] in evaluation mode."""
        logits: jax.Array = self.model.apply({"params": params}, batch["image"])
        return logits

    def start(self) -> tuple[Params, Params]:
        """Return the initial (trained parameters, running statistics)."""
        fresh = state.init_params(self.model, self.inputs, jax.random.key(self.cfg.seed), self.mesh)
        return statistics.split(self._loaded(fresh))

    def fit(self, workdir: Path, validate: Callable[[int, Params], Mapping[str, float]], saved: Any) -> Params:
        """Train; return the parameters to evaluate (the EMA if there is one) with the running statistics.

        Args:
            workdir: the run's.
            validate: (step, all parameters) -> metrics; the best step is the one with the lowest "nll".
            saved: the full config as JSON data; `tasks/vision.py` reads its section "data".
        """
        cfg = self.cfg
        batches = stage.batches(cfg, self.train, repeats=cfg.repeats)
        done = stage.train(
            cfg,
            workdir,
            stage.make_trainer(cfg, self.loss, self.rates, self.start, ema_decay=cfg.ema_decay),
            make_params=self.start,
            batches=Mixed(batches, cfg.mix, len(self.classes)) if cfg.mix else batches,
            mesh=self.mesh,
            model=self.model,
            meta={"config": saved, "classes": list(self.classes)},
            layout=state.layout(self.model, self.inputs, self.mesh),
            validate=lambda step, now: validate(step, evaluated(now)),
            metric="nll",
            work=loop.Work(cfg.batch_size, "images"),
        )
        return evaluated(done)

    def _loaded(self, fresh: Params) -> Params:
        """Return the parameters with the pretrained backbone's in their place; the head stays random."""
        if self.pretrained is None:
            return fresh
        old, new, reshape = self.pretrained.module, self.model.backbone, dict[str, surgery.Reshape]()
        new_norm: tuple[str, ...] = ()
        if isinstance(old, ViT) and isinstance(new, ViT):
            before, after = old.cfg.patches, new.cfg.patches
            if (before.grid, before.cls) != (after.grid, after.cls):
                reshape["backbone/embed/positions"] = regrid(before, after)
            # the final norm is applied to tokens in one model and to their mean in the other
            if (new.cfg.pool == "mean_norm") != (old.cfg.pool == "mean_norm"):
                new_norm = ("backbone/norm_final/.*",)
        given = {"backbone": self.pretrained.params}
        return surgery.load(fresh, given, fresh=("head/.*", *new_norm), unused=new_norm, reshape=reshape)


def evaluated(now: state.TrainState) -> Params:
    """Return the parameters to evaluate: the EMA of the trained ones if there is one, else themselves."""
    return tree.merge(now.params if now.ema is None else now.ema, now.frozen)


def run(
    backbone: nn.Module,
    cfg: Config,
    workdir: Path,
    pretrained: Pretrained | None = None,
    *,
    saved: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, evaluate, and return the metrics, also written to results.json.

    Args:
        backbone: see `Setup`.
        cfg: settings of the run.
        workdir: the run's.
        pretrained: see `Setup`.
        saved: see `Setup.fit`; `cfg` by default.
    """
    setup = Setup(backbone, cfg, workdir, pretrained)
    validate = image_classification.validation(setup.loss, partial(setup.batches, "validation"))
    params = setup.fit(workdir, validate, to_dict(cfg) if saved is None else saved)
    with jax.set_mesh(setup.mesh):
        splits = {split: setup.batches(split) for split in pictures.SPLITS}
        return image_classification.write(workdir, setup.logits, params, splits, setup.classes)
