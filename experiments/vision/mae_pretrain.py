"""Masked autoencoder pretraining: a Vision Transformer learns from unlabelled images by reconstructing masked patches.

Paper: He et al. 2022. Idea: 75 % of the patches are masked. The encoder reads only the others, which reduces its cost;
a small decoder reconstructs the masked ones. After pretraining the decoder is dropped, and the encoder is finetuned by
`experiments.vision.vit_finetune --init.from WORKDIR`.

    ./launch.sh local experiments.vision.mae_pretrain --data.source.download true    # ViT-B/16, 800 epochs
    ./launch.sh local experiments.vision.mae_pretrain --config large --data.source folder --data.source.path photos
    ./launch.sh local experiments.vision.mae_pretrain --config demo --workdir runs/mae_demo       # two cores, minutes

The default is the paper's recipe (table 8): AdamW 0.9/0.95, learning rate 1.5e-4 · batch size / 256 = 2.4e-3 at batch
size 4096, weight decay 0.05, 800 epochs, 40 of them warm-up, cosine schedule, 75 % masked, targets standardised per
patch, random crops of 20 to 100 % of the area and flips (main_pretrain.py of facebookresearch/mae).
Hardware: a pod; not run here. Expected: 83.6 % top-1 for ViT-B, finetuned after 1600 epochs (table 3).

`results.json` has the mean squared error over the pixels of the masked patches, in units of the target (normalised
images, or standardised patches), and two baselines without a model: the per-position mean of the training images, and,
if targets are not standardised, the mean colour of each image's visible patches. `reconstructions.png` shows validation
images, their visible patches, and the reconstructions. With standardised targets, a reconstruction gets the true
patch's mean and variance, which the model does not predict.

Measured with `demo` (16 patches, 50 % masked, 2,000 steps, 74 to 86 CPU-seconds, seeds 0 to 2), on the validation
images: 0.132, 0.138 and 0.130 (per-position mean 0.295, mean colour 0.631); the picture is
`experiments/pictures/mae_digits.png`. With the paper's 75 % (`demo75`, 61 to 83 CPU-seconds): 0.188, 0.190 and 0.182
(0.293 and 0.686). `vit_finetune` has the accuracy of a classifier that starts from the encoder.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import cli
from fm_jax.core.config import to_dict
from fm_jax.core.errors import ConfigError
from fm_jax.core.mesh import MeshConfig
from fm_jax.core.types import Batch, Params
from fm_jax.data.images import pictures, views
from fm_jax.data.images.image import denormalise
from fm_jax.data.stream.rows import spread
from fm_jax.data.stream.source import Source
from fm_jax.evals import runner
from fm_jax.evals.report import grids, results
from fm_jax.models.vision import mae, vit
from fm_jax.models.vision.mae import MAE
from fm_jax.objectives.reconstruct import masked_patches
from fm_jax.ops import patches as patching
from fm_jax.optim import optimizer as optimizers
from fm_jax.train import loop, stage, state


@dataclass(frozen=True, kw_only=True)
class Config(stage.Plan):
    """Everything that decides the numbers of a run."""

    backbone: vit.Config
    decoder: mae.Config
    data: pictures.Config
    warmup: float = 0.05  # share of the steps
    optimizer: optimizers.Config = optimizers.Config(b2=0.95, weight_decay=0.05, clip_norm=None)
    known: int = 5000  # maximum training images for the per-position mean
    shown: int = 8  # validation images in reconstructions.png

    def __post_init__(self) -> None:
        """Check that the fields fit together."""
        super().__post_init__()
        if min(self.known, self.shown) < 1:
            raise ConfigError(f"known and shown must be at least 1, not {self.known}, {self.shown}")
        if self.data.recipe.views != 1 or self.data.recipe.small:
            raise ConfigError(
                "masked autoencoding uses one view of each image: set data.recipe.views 1 and data.recipe.small 0"
            )


def config(parts: tuple[mae.Config, vit.Config] | None = None) -> Config:
    """Return the paper's recipe on ImageNet, by default for ViT-B/16."""
    decoder, encoder = parts or mae.mae_base()
    recipe = replace(views.imagenet(), area=(0.2, 1.0), interpolation="bicubic")
    return Config(
        backbone=replace(encoder, dtype="bfloat16", remat="dots"),
        decoder=decoder,
        data=replace(pictures.imagenet(), recipe=recipe),
        fit=stage.epochs(800, pictures.IMAGENET_TRAIN, 4096),
        learning_rate=2.4e-3,
        batch_size=4096,
        workers=32,
    )


def demo() -> Config:
    """Return the preset for two cores: a small encoder and decoder on the built-in digits, half of them masked."""
    encoder = replace(mae.encoder(vit.vit(3, 48, 4, 2, 8)), init_std=0.0)
    decoder = replace(mae.decoder(2, 48, 4), mask_ratio=0.5, standardise=False)
    fit = loop.FitConfig(2000, log_every=50, eval_every=500)
    small = {"fit": fit, "learning_rate": 2e-3, "batch_size": 48}
    return Config(backbone=encoder, decoder=decoder, data=pictures.Config(), **small)  # type: ignore[arg-type]


def debug() -> Config:
    """Return two steps of a tiny model."""
    fit = loop.FitConfig(2, log_every=1, save_every=1)
    small = replace(demo(), backbone=mae.encoder(vit.tiny()), decoder=replace(demo().decoder, num_layers=1))
    return replace(small, fit=fit, batch_size=16, warmup=0.0, shown=2)


CONFIGS: dict[str, Callable[[], Config]] = {
    "default": config,
    "large": lambda: config(mae.mae_large()),
    "huge": lambda: config(mae.mae_huge()),
    "huge_v5e_64": lambda: replace(config(mae.mae_huge()), mesh=MeshConfig(data=1, fsdp=64)),
    "demo": demo,
    "demo75": lambda: replace(demo(), decoder=replace(demo().decoder, mask_ratio=0.75)),
    "debug": debug,
}


def run(cfg: Config, workdir: Path) -> dict[str, float]:
    """Pretrain, evaluate with the baselines, and return the metrics, also written to results.json."""
    mesh = stage.open_mesh(cfg)
    data_dir = cfg.data_dir or workdir / "data"
    train = pictures.training(cfg.data, data_dir)
    seen = {split: pictures.evaluation(cfg.data, split, data_dir) for split in ("train", "validation")}
    batches = stage.batches(cfg, train)
    model, key = MAE(cfg.decoder, vit.ViT(cfg.backbone)), jax.random.key(cfg.seed)
    loss = masked_patches(model.apply)
    evaluate = runner.make_eval_step(loss)

    inputs, rngs = (np.zeros((2, cfg.data.size, cfg.data.size, 3), np.float32),), ("params", "mask")

    def make_params() -> tuple[Params, Params]:
        return state.init_params(model, inputs, key, mesh, rngs=rngs), {}

    def validate(step: int, now: state.TrainState) -> dict[str, float]:
        return runner.evaluate(evaluate, now.params, stage.one_pass(cfg, seen["validation"], mesh))

    done = stage.train(
        cfg,
        workdir,
        stage.make_trainer(cfg, loss, stage.rates(cfg), make_params),
        make_params=make_params,
        batches=batches,
        mesh=mesh,
        model=model,
        meta={"config": to_dict(cfg)},
        layout=state.layout(model, inputs, mesh, rngs=rngs),
        validate=validate,
        metric="mse",
        work=loop.Work(cfg.batch_size, "images"),
    )
    with jax.set_mesh(mesh):
        measured = {"mse": validate(cfg.fit.num_steps, done)["mse"]}
        measured |= baselines(
            model,
            done.params,
            stage.one_pass(cfg, spread(seen["train"], cfg.known), mesh),
            stage.one_pass(cfg, seen["validation"], mesh),
        )
    results.write(workdir / "results.json", measured)
    if jax.process_count() == 1:
        draw_reconstructions(cfg, model, done.params, seen["validation"], workdir / "reconstructions.png")
    return measured


def baselines(model: MAE, params: Params, train: Iterator[Batch], validation: Iterator[Batch]) -> dict[str, float]:
    """Return the errors of the per-position mean and of the mean visible colour, on the evaluation's masks."""

    @jax.jit
    def parts(batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        reconstruction = model.apply(
            {"params": params}, batch["image"], rngs={"mask": jax.random.key(0)}, method="reconstruct"
        )
        visible = ~reconstruction.removed[..., None, None]
        pixels = reconstruction.target.reshape(*reconstruction.target.shape[:2], -1, model.backbone.cfg.in_channels)
        colour = (pixels * visible).sum(axis=(1, 2)) / (visible.sum(axis=(1, 2)) * pixels.shape[2])
        weights = batch["weights"].astype(jnp.float32)
        error = jnp.square(pixels - colour[:, None, None]).mean(axis=(2, 3))
        return reconstruction.target, reconstruction.removed, weights, error

    total, count = np.zeros(()), 0.0
    for batch in train:
        target, _, weights, _ = map(runner.gather, parts(batch))
        total, count = total + np.einsum("bnp,b->np", target, weights, dtype=np.float64), count + weights.sum()
    sums, removed_patches = np.zeros(2), 0.0
    for batch in validation:
        target, removed, weights, error = map(runner.gather, parts(batch))
        kept = removed * weights[:, None]
        sums += [(kept * np.square(target - total / count).mean(axis=2)).sum(), (kept * error).sum()]
        removed_patches += kept.sum()
    errors = {"place_mean_mse": float(sums[0] / removed_patches)}
    return errors if model.cfg.standardise else errors | {"mean_colour_mse": float(sums[1] / removed_patches)}


def draw_reconstructions(cfg: Config, model: MAE, params: Params, rows: Source, png: Path) -> None:
    """Write a picture of validation images, their visible patches and their reconstructions."""
    chosen = spread(rows, cfg.shown)
    image = np.stack([chosen[number]["image"] for number in range(len(chosen))])
    rngs, patches = {"mask": jax.random.key(0)}, cfg.backbone.patches
    reconstruction = model.apply({"params": params}, image, rngs=rngs, method="reconstruct")
    inpainted = model.apply({"params": params}, image, rngs=rngs, method="inpaint")
    visible = jnp.where(
        reconstruction.removed[..., None], 0.0, patching.patchify(jnp.asarray(image), patches.patch_size)
    )
    masked = patching.unpatchify(visible, patches.patch_size, patches.grid)
    columns = {"original": image, "visible": masked, "reconstruction": inpainted}
    shown: dict[str, Sequence[np.ndarray]] = {
        head: [denormalise(np.asarray(one), cfg.data.mean, cfg.data.std) for one in images]
        for head, images in columns.items()
    }
    grids.reconstructions(png, shown, title=f"{cfg.decoder.mask_ratio:.0%} of the patches masked")


if __name__ == "__main__":
    cli.main(run, CONFIGS, resumable=(*stage.RESUMABLE, "data.max_bad"))
