"""Find objects in photographs with a detector, of a run or public: JSON, and the pictures with boxes drawn on them.

Papers: Ge et al. 2021 (YOLOX), Redmon & Farhadi 2018 (YOLOv3), Ren et al. 2015 (Faster R-CNN). Idea: the detector reads
each image scaled into its input, and its boxes are moved back into the photograph.

    ./launch.sh local experiments.vision.detect --init.from runs/yolox_coco --images photos
    ./launch.sh local experiments.vision.detect --init.from models/yolov3.weights --images street.jpg --score 0.5
    ./launch.sh local experiments.vision.detect --init.from models/yolox_s --classes person,bicycle,… --images photos

`--init.from` is a run of `yolox_coco`, `yolov3_coco` or `faster_rcnn_coco`, a folder with public weights, or Darknet's
files. `--images` is a photograph or a folder, read at any depth. results.json has, for each file, its size and the
objects: class, score, and box as left, top, right, bottom in pixels of the upright photograph. drawn/ has one PNG for
each. A file that cannot be read is named there and on the screen, and the others are done.
Hardware: two cores; a fraction of a second to a few seconds for each photograph. Expected: what the training's
evaluation found, for photographs like those it was trained on; a detector says nothing useful of other things.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fm_jax import cli
from fm_jax.core.config import check_least
from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data import files
from fm_jax.data.boxes import augment, pipeline
from fm_jax.data.boxes.record import none
from fm_jax.data.images.folder import SUFFIXES
from fm_jax.data.images.image import decode, normalise
from fm_jax.evals.report import boxes as pictures
from fm_jax.evals.report import results
from fm_jax.evals.scores.detection import Found
from fm_jax.evals.scores.detector import collect
from fm_jax.tasks import detection
from fm_jax.tasks.init import Init

_EVERY = 5.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Config:
    """The detector, the photographs, and what is shown."""

    init: Init = Init(Path("runs/yolox_coco"))
    images: Path = Path("photos")  # an image, or a folder of images
    score: float = 0.3  # least score of a detection
    classes: tuple[str, ...] = ()  # names of the classes, in order; by default the detector's own
    size: tuple[int, int] | None = None  # height and width of the network's input; none: that of its training
    draw: bool = True  # write drawn/
    batch_size: int = 4  # images at a time

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        check_least(self, batch_size=1)
        if not 0 <= self.score <= 1:
            raise ConfigError(f"score must be in 0 to 1, not {self.score}")
        if self.size is not None and min(self.size) < 1:
            raise ConfigError(f"size must be two numbers above 0, height and width, not {self.size}")


class Photo(NamedTuple):
    """An image that could be read."""

    name: str  # its path in the folder
    pixels: np.ndarray  # uint8 [H, W, 3], upright


def config() -> Config:
    """Return detection of `photos` with the model of runs/yolox_coco."""
    return Config()


def debug() -> Config:
    """Return detection with the model of `yolox_coco --config debug --workdir runs/yolox_coco_debug`."""
    return Config(Init(Path("runs/yolox_coco_debug")), score=0.0, batch_size=2)


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Find and draw objects; return them with the files that could not be read, also written to results.json."""
    source = cfg.init.source
    names = listed(cfg.images)
    opened = detection.load(source, cfg.init)
    module = detection.detector(opened, source)
    classes, how = detection.named(opened, cfg.classes, source), detection.preprocessing(opened, source)
    if cfg.size is not None:
        how = pipeline.resized(how, cfg.size)
    find, bad, found = detection.finder(module), dict[str, str](), dict[str, Any]()
    started = told = time.monotonic()

    def back(boxes: np.ndarray, row: Mapping[str, np.ndarray]) -> np.ndarray:
        return pipeline.restore(how, boxes, [int(side) for side in row["size"]])

    for photos in groups(cfg.images, names, cfg.batch_size, how.max_pixels, bad):
        batch = rows(photos, how, cfg.batch_size)
        guesses = collect(find, opened.params, [batch], back)
        for number, photo in enumerate(photos):
            guess = surest(guesses[number], cfg.score)
            found[photo.name] = as_json(photo, guess, classes)
            if cfg.draw:
                pixels = pictures.draw(photo.pixels, guess.boxes, guess.labels, classes, guess.scores)
                pictures.save(workdir / "drawn" / f"{photo.name}.png", pixels)
        now, done = time.monotonic(), len(found) + len(bad)
        if now - told > _EVERY or done == len(names):
            told = now
            print(f"{done} of {len(names)} images, {done / max(now - started, 1e-9):.2f} images/s", flush=True)
    if not found:
        raise DataError(f"none of the {len(names)} images can be read; the first: {next(iter(bad.values()))}")
    measured = {"images": found, "unreadable": bad}
    results.write(workdir / "results.json", measured)
    count = sum(len(one["objects"]) for one in found.values())
    print(
        f"{count} objects of score ≥ {cfg.score:g} in {len(found)} images" + (f"; {len(bad)} unreadable" if bad else "")
    )
    return measured


def listed(path: Path) -> list[str]:
    """Return the names of the images in a folder, or of one image, relative to the folder.

    Raises:
        DataError: the path is missing, or a folder has no images.
    """
    if path.is_file():
        return [path.name]
    found = [str(Path(file).relative_to(path)) for file, _ in files.walk(path, SUFFIXES)]
    if not found:
        raise DataError(f"{path} has no image files ({', '.join(SUFFIXES)})")
    return found


def groups(path: Path, names: Sequence[str], count: int, max_pixels: int, bad: dict[str, str]) -> Iterator[list[Photo]]:
    """Yield up to `count` images at a time; an image that cannot be read goes into `bad` with the reason."""
    folder, group = path.parent if path.is_file() else path, list[Photo]()
    for name in names:
        try:
            group.append(Photo(name, decode(folder / name, max_pixels=max_pixels)))
        except DataError as error:
            bad[name] = str(error)
            print(f"left out: {error}", flush=True)
        if len(group) == count:
            yield group
            group = []
    if group:
        yield group


def rows(photos: Sequence[Photo], how: pipeline.Config, count: int) -> dict[str, np.ndarray]:
    """Return `count` rows, the last of them without an image and of weight 0 if there are fewer."""
    images = np.zeros((count, *how.size, 3), np.float32)
    sizes = np.ones((count, 2), np.int32)
    for number, photo in enumerate(photos):
        old = photo.pixels.shape[:2]
        canvas = augment.fitted((photo.pixels, none()), pipeline.move(how, old), how.fill)
        images[number], sizes[number] = normalise(canvas.image, how.mean, how.std), old
    numbers = np.arange(count, dtype=np.int32)
    return {"images": images, "size": sizes, "index": numbers, "weights": np.asarray(numbers < len(photos), np.float32)}


def surest(guess: Found, score: float) -> Found:
    """Return the detections of at least a score."""
    kept = guess.scores >= score
    return Found(guess.boxes[kept], guess.labels[kept], guess.scores[kept])


def as_json(photo: Photo, guess: Found, classes: Sequence[str]) -> dict[str, Any]:
    """Return an image's size and detections as JSON data."""
    objects = [
        {"class": classes[int(label)], "score": float(score), "box": [float(side) for side in box]}
        for box, label, score in zip(guess.boxes, guess.labels, guess.scores, strict=True)
    ]
    height, width = photo.pixels.shape[:2]
    return {"height": height, "width": width, "objects": objects}


if __name__ == "__main__":
    cli.main(run, {"default": config, "debug": debug}, resumable=("*",))
