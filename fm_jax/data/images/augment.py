"""Random augmentations of one image, each a pure function of (image, generator): equal generators give equal bytes.

Images are uint8 [H, W, 3] unless a docstring says otherwise. The number of draws from the generator depends only on
the arguments. Operations that move pixels return the new image and its `geometry.Move`.
"""

import math

import numpy as np

from fm_jax.core.errors import DataError
from fm_jax.data.images import geometry
from fm_jax.data.images.geometry import Move, Moved
from fm_jax.data.images.image import Interpolation, resize, to_bytes

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def flip(image: np.ndarray, rng: np.random.Generator, probability: float = 0.5) -> Moved:
    """Mirror [H, W, 3] left to right with a probability."""
    if rng.random() >= probability:
        return image, geometry.still(image)
    return np.ascontiguousarray(image[:, ::-1]), geometry.mirror(image.shape[:2])


def resized(
    image: np.ndarray,
    height: int,
    width: int,
    *,
    box: tuple[float, float, float, float] | None = None,
    interpolation: Interpolation = "bilinear",
) -> Moved:
    """Resize [H, W, 3], or a box of it, to [height, width, 3]: see `image.resize`."""
    move = geometry.resize(image.shape[:2], (height, width), box)
    return resize(image, height, width, box=box, interpolation=interpolation), move


def centre(
    image: np.ndarray,
    size: int,
    share: float = 1.0,
    *,
    interpolation: Interpolation = "bilinear",
    stretch: bool = False,
) -> Moved:
    """Resize [H, W, 3] to a shorter side of size / share (256 for 224 and 0.875), then crop the centre [size, size, 3].

    With `stretch` both sides are resized to size / share. An odd margin is split as in transformers: the larger half
    below and to the right.
    """
    height, width = image.shape[:2]
    short = round(size / share)
    scaled = [short if stretch else int(short * side / min(height, width)) for side in (height, width)]
    image, (matrix, _) = resized(image, *scaled, interpolation=interpolation)
    top, left = ((side - size) // 2 for side in scaled)
    return image[top : top + size, left : left + size], Move(matrix - [[0, 0, left], [0, 0, top]], (size, size))


def random_resized_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    size: int,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: Interpolation = "bilinear",
) -> Moved:
    """Crop a random rectangle of [H, W, 3] and resize it to [size, size, 3].

    Its share of the area is uniform, its aspect ratio (width / height) log-uniform. If ten draws do not fit, the
    largest centred rectangle of an allowed ratio is used. Source: Szegedy et al. 2015, section 6.
    """
    left, top, width, height = _rectangle(image.shape[0], image.shape[1], rng, area, ratio)
    return resized(image, size, size, box=(left, top, left + width, top + height), interpolation=interpolation)


def pad_crop(image: np.ndarray, rng: np.random.Generator, pad: int = 4, fill: int = 0) -> Moved:
    """Pad by `pad` pixels and crop a random [H, W, 3] of the old size. Source: He et al. 2015, section 4.2."""
    height, width = image.shape[:2]
    framed = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), constant_values=fill)
    top, left = rng.integers(0, 2 * pad + 1, 2)
    move = geometry.along_axes((height, width), shift=(pad - left, pad - top))
    return framed[top : top + height, left : left + width], move


def affine(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    degrees: float = 12.0,
    shift: float = 0.1,
    scale: float = 0.1,
    shear: float = 0.1,
    fill: int = 0,
) -> Moved:
    """Rotate, translate (in shares of the sides), scale and shear [H, W, 3]; pixels from outside are `fill`.

    Each amount is uniform between minus and plus its argument.
    """
    angle, stretch, slant = rng.uniform(-1, 1, 3) * (math.radians(degrees), scale, shear)
    moved = rng.uniform(-shift, shift, 2) * image.shape[1::-1]
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return warp(image, turn @ [[1, slant], [0, 1]] * (1 + stretch), moved, fill=fill)


def warp(
    image: np.ndarray, matrix: np.ndarray, shift: np.ndarray, *, fill: int = 0, size: tuple[int, int] | None = None
) -> Moved:
    """Move every point p (x, y from the centre) of [H, W, 3] to matrix [2, 2] @ p + shift [2]; bilinear.

    The new image has `size` (height, width), by default the old one's, and its points count from its own centre.
    """
    from PIL import Image

    height, width = size or image.shape[:2]
    middle, target = np.array(image.shape[1::-1]) / 2, np.array([width, height]) / 2
    back = np.linalg.inv(matrix)  # Pillow takes the map from new pixels to old ones
    origin = middle - back @ (target + shift)
    data = (back[0, 0], back[0, 1], origin[0], back[1, 0], back[1, 1], origin[1])
    moved = Image.fromarray(image).transform(
        (width, height), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=(fill,) * 3
    )
    onward = np.column_stack([matrix, target + shift - np.asarray(matrix) @ middle])
    return np.asarray(moved), Move(onward, (height, width))


def color_jitter(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> np.ndarray:
    """Scale brightness, contrast and saturation by 1 ± strength, shift hue by up to `hue` turns, in random order.

    [H, W, 3] -> [H, W, 3]; rounded once, at the end. Source: Howard 2013; order and ranges of Chen et al. 2020,
    appendix A.
    """
    strengths = (brightness, contrast, saturation)
    factors = [rng.uniform(max(0.0, 1 - strength), 1 + strength) for strength in strengths]
    turn = rng.uniform(-hue, hue)
    values = image.astype(np.float32)
    for operation in rng.permutation(4):  # brightness, contrast, saturation, hue
        if operation == 3 and hue:
            values = rotate_hue(values, turn)
        elif operation < 3 and strengths[operation]:
            grey = _grey(values) if operation else np.float32(0)
            base = grey.mean() if operation == 1 else grey
            values = np.clip(base + np.float32(factors[operation]) * (values - base), 0, 255)
    return to_bytes(values)


def rotate_hue(values: np.ndarray, turn: float) -> np.ndarray:
    """Rotate the hue of float [H, W, 3] by `turn` full circles (HSV); a pixel's largest and smallest values stay."""
    red, green, blue = np.ascontiguousarray(np.moveaxis(values, 2, 0))  # whole planes: 3 times faster than by pixel
    high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    span = high - low
    if not span.any():  # grey has no hue
        return values
    each = 1 / np.where(span > 0, span, 1)
    sixth = np.where(
        high == red, (green - blue) * each, np.where(high == green, 2 + (blue - red) * each, 4 + (red - green) * each)
    )
    rotated = np.empty_like(values)
    for channel, start in enumerate((5, 3, 1)):
        place = sixth + np.float32(start + 6 * turn)
        place -= 6 * np.floor(place * np.float32(1 / 6))
        rotated[..., channel] = high - span * np.clip(np.minimum(place, 4 - place), 0, 1)
    return rotated


def greyscale(image: np.ndarray) -> np.ndarray:
    """Convert [H, W, 3] to greyscale: the luma in all three channels, [H, W, 3]."""
    return np.repeat(to_bytes(_grey(image.astype(np.float32))), 3, axis=2)


def blur(
    image: np.ndarray, rng: np.random.Generator, *, sigma: tuple[float, float] = (0.1, 2.0), kernel: float = 0.1
) -> np.ndarray:
    """Blur [H, W, 3] by a Gaussian of random sigma in pixels; the kernel's width is kernel × H (Chen et al. 2020)."""
    from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped]  # scipy comes with jax

    width = rng.uniform(*sigma)
    radius = max(1, int(kernel * image.shape[0]) // 2)
    return to_bytes(gaussian_filter(image.astype(np.float32), (width, width, 0), mode="reflect", radius=radius))


def noise(image: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Add Gaussian noise to [H, W, 3]; its standard deviation is 255 × strength."""
    return to_bytes(image + rng.normal(0, 255 * strength, image.shape))


def erase(
    image: np.ndarray,
    rng: np.random.Generator,
    probability: float = 0.25,
    *,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 10 / 3),
) -> np.ndarray:
    """Fill a random rectangle of a normalised float image [H, W, C] with N(0, 1), with a probability.

    Source: Zhong et al. 2017, with the areas and shapes of timm's random_erasing.py, which DeiT and MAE use.
    """
    if not np.issubdtype(image.dtype, np.floating):
        raise DataError(f"random erasing needs a normalised float image, not {image.dtype}; normalise first")
    if rng.random() >= probability:
        return image
    left, top, width, height = _rectangle(image.shape[0], image.shape[1], rng, area, ratio)
    erased = image.copy()
    erased[top : top + height, left : left + width] = rng.normal(size=(height, width, image.shape[2]))
    return erased


def _grey(values: np.ndarray) -> np.ndarray:
    return (values @ _LUMA)[..., None]


def _rectangle(
    height: int, width: int, rng: np.random.Generator, area: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw (left, top, width, height) inside an image."""
    for _ in range(10):
        size = rng.uniform(*area) * height * width
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(size * shape)), round(math.sqrt(size / shape))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (width - w) // 2, (height - h) // 2, w, h
