import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fm_jax.core.config import apply_overrides, from_dict, to_dict
from fm_jax.core.errors import ConfigError, DataError
from fm_jax.core.options import help_text
from fm_jax.data.images import catalogue, digits, folder, geometry, pictures, scenes, views
from fm_jax.data.images.pictures import Config, Decodable, Evaluation, Labels, Training
from fm_jax.data.images.views import Recipe
from fm_jax.data.stream.loader import Batches, Epoch, HostBatch
from fm_jax.data.stream.source import Drawn
from tests.close import close


class Few:
    """Ten images, row i of value i; some cannot be decoded."""

    name, fingerprint, classes = "few", "few", ("a", "b")

    def __init__(self, bad: tuple[int, ...] = (), count: int = 10, label: int = -1) -> None:
        self._bad, self._count, self._label = bad, count, label

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if index in self._bad:
            raise DataError(f"image {index}: truncated")
        return np.full((8, 8, 3), index, np.uint8), index % 2 if self._label < 0 else self._label

    def id(self, index: int) -> str:
        return str(index)


def test_training_draws_by_the_recipe_and_evaluation_never(tmp_path: Path) -> None:
    cfg = Config(recipe=views.digits())
    train, test = pictures.training(cfg, tmp_path), pictures.evaluation(cfg, "test", tmp_path)
    assert isinstance(train, Drawn) and not isinstance(test, Drawn)
    one, two = (train.draw(3, np.random.default_rng(seed))["image"] for seed in (0, 1))
    assert not np.array_equal(one, two) and one.shape == (8, 8, 3) and one.dtype == np.float32
    assert np.array_equal(train[3]["image"], train[3]["image"])
    row = test[3]
    assert {name: (value.shape, value.dtype) for name, value in row.items()} == {
        "image": ((8, 8, 3), np.float32),
        "label": ((), np.int32),
        "weights": ((), np.float32),
    }
    digit = pictures.pictures(cfg, "test", tmp_path)[3]
    close(row["image"], digit[0] / 127.5 - 1)
    assert row["label"] == digit[1] and row["weights"] == 1


def test_two_views_and_small_ones_have_their_fields(tmp_path: Path) -> None:
    recipe = Recipe(geometry="crop", views=2, small=3, small_size=6)
    row = pictures.training(Config(recipe=recipe), tmp_path)[0]
    assert {name: value.shape for name, value in row.items()} == {
        "image_a": (8, 8, 3), "image_b": (8, 8, 3), "image_small": (3, 6, 6, 3), "label": (), "weights": (),
    }  # fmt: skip
    assert not np.array_equal(row["image_a"], row["image_b"])


def take(source: Training, **readers: int) -> list[HostBatch]:
    iterator = Batches(source, 16, seed=3, **readers).iterate()
    try:
        return list(islice(iterator, 4))
    finally:
        iterator.close()  # type: ignore[attr-defined]


def equal(one: list[HostBatch], two: list[HostBatch]) -> bool:
    return all(np.array_equal(a[name], b[name]) for a, b in zip(one, two, strict=True) for name in a)


RECIPE = replace(views.simclr(), layers=2, erase=0.5)


def test_threads_and_hosts_do_not_change_a_byte(tmp_path: Path) -> None:
    source = pictures.training(Config(recipe=RECIPE, size=16), tmp_path)
    wanted = take(source, threads=0)
    assert equal(take(source, threads=4), wanted) and not np.array_equal(wanted[0]["image_a"], wanted[1]["image_a"])
    half = take(source, threads=0, host=1, hosts=2)
    assert np.array_equal(half[2]["image_b"], wanted[2]["image_b"][8:])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_a_byte(workers: int, tmp_path: Path) -> None:
    source = pictures.training(Config(scenes.Config(), recipe=RECIPE, size=16), tmp_path)
    assert equal(take(source, workers=workers), take(source, threads=0))


def test_the_next_good_image_stands_in_for_a_bad_one(caplog: pytest.LogCaptureFixture) -> None:
    cfg = Config(max_bad=0.3)
    with caplog.at_level(logging.WARNING):
        train = Training(Few((3, 4, 9)), cfg, Labels(2))
        seen = [round(float(train[i]["image"][0, 0, 0] + 1) * 127.5) for i in range(10)]
    assert seen == [0, 1, 2, 5, 5, 5, 6, 7, 8, 0] and train[4]["label"] == 1 and train[4]["weights"] == 1
    assert "few: 1 of 10 images cannot be decoded so far and are replaced by others: image 3: truncated" in caplog.text
    backwards = Training(Few((3, 4, 9)), cfg, Labels(2))
    again = [round(float(backwards[i]["image"][0, 0, 0] + 1) * 127.5) for i in reversed(range(10))]
    assert again[::-1] == seen


def test_in_evaluation_a_bad_image_counts_for_nothing() -> None:
    found = Evaluation(Few((3, 9)), Config(max_bad=0.3), Labels(2))
    (batch,) = Epoch(found, 12)
    assert batch["weights"].tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0]
    assert batch["image"].shape == (12, 8, 8, 3)


def test_too_many_bad_images_end_the_run_with_the_first_names() -> None:
    found = Decodable(Few((1, 3, 5)), 0.2)
    assert [found.read(i)[2] for i in (1, 3)] == [False, False]
    with pytest.raises(
        DataError, match=r"3 of 10 images cannot be decoded, more than max_bad 0\.2 allows; first: image 1: tr"
    ):
        found.read(5)
    with pytest.raises(DataError, match=r"few: row 1: 1 of 10 images cannot be decoded, more than max_bad 0\.01"):
        list(Epoch(Evaluation(Few((1,)), Config(), Labels(2)), 4))


def test_a_source_goes_to_workers_whole() -> None:
    source = Training(Few((3,)), Config(max_bad=0.5), Labels(2))
    assert np.array_equal(pickle.loads(pickle.dumps(source))[3]["image"], source[3]["image"])  # noqa: S301


def test_a_label_out_of_range_is_refused_before_a_device_sees_it() -> None:
    with pytest.raises(DataError, match=r"few: label contains 2, outside 0 … 1"):
        list(Epoch(Evaluation(Few(label=2), Config(), Labels(2)), 4))


def test_more_classes_than_the_model_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"digits/train has 10 classes, more than num_classes 9"):
        pictures.training(Config(num_classes=9), tmp_path)
    assert pictures.training(Config(num_classes=12), tmp_path).limits == {"label": 12}


def test_wrong_channels_are_refused() -> None:
    class Grey(Few):
        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            return np.zeros((8, 8), np.uint8), 0

    with pytest.raises(DataError, match=r"few: row 0: an image must be uint8 \[H, W, 3\], not uint8 \[8, 8\]"):
        list(Epoch(Evaluation(Grey(), Config(), Labels(2)), 4))


def test_folders_are_seen_by_their_middle(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for number, kind in enumerate(("cat", "dog")):
            (tmp_path / split / kind).mkdir(parents=True)
            image = np.full((40, 80, 3), 255, np.uint8)
            image[:, 25:55] = 100 * number
            Image.fromarray(image).save(tmp_path / split / kind / "a.png")
    cfg = Config(folder.Config(tmp_path, splits=("train", "val", "val")), size=16, center_crop=0.5)
    source = pictures.evaluation(cfg, "validation", tmp_path)
    (batch,) = Epoch(source, 2)
    assert batch["image"].shape == (2, 16, 16, 3) and batch["label"].tolist() == [0, 1]
    close(batch["image"][1], 100 / 127.5 - 1, scale=1.0)
    assert len(pictures.training(cfg, tmp_path)) == 2


def test_a_folder_needs_no_more_than_its_path_where_a_preset_slices_a_catalogue(tmp_path: Path) -> None:
    for split in pictures.SPLITS:
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / "cat" / "a.png")
    for preset in (pictures.imagenet(8), pictures.cifar()):
        cfg = replace(preset, source=folder.Config(tmp_path))
        assert [pictures.pictures(cfg, split, tmp_path).name for split in pictures.SPLITS] == [
            str(tmp_path / split) for split in pictures.SPLITS
        ]
    (tmp_path / "test").rename(tmp_path / "held_out")
    with pytest.raises(DataError, match=r"cannot read .*test: .*set data\.source\.splits"):
        pictures.pictures(cfg, "test", tmp_path)


def test_fingerprints_change_with_all_that_a_row_depends_on(tmp_path: Path) -> None:
    base = Config(recipe=views.digits())
    others = [
        replace(base, size=9),
        replace(base, mean=(0.1,) * 3),
        replace(base, recipe=views.digits(2)),
        replace(base, source=digits.Config(seed=1)),
    ]
    marks = {pictures.training(cfg, tmp_path).fingerprint for cfg in (base, *others)}
    assert len(marks) == 5 and pictures.training(base, tmp_path).fingerprint in marks


def test_the_papers_sets_are_named(tmp_path: Path) -> None:
    for cfg in (pictures.cifar(), pictures.cifar("cifar100"), pictures.imagenet()):
        assert isinstance(cfg.source, catalogue.Config)
        with pytest.raises(DataError, match=rf"{cfg.source.name} is not prepared under"):
            pictures.training(cfg, tmp_path)
    assert pictures.imagenet().mean == pictures.IMAGENET_MEAN and pictures.imagenet().center_crop == 0.875


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 0}, "size 0 must be above 0"),
        ({"center_crop": 1.5}, "center_crop 1.5 in 0 to 1"),
        ({"max_bad": 1.0}, "max_bad 1.0 below 1"),
        ({"std": (0.0, 1.0, 1.0)}, r"std .* must be above 0"),
        ({"max_pixels": 90_000_000}, "max_pixels must be between 1 and 89,478,485, not 90000000"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(**wrong)  # type: ignore[arg-type]


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split 'dev'; choose train, validation, test"):
        pictures.evaluation(Config(scenes.Config(), size=16), "dev", tmp_path)


@dataclass(frozen=True)
class Run:
    data: Config


FULL = Run(pictures.imagenet())


def test_the_command_line_chooses_a_source_and_sets_its_options(tmp_path: Path) -> None:
    def source(run: Run, *words: str) -> pictures.Source:
        cfg = apply_overrides(run, words)
        assert from_dict(Run, to_dict(cfg)) == cfg
        return cfg.data.source

    path = str(tmp_path)
    assert source(FULL, "--data.source", "folder", "--data.source.path", path) == folder.Config(tmp_path)
    assert source(FULL, "--data.source.path", path, "--data.source", "folder") == folder.Config(tmp_path)
    assert source(FULL, "--data.source=digits", "--data.source.seed=3") == digits.Config(3)
    assert source(FULL, "--data.source", "scenes") == scenes.Config()
    assert source(FULL, "--data.source.download", "true") == replace(FULL.data.source, download=True)  # type: ignore[type-var]
    kept = source(FULL, "--data.source", "catalogue", "--data.source.name", "cifar10")  # what it is already
    assert isinstance(kept, catalogue.Config) and kept.name == "cifar10" and kept.slices[0] == "train[:99%]"
    page = help_text(Run(Config()), chosen={"data.source": "folder"})
    assert "--data.source " in page and "--data.source.path" in page and "--data.source.seed" not in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data.source", "folder"), "--data.source.path is required"),
        (
            ("--data.source", "foldr", "--data.source.path", "x"),
            "'foldr' is not digits|scenes|folder|catalogue; did you",
        ),
        (("--data.source.path", "x"), "--data.source.path is an option of --data.source folder; add that"),
        (("--data.source", "catalogue"), "--data.source.name is required"),
        (("--data.source", "catalogue", "--data.source.name="), "data.source: name must be a data set"),
        (("--data.source", "digits", "--data.source.path", "x"), "--data.source.path is an option of"),
        (("--data.kind", "folder"), "unknown option --data.kind"),
    ],
)
def test_a_source_without_its_path_or_name_is_refused_by_option(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        apply_overrides(Run(Config()), words)


class Painted:
    """Black images with one white rectangle each; the target is its box."""

    name, fingerprint = "painted", "painted"

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        left, top, right, bottom = 20 + index, 10, 44 + index, 40 + index
        image = np.zeros((60, 80, 3), np.uint8)
        image[top:bottom, left:right] = 255
        return image, np.array([[left, top, right, bottom]], np.float64)

    def id(self, index: int) -> str:
        return str(index)


class Boxes:
    """Boxes in each view's pixels, with the share of each that the view shows."""

    limits: dict[str, int] = {}  # noqa: RUF012

    def __call__(self, target: np.ndarray, seen: Mapping[str, views.View]) -> pictures.Row:
        row = {}
        for name, view in seen.items():
            row[f"{name}/boxes"], row[f"{name}/share"] = geometry.boxes(target, view.moves)
        return row


@pytest.mark.parametrize("recipe", [views.imagenet(), views.cifar(), views.digits(), replace(views.simclr(), blur=0.0)])
def test_another_target_than_a_class_follows_its_views(recipe: Recipe) -> None:
    cfg = Config(size=48, recipe=recipe)
    for source in (Training(Painted(), cfg, Boxes()), Evaluation(Painted(), cfg, Boxes())):
        assert source.limits == {}
        for index in range(len(source)):
            row = source[index]
            for name in [name for name in ("image", "image_a", "image_b") if name in row]:
                light = row[name].max(axis=2)
                found = light > (light.min() + light.max()) / 2  # jitter moves both
                ((left, top, right, bottom),), (share,) = row[f"{name}/boxes"], row[f"{name}/share"]
                assert 0 <= share <= 1 and 0 <= left <= right <= 48 and 0 <= top <= bottom <= 48
                if share < 0.2 or (right - left) * (bottom - top) > 0.9 * 48**2:
                    continue  # too little of either colour to tell where it is
                rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
                seen = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
                assert np.abs(np.array(seen) - (left, top, right, bottom)).max() <= 1
