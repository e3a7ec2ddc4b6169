import logging
import pickle
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fm_jax.core.config import apply_overrides, from_dict, to_dict
from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.boxes import augment, catalogue, coco, pipeline, scenes, yolo
from fm_jax.data.boxes.augment import Recipe
from fm_jax.data.boxes.pipeline import Config, Evaluation, Training
from fm_jax.data.images import geometry
from fm_jax.data.stream.loader import Batches, Epoch, HostBatch
from fm_jax.data.stream.rows import spread
from fm_jax.data.stream.source import Drawn, Staged
from tests.close import close
from tests.data.boxes import written

SCENES = scenes.Config(train=40, validation=8, test=8)
STAGED = augment.yolox(close=6, sizes=(32, 48, 64))
CFG = Config(SCENES, size=(64, 96), max_boxes=8, recipe=replace(STAGED, every=2))


def training(cfg: Config = CFG) -> Training:
    return Training(pipeline.open_split(cfg, "train", Path()), cfg)


def take(source: Training, count: int = 8, start: int = 0, **readers: int) -> list[HostBatch]:
    iterator = Batches(source, 4, seed=3, **readers).iterate(start)
    try:
        return list(islice(iterator, count))
    finally:
        iterator.close()  # type: ignore[attr-defined]


def same(one: list[HostBatch], two: list[HostBatch]) -> bool:
    return len(one) == len(two) and all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(one, two, strict=True)
    )


@pytest.fixture(scope="module")
def wanted() -> list[HostBatch]:
    return take(training(), threads=0)


def test_a_batch_has_the_fields_of_a_detector(wanted: list[HostBatch]) -> None:
    size = wanted[0]["images"].shape[1:3]
    assert {name: (value.shape, value.dtype) for name, value in wanted[0].items()} == {
        "images": ((4, *size, 3), np.float32),
        "boxes": ((4, 8, 4), np.float32),
        "labels": ((4, 8), np.int32),
        "box_mask": ((4, 8), bool),
        "weights": ((4,), np.float32),
    }
    for batch in wanted:
        height, width = batch["images"].shape[1:3]
        boxes, mask = batch["boxes"], batch["box_mask"]
        assert not boxes[~mask].any() and not batch["labels"][~mask].any()
        inner = boxes[mask]
        assert len(inner) and (inner[:, 2:] - inner[:, :2] >= 2).all()
        assert (inner >= 0).all() and (inner <= np.array([width, height] * 2)).all()
        assert (mask[:, :-1] >= mask[:, 1:]).all()  # objects come first


def test_workers_threads_and_hosts_do_not_change_a_byte(wanted: list[HostBatch]) -> None:
    assert same(take(training(), threads=4), wanted)
    half = take(training(), threads=0, host=1, hosts=2)
    assert same(half, [{name: value[2:] for name, value in batch.items()} for batch in wanted])
    assert same(take(training(), 3, 5, threads=0), wanted[5:])


@pytest.mark.slow
def test_reading_processes_do_not_change_a_byte(wanted: list[HostBatch]) -> None:
    assert same(take(training(), workers=2), wanted)


def test_sizes_change_every_few_steps_and_few_shapes_are_compiled(wanted: list[HostBatch]) -> None:
    shapes = [batch["images"].shape[1:3] for batch in wanted]
    assert set(shapes) <= {(32, 48), (48, 72), (64, 96)} and len(set(shapes)) > 1
    assert all(shapes[step] == shapes[step + 1] for step in range(0, 8, 2))
    other = [training().at(step, 4)._size for step in range(0, 80, 2)]
    assert len(set(other)) == 3 and other != [training().at(step, 3)._size for step in range(0, 80, 2)]


def test_mosaic_and_mixup_close_at_their_step() -> None:
    source = training(replace(CFG, recipe=replace(augment.yolox(close=6), flip=0.0, hsv=(0.0, 0.0, 0.0))))
    assert isinstance(source, Staged) and isinstance(source, Drawn)
    plain = training(replace(CFG, recipe=Recipe()))[5]
    closed = source.at(6, 0).draw(5, np.random.default_rng(5))
    np.testing.assert_array_equal(closed["images"], plain["images"])
    np.testing.assert_array_equal(closed["boxes"], plain["boxes"])
    assert not np.array_equal(source.at(5, 0).draw(5, np.random.default_rng(5))["images"], plain["images"])
    few = spread(source, 10)
    assert isinstance(few, Staged)
    np.testing.assert_array_equal(few.at(6, 0)[0]["images"], source.at(6, 0)[0]["images"])


def test_evaluation_shows_every_image_whole_and_predictions_go_back_into_it() -> None:
    images = pipeline.open_split(CFG, "test", Path())
    batches = list(Epoch(Evaluation(images, CFG), 3))
    rows = [{name: value[i] for name, value in batch.items()} for batch in batches for i in range(3)]
    assert [int(row["index"]) for row in rows[:8]] == list(range(8))
    assert [int(row["weights"]) for row in rows] == [1] * 8 + [0]
    for row in rows[:8]:
        record = images.record(int(row["index"]))
        assert row["size"].tolist() == list(record.size)
        boxes = pipeline.restore(CFG, row["boxes"][row["box_mask"]], row["size"])
        close(boxes, record.objects.boxes, 1e-5)
        np.testing.assert_array_equal(row["labels"][row["box_mask"]], record.objects.labels)
        close(row["images"][:, :64], images[int(row["index"])][0] / 255, 1e-6)
        close(row["images"][:, 64:], 114 / 255, 1e-6)


def test_a_short_side_is_scaled_and_undone() -> None:
    cfg = replace(CFG, fit="short", sides=(40, 60), size=(64, 64))
    row = Evaluation(pipeline.open_split(cfg, "test", Path()), cfg)[0]
    for empty in (row["images"][40:], row["images"][:, 40:]):
        close(empty, 114 / 255, 1e-6)
    assert pipeline.move(cfg, (100, 200), (32, 32)).matrix[0, 0] == 30 / 200
    assert geometry.content((100, 200), pipeline.move(cfg, (100, 200))) == (30, 60)
    close(pipeline.restore(cfg, np.array([[0.0, 0, 60, 30]]), (100, 200)), np.array([[0.0, 0, 200, 100]]))


def test_crowds_and_difficult_objects_are_in_the_records_only(tmp_path: Path) -> None:
    both = [written.annotation(), written.annotation(2, iscrowd=1, bbox=[0, 0, 10, 6])]
    written.coco(tmp_path, both)
    source = coco.Config(tmp_path, ("boxes.json",) * 3, ("photos",) * 3)
    cfg = Config(source, size=(6, 10), max_boxes=3)
    for split, kind in (("train", Training), ("test", Evaluation)):
        images = pipeline.open_split(cfg, split, tmp_path)
        row = kind(images, cfg)[0]
        assert row["box_mask"].tolist() == [True, False, False]
        assert row["boxes"][0].tolist() == list(written.BOX) and row["labels"].tolist() == [1, 0, 0]
        assert len(images.record(0).objects.labels) == 2
    voc = written.voc(tmp_path / "voc", {"a": written.voc_object(more="<difficult>1</difficult>")})
    source_voc = pipeline.voc.Config(voc, ("train",) * 3)
    for difficult in (False, True):
        cfg = Config(source_voc, size=(6, 10), max_boxes=3, difficult=difficult)
        assert Training(pipeline.open_split(cfg, "train", tmp_path), cfg)[0]["box_mask"].sum() == difficult


def test_what_does_not_fit_is_counted_and_the_largest_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "0 0.5 0.5 0.2 0.2\n1 0.5 0.5 1 1\n0 0.5 0.5 0.4 0.4\n1 0.5 0.5 0.5 0.5\n"
    written.yolo(tmp_path, {"a": text})
    cfg = Config(yolo.Config(tmp_path, ("train",) * 3), size=(6, 10), max_boxes=2, recipe=Recipe(close=1, least=0.0))
    source = Training(pipeline.open_split(cfg, "train", tmp_path), cfg)
    with caplog.at_level(logging.WARNING):
        rows = [source.at(step, 0)[0] for step in range(3)]
    assert rows[0]["labels"].tolist() == [1, 1] and rows[0]["box_mask"].all()
    assert source.left_out == 6
    assert "2 boxes so far did not fit into max_boxes 2 and are left out" in caplog.text
    assert caplog.text.count("did not fit") == 2  # at 2 and 4, not at 6


def test_an_image_that_cannot_be_decoded_is_replaced_or_weighs_nothing(tmp_path: Path) -> None:
    written.yolo(tmp_path, {"a": "0 0.5 0.5 1 1", "b": "1 0.5 0.5 1 1"})
    file = tmp_path / "images" / "train" / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:100])  # the header is whole, the pixels are not
    cfg = Config(yolo.Config(tmp_path, ("train",) * 3), size=(6, 10), max_boxes=2, max_bad=0.5)
    images = pipeline.open_split(cfg, "train", tmp_path)
    assert Training(images, cfg)[0]["labels"][0] == 1 and Training(images, cfg)[0]["weights"] == 1
    assert Evaluation(images, cfg)[0]["weights"] == 0
    with pytest.raises(DataError, match=r"1 of 2 images cannot be decoded, more than max_bad 0\.01"):
        Training(pipeline.open_split(cfg, "train", tmp_path), replace(cfg, max_bad=0.01))[0]


def test_a_source_goes_to_workers_whole_and_its_fingerprint_knows_all() -> None:
    source = training()
    again = pickle.loads(pickle.dumps(source))  # noqa: S301
    np.testing.assert_array_equal(again[3]["images"], source[3]["images"])
    others = [
        replace(CFG, size=(64, 64), recipe=Recipe()),
        replace(CFG, max_boxes=9),
        replace(CFG, mean=(0.1,) * 3),
        replace(CFG, fill=0),
        replace(CFG, recipe=replace(CFG.recipe, close=7)),
        replace(CFG, source=replace(SCENES, seed=1)),
    ]
    assert len({training(cfg).fingerprint for cfg in (CFG, *others)}) == 7
    assert Evaluation(pipeline.open_split(CFG, "train", Path()), CFG).fingerprint != source.fingerprint


def test_splits_have_the_same_classes_and_no_more_than_the_model(tmp_path: Path) -> None:
    assert set(pipeline.open_splits(CFG, tmp_path)) == {"train", "validation", "test"}
    with pytest.raises(DataError, match="scenes/train has 4 classes, more than num_classes 3"):
        pipeline.open_split(replace(CFG, num_classes=3), "train", tmp_path)
    assert training(replace(CFG, num_classes=9)).limits == {"labels": 9}
    with pytest.raises(DataError, match="no split 'dev'"):
        pipeline.open_split(CFG, "dev", tmp_path)
    with pytest.raises(DataError, match="voc/2007 is not prepared under"):
        pipeline.open_split(replace(CFG, source=catalogue.Config("voc/2007")), "train", tmp_path)


@dataclass(frozen=True)
class Run:
    data: Config


def test_the_command_line_chooses_a_source(tmp_path: Path) -> None:
    run = Run(Config())
    for words, source in (
        (["--data.source", "coco", "--data.source.path", str(tmp_path)], coco.Config(tmp_path)),
        (["--data.source", "yolo", "--data.source.path", str(tmp_path)], yolo.Config(tmp_path)),
        (["--data.source.side", "96"], scenes.Config(side=96)),
    ):
        cfg = apply_overrides(run, words)
        assert cfg.data.source == source and from_dict(Run, to_dict(cfg)) == cfg
    cfg = apply_overrides(run, ["--data.recipe.sizes", "32,64", "--data.recipe.mosaic", "1"])
    assert cfg.data.recipe == Recipe(sizes=(32, 64), mosaic=1.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": (0, 64)}, r"size \(0, 64\)"),
        ({"max_boxes": 0}, "max_boxes must be at least 1, not 0"),
        ({"fill": 300}, "fill 300 at most 255"),
        ({"max_bad": 1.0}, r"max_bad 1\.0 in 0 to 1"),
        ({"std": (0.0, 1.0, 1.0)}, "std above 0"),
        ({"size": (64, 65), "recipe": Recipe(sizes=(32,))}, "height 32 has no whole width"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(**wrong)  # type: ignore[arg-type]
