"""The data pipelines whose speed is measured: each makes the source of a training experiment, on data that is here."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks import _sides
from fm_jax.data.images import folder as image_folder
from fm_jax.data.images import photographs, pictures, views
from fm_jax.data.stream.loader import Batches
from fm_jax.data.stream.source import Source
from fm_jax.data.text import corpus, documents
from fm_jax.data.text.corpus import Corpus, Scheme
from fm_jax.data.text.sentence_pairs import SentencePairs
from fm_jax.data.text.span_corruption import SpanCorruption

_FEW = ("json", "wsgiref", "email")  # packages whose documentation is the text


@dataclass(frozen=True)
class Pipeline:
    """One line of the table."""

    family: str  # the training step that eats the rows: a name of `_families.FAMILIES`
    source: Callable[[Path, int], Source]  # (folder of prepared data, tokens of a row or height of an image)


def _corpus(folder: Path, scheme: Scheme, *, by_sentence: bool = False) -> Corpus:
    text = documents.Config(only=_FEW)
    return corpus.prepare(text, folder, vocab_size=2048, splits=("train",), scheme=scheme, by_sentence=by_sentence)


def _blocks(folder: Path, length: int) -> Source:
    return _corpus(folder, "bytes").blocks("train", length)


def _documents(folder: Path, length: int) -> Source:
    return _corpus(folder, "bytes").blocks("train", length, apart=True)


def _pairs(folder: Path, length: int) -> Source:
    text = _corpus(folder, "wordpiece", by_sentence=True)
    return SentencePairs(text.tokens("train"), text.tokenizer, length, name="sentence pairs")


def _spans(folder: Path, length: int) -> Source:
    text = _corpus(folder, "t5")
    return SpanCorruption(text.tokens("train"), text.tokenizer, length)


def _images(recipe: Callable[[], views.Recipe]) -> Callable[[Path, int], Source]:
    def source(folder: Path, size: int) -> Source:
        files = folder / "images"
        if not files.exists():
            write(files, 64)
        cfg = pictures.Config(
            image_folder.Config(files, splits=("train", "train", "train")),
            size=size,
            mean=pictures.IMAGENET_MEAN,
            std=pictures.IMAGENET_STD,
            recipe=recipe(),
        )
        return pictures.training(cfg, folder)

    return source


PIPELINES: dict[str, Pipeline] = {
    "blocks": Pipeline("gpt2", _blocks),
    "documents_apart": Pipeline("gpt2", _documents),
    "sentence_pairs": Pipeline("bert", _pairs),
    "span_corruption": Pipeline("t5", _spans),
    "jpeg_crop": Pipeline("mae", _images(views.imagenet)),
    "jpeg_augmented": Pipeline("vit", _images(views.finetune)),
    "jpeg_small": Pipeline("resnet50", _images(views.imagenet)),
}


def read(pipeline: str, folder: str, size: int, batch_size: int, batches: int, threads: int) -> _sides.Prepared:
    """Prepare reading `batches` batches a turn, which start where the turn before ended.

    Every turn starts its own readers, so that nothing was read ahead while another side worked.
    """
    source = PIPELINES[pipeline].source(Path(folder), size)
    stream = Batches(source, batch_size, threads=threads)
    place = 0

    def turn() -> dict[str, Any]:
        nonlocal place
        reader = stream.iterate(place)
        try:
            rows = sum(len(next(iter(next(reader).values()))) for _ in range(batches))
        finally:
            reader.close()  # type: ignore[attr-defined]  # a generator: this ends its readers
        place += batches
        return {"rows": rows}

    started = time.perf_counter()
    found = turn()
    return found | {"first_s": round(time.perf_counter() - started, 3), "resident_gb": _sides.resident_gb()}, turn


def write(folder: Path, count: int) -> None:
    """Write `count` JPEG files of 500 × 375 pixels, all in one class."""
    from PIL import Image

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "train" / "photograph").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        image = photographs.load(photographs.NAMES[number % 2])
        top, left = rng.integers(0, image.shape[0] - 374), rng.integers(0, image.shape[1] - 499)
        part = np.ascontiguousarray(image[top : top + 375, left : left + 500])
        Image.fromarray(part).save(folder / "train" / "photograph" / f"{number:05}.jpg", quality=90)
