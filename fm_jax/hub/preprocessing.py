"""Image preprocessing of a public checkpoint: preprocessor_config.json, as transformers' image processors store it.

Seven processor classes are supported. All of them resize, some crop the center, and all end with a shift and a scale of
the values, which are combined into one `mean` and `std` (EfficientNet's divides by its deviation twice). A missing
field has the default of its class in transformers 5.23.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from fm_jax.core import files
from fm_jax.core.errors import CheckpointError, ConfigError, shown
from fm_jax.data.images import augment, pictures
from fm_jax.data.images.image import Interpolation, normalise
from fm_jax.hub.fields import Fields

FILE = "preprocessor_config.json"
Triple = tuple[float, float, float]

_PILLOW: dict[int, Interpolation] = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_LARGEST = 1 << 16  # pixels along a side
_FARTHEST = 1e6  # a mean or deviation of pixel values
_WARPED = 384  # from this size on ConvNext's resizes both sides and does not crop
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {"size": 224, "resample": 2},
    "DeiTImageProcessor": {"size": 256, "do_center_crop": True, "crop_size": 224},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 384}, "crop_pct": 224 / 256},
    "EfficientNetImageProcessor": {"size": 346, "crop_size": 289, "include_top": True},
    "BitImageProcessor": {
        "size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "CLIPImageProcessor": {
        "size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "SiglipImageProcessor": {"size": 224},
}  # fmt: skip
_SWITCHES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "include_top")
_SHORTER = (  # for these, one number is the size of the shorter side
    "ConvNextImageProcessor", "BitImageProcessor", "CLIPImageProcessor"
)  # fmt: skip
_UNNAMED = {  # model_type -> processor class, if the file names none
    "vit": "ViTImageProcessor", "vit_mae": "ViTImageProcessor", "dinov2": "BitImageProcessor",
    "resnet": "ConvNextImageProcessor", "efficientnet": "EfficientNetImageProcessor",
    **dict.fromkeys(("clip", "clip_vision_model"), "CLIPImageProcessor"),
    **dict.fromkeys(("siglip", "siglip_vision_model"), "SiglipImageProcessor"),
}  # fmt: skip


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of an image in evaluation; the fields have the names of `data/images/pictures.py`."""

    size: int  # S: pixels of each side
    mean: Triple  # of pixel values in [0, 1]
    std: Triple
    center_crop: float = 1.0  # share of the resized side that the center crop keeps
    interpolation: Interpolation = "bilinear"
    stretch: bool = False  # resize both sides to the same length; else resize the shorter one

    def __post_init__(self) -> None:
        """Refuse values that are out of range."""
        if not 0 < self.size < _LARGEST or not 0 < self.center_crop <= 1:
            raise ConfigError(
                f"size {self.size} must be above 0 and below {_LARGEST}, center_crop {self.center_crop} in (0, 1]"
            )
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise ConfigError(f"mean {self.mean} must be finite, and std {self.std} above 0")

    @property
    def scaled(self) -> int:
        """Return the size of the shorter side (of both sides, if stretched) before the center crop."""
        return round(self.size / self.center_crop)

    def view(self, image: np.ndarray) -> np.ndarray:
        """Return float32 [S, S, 3] of a uint8 image [H, W, 3], as transformers' processors do with Pillow."""
        how: dict[str, Any] = {"interpolation": self.interpolation, "stretch": self.stretch}
        crop, _ = augment.centre(image, self.size, self.center_crop, **how)
        return normalise(crop, self.mean, self.std)


def of(cfg: pictures.Config) -> Preprocessing:
    """Return the preprocessing of `pictures.Evaluation`."""
    return Preprocessing(cfg.size, cfg.mean, cfg.std, cfg.center_crop, cfg.recipe.interpolation, cfg.stretch)


def onto(cfg: pictures.Config, preprocessing: Preprocessing) -> pictures.Config:
    """Return the config with which `pictures.Evaluation` has the given preprocessing."""
    recipe = replace(cfg.recipe, interpolation=preprocessing.interpolation)
    changed = {name: getattr(preprocessing, name) for name in ("size", "mean", "std", "center_crop", "stretch")}
    return replace(cfg, recipe=recipe, **changed)


def read(folder: Path, model_type: str, ignore: Iterable[str] = ()) -> Preprocessing | None:
    """Read a folder's preprocessor_config.json; None if it has none.

    Args:
        folder: the checkpoint's folder.
        model_type: model_type of its config.json; it gives the class if the file names none.
        ignore: unknown fields of the file that do not change the computation.

    Raises:
        CheckpointError: an unknown class or field, or unsupported preprocessing.
    """
    if not files.there(folder / FILE, CheckpointError):
        return None
    stored = Fields.open(folder / FILE)
    older = stored.take("feature_extractor_type", str, _UNNAMED.get(model_type, ""))
    named = stored.take("image_processor_type", str, older) or older
    kind = named.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
    if kind not in _DEFAULTS:
        problem = f"{shown(kind)} is not supported" if kind else "image_processor_type is missing"
        raise CheckpointError(f"{stored.where}: {problem}; supported are {', '.join(_DEFAULTS)}")
    off = {name: False for name in _SWITCHES if name in stored.data}  # null is off here, else the default
    given = {name: value for name, value in stored.data.items() if value is not None}
    fields = Fields(_DEFAULTS[kind] | off | given, stored.where)
    fields.skip("image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb")
    fields.skip("data_format", "input_data_format", "return_tensors", "device", "disable_grouping", "default_to_square")
    fields.skip("_processor_class", "_valid_processor_keys", "pad_size")
    fields.expect("do_resize", True)
    fields.expect("do_pad", False)
    number = fields.take("resample", int, 3)
    if number not in _PILLOW:
        fields.refuse(f"resample is {number}; supported are {', '.join(f'{n} ({how})' for n, how in _PILLOW.items())}")
    size, scaled, stretch = _cut(fields, kind)
    mean, std = _values(fields, kind)
    fields.close(ignore)
    try:
        return Preprocessing(size, mean, std, size / scaled, _PILLOW[number], stretch)
    except ConfigError as error:
        raise CheckpointError(f"{stored.where}: {error}") from None


def write(folder: Path, preprocessing: Preprocessing) -> None:
    """Write preprocessor_config.json with a processor class that has exactly this preprocessing."""
    size, scaled = ({"height": side, "width": side} for side in (preprocessing.size, preprocessing.scaled))
    if not preprocessing.stretch:
        kind, form = "BitImageProcessor", {"size": {"shortest_edge": preprocessing.scaled}, "crop_size": size}
    elif preprocessing.scaled == preprocessing.size:
        kind, form = "ViTImageProcessor", {"size": size}
    else:
        kind, form = "DeiTImageProcessor", {"size": scaled, "crop_size": size}
    data = {
        "image_processor_type": kind,
        "do_resize": True,
        "do_center_crop": "crop_size" in form,
        **form,
        "resample": next(number for number, how in _PILLOW.items() if how == preprocessing.interpolation),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
        "do_convert_rgb": True,
    }
    (folder / FILE).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", "utf-8")


def _cut(fields: Fields, kind: str) -> tuple[int, int, bool]:
    """Return the size after and before the center crop, and whether both sides are resized to the latter."""
    scaled, stretch = _side(fields, "size", square=kind not in _SHORTER)
    cut = fields.take("do_center_crop", bool, False)
    if kind == "ConvNextImageProcessor":
        share = fields.take("crop_pct", float)
        fields.skip("crop_size")
        if cut or stretch or not 1 / _LARGEST < share <= 1:
            fields.refuse(f"size {shown(fields.data['size'])}, crop_pct {share}, do_center_crop {cut} is not supported")
            return scaled, scaled, True
        return (scaled, scaled, True) if scaled >= _WARPED else (scaled, int(scaled / share), False)
    if cut:
        size, square = _side(fields, "crop_size", square=True)
        if not square or size > scaled:
            crop, whole = (shown(fields.data[name]) for name in ("crop_size", "size"))
            fields.refuse(f"crop_size {crop} does not fit into size {whole}")
        return size, max(size, scaled), stretch
    fields.skip("crop_size")
    if not stretch:
        fields.refuse(f"size {shown(fields.data['size'])} without do_center_crop gives images of different sizes")
    return scaled, scaled, stretch


def _side(fields: Fields, name: str, *, square: bool) -> tuple[int, bool]:
    """Return a size in pixels, and whether it holds for both sides or for the shorter one only.

    Raises:
        CheckpointError: an unsupported form, or height and width that differ.
    """
    value: Any = fields.data.get(name)
    fields.skip(name)
    if not isinstance(value, Mapping):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    sides = {word: side for word, side in value.items() if side is not None}
    side = next(iter(sides.values()), 0)
    square = sides.keys() == {"height", "width"}
    if (
        not (square or sides.keys() == {"shortest_edge"})
        or any(type(value) is not int or value != side for value in sides.values())
        or not 0 < side < _LARGEST
    ):
        raise CheckpointError(
            f"{fields.where}: {name} {shown(sides)} is not supported; give an equal height and width, "
            "or shortest_edge alone"
        )
    return side, square


def _values(fields: Fields, kind: str) -> tuple[Triple, Triple]:
    """Return mean and std for values in [0, 1] that equal rescaling and normalising a pixel of 0 to 255."""
    rescaled, normalised = (fields.take(name, bool, True) for name in ("do_rescale", "do_normalize"))
    factor = fields.take("rescale_factor", float, 1 / 255)
    factor = factor if rescaled else 1.0
    means, stds = _triple(fields, "image_mean"), _triple(fields, "image_std")
    mean: tuple[float, ...] = means if normalised else (0.0,) * 3
    std: tuple[float, ...] = stds if normalised else (1.0,) * 3
    if kind == "EfficientNetImageProcessor":
        if fields.take("rescale_offset", bool, False) and rescaled:  # to [-1, 1]
            mean = tuple(value + 1 for value in mean)
        if fields.take("include_top", bool):
            std = tuple(value * again for value, again in zip(std, stds, strict=True))
    if not factor > 0:
        raise CheckpointError(f"{fields.where}: rescale_factor is {factor}; it must be above 0")
    unit = 255 * factor
    return cast(Triple, tuple(value / unit for value in mean)), cast(Triple, tuple(value / unit for value in std))


def _triple(fields: Fields, name: str) -> Triple:
    """Return one number for each channel, from a list or from a single number."""
    value: Any = fields.data.get(name, 0.5)
    fields.skip(name)
    numbers = value if isinstance(value, list) else [value] * 3
    if len(numbers) != 3 or any(type(number) not in (int, float) or not abs(number) < _FARTHEST for number in numbers):
        raise CheckpointError(f"{fields.where}: {name} {shown(value)} must be three numbers, one a channel")
    return float(numbers[0]), float(numbers[1]), float(numbers[2])
