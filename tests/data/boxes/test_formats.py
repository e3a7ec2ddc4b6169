"""What every form of annotations has in common: one image with one box in each, and what is wrong is named."""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fm_jax.core.errors import DataError
from fm_jax.data.boxes import coco, voc, yolo
from fm_jax.data.boxes.files import BoxFiles
from fm_jax.data.boxes.record import Annotated, Limits, same_classes
from tests.close import close
from tests.data.boxes import written
from tests.data.boxes.written import BOX, annotation, voc_object

LIMITS, LENIENT, STRICT = Limits(), Limits(max_bad=0.99), Limits(max_bad=0.0)
LINE = "1 0.45 0.5 0.5 0.6666666666666666\n"  # BOX in fractions of 10 × 6


def read_coco(root: Path, annotations: Any, limits: Limits = LENIENT, **other: Any) -> coco.CocoBoxes:
    return coco.read(written.coco(root, annotations, **other), root / "photos", limits=limits)


def read_voc(root: Path, objects: str, limits: Limits = LENIENT) -> BoxFiles:
    return voc.read(written.voc(root, {"a": objects}), "train", classes=("cat", "dog"), limits=limits)


def read_yolo(root: Path, text: str | None, limits: Limits = LENIENT) -> BoxFiles:
    return yolo.read(written.yolo(root, {"a": text}), "train", limits=limits)


ONE: dict[str, Any] = {
    "coco": lambda root: read_coco(root, [annotation()]),
    "voc": lambda root: read_voc(root, voc_object()),
    "yolo": lambda root: read_yolo(root, LINE),
    "polygon": lambda root: read_yolo(root, f"1 0.2 {1 / 6} 0.7 0.5 0.3 {5 / 6}\n"),
}


@pytest.mark.parametrize("form", ONE)
def test_one_image_has_the_same_box_in_every_form(form: str, tmp_path: Path) -> None:
    found: Annotated = ONE[form](tmp_path)
    assert (len(found), found.classes) == (1, ("cat", "dog"))
    image, objects = found[0]
    assert image.shape == (6, 10, 3)
    close(objects.boxes, np.array([BOX]), 1e-6)
    assert objects.labels.tolist() == [1]
    assert objects.area.tolist() == [11.5 if form == "coco" else 20.0]
    assert not objects.crowd.any() and not objects.difficult.any()
    record = found.record(0)
    assert record.size == (6, 10) and record.id == (7 if form == "coco" else "a")
    assert objects.boxes.dtype == np.float32 and objects.labels.dtype == np.int32
    again = pickle.loads(pickle.dumps(found))  # noqa: S301  (as a reading process gets it)
    np.testing.assert_array_equal(again[0][1].boxes, objects.boxes)


def test_the_whole_image_in_pascal_voc_is_1_1_10_6(tmp_path: Path) -> None:
    text = voc_object(corners=(1, 1, 10, 6), more="<difficult>1</difficult><part><name>head</name></part>")
    objects = read_voc(tmp_path, text).record(0).objects
    assert objects.boxes.tolist() == [[0, 0, 10, 6]] and objects.difficult.tolist() == [True]


def test_parts_of_an_object_are_no_objects_and_decimals_are_numbers(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    objects = read_voc(tmp_path, voc_object(corners=(3.5, "2.0", 7, 5), more=part)).record(0).objects
    assert objects.boxes.tolist() == [[2.5, 1, 7, 5]]


def test_coco_survives_the_way_in_and_out(tmp_path: Path) -> None:
    first = read_coco(tmp_path, [annotation(), annotation(2, category_id=4, iscrowd=1, bbox=[0.25, 1.5, 3, 2.5])])
    assert first.categories == (4, 9)
    data = coco.as_json_data(first, first.categories)
    assert data["annotations"][1]["bbox"] == [0.25, 1.5, 3, 2.5]
    data["images"][0]["file_name"] = "a.png"
    (tmp_path / "again.json").write_text(json.dumps(data))
    second = coco.read(tmp_path / "again.json", tmp_path / "photos", limits=STRICT)
    for one, two in zip(first.record(0).objects, second.record(0).objects, strict=True):
        np.testing.assert_array_equal(one, two)
    assert second.fingerprint == first.fingerprint and second.categories == first.categories


def test_pycocotools_reads_what_is_written(tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    scorer = COCO()
    scorer.dataset = coco.as_json_data(ONE["coco"](tmp_path))
    scorer.createIndex()
    assert scorer.getAnnIds(imgIds=[7]) == [1] and scorer.loadCats([2])[0]["name"] == "dog"


# (form, what the file says, what is said of it, how many boxes are left)
WRONG = {
    "coco outside": (read_coco, [annotation(bbox=[10, 0, 5, 5])], "1 of 1 boxes.*outside the image: annotation 1"),
    "coco no width": (read_coco, [annotation(bbox=[1, 1, 0, 5])], "without area: annotation 1 of image 7"),
    "coco negative": (read_coco, [annotation(bbox=[1, 1, 2, -5])], "without area"),
    "coco class": (read_coco, [annotation(category_id=5)], "unknown class: annotation 1 of image 7, category 5"),
    "coco no class": (read_coco, [annotation(category_id=None)], "unknown class"),
    "coco three": (read_coco, [annotation(bbox=[1, 1, 2])], "without four numbers as bbox"),
    "coco text": (read_coco, [annotation(bbox=["1", 1, 2, 2])], "without four numbers as bbox"),
    "coco twice": (read_coco, [annotation(), annotation()], "1 of 2 boxes.*with an id that another has: annotation 1"),
    "coco nobody": (read_coco, [annotation(owner=8)], "of an image that is not listed: annotation 1 of image 8"),
    "voc outside": (read_voc, voc_object(corners=(20, 1, 30, 4)), "outside the image: a.xml, object 'dog' at 20, 1,"),
    "voc inverted": (read_voc, voc_object(corners=(7, 2, 3, 5)), "without area: a.xml"),
    "voc nan": (read_voc, voc_object(corners=("nan", 2, 3, 5)), "not finite: a.xml, object 'dog' at nan"),
    "voc text": (read_voc, voc_object(corners=("", 2, 3, 5)), "without four numbers in bndbox: a.xml, object 'dog'"),
    "voc class": (read_voc, voc_object("cow"), "unknown class: a.xml, object 'cow'"),
    "yolo class": (read_yolo, "2 0.5 0.5 0.5 0.5", r"unknown class: .*a.txt:1 \(2 0.5"),
    "yolo half": (read_yolo, "1.5 0.5 0.5 0.5 0.5", "unknown class"),
    "yolo nan": (read_yolo, "1 nan 0.5 0.5 0.5", "not finite: .*a.txt:1"),
    "yolo polygon": (read_yolo, "1 0.1 0.1 nan 0.5 0.5 nan", "not finite: .*a.txt:1"),
    "coco thin": (read_coco, [annotation(bbox=[9, 1, 1e-9, 2])], "without area: annotation 1"),
    "yolo empty": (read_yolo, "\n1 0.5 0.5 0 0.5", "without area: .*a.txt:2"),
    "yolo words": (read_yolo, "dog 0.5 0.5 0.1 0.1", "not numbers: .*a.txt:1"),
    "yolo five": (read_yolo, "1 0.5 0.5 0.1 0.1 0.9", "5 numbers after the class, neither a box nor a polygon"),
    "yolo pixels": (read_yolo, "1 50 30 5 5", "outside the image"),
    "yolo twice": (read_yolo, LINE * 2, "1 of 2 boxes.*there twice: .*a.txt:2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_box_is_named_and_refused_or_left_out(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read, given, message = WRONG[case]
    good = {read_coco: annotation(99), read_voc: voc_object(), read_yolo: LINE}[read]
    twice = case.endswith("twice")
    both = given if twice else [*given, good] if isinstance(given, list) else f"{given}\n{good}"
    for name in ("lenient", "strict"):
        (tmp_path / name).mkdir()
    with caplog.at_level(logging.WARNING):
        found = read(tmp_path / "lenient", both)
    assert found.record(0).objects.boxes.tolist() == [list(BOX)]
    assert "boxes cannot be used" in caplog.text and "are left out" in caplog.text
    with pytest.raises(DataError, match=message):
        read(tmp_path / "strict", given, STRICT)


def test_a_box_beyond_the_edge_is_clipped_and_counted_but_rounding_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        found = read_coco(tmp_path, [annotation(bbox=[-4, 1, 8, 3]), annotation(2, bbox=[5, 2, 5.5, 4])], LIMITS)
    assert found.record(0).objects.boxes.tolist() == [[0, 1, 4, 4], [5, 2, 10, 6]]
    assert "1 boxes reach beyond the image and are clipped: annotation 1" in caplog.text


def entry(number: Any = 7, name: Any = "a.png", **other: Any) -> dict[str, Any]:
    return {"id": number, "file_name": name, "width": 10, "height": 6} | other


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (entry(8, "missing.png"), r"1 of 2 images cannot be used \(1 missing in .*photos: image 8 \('missing.png'\)\)"),
        (entry(7, "b.png"), "with an id that another has: image 7"),
        (entry(8, "../boxes.json"), "no file name in the folder"),
        (entry(8, "/etc/passwd"), "no file name in the folder"),
        (entry(None, "b.png"), "without an id"),
        (entry([1], "b.png"), "without an id"),
        (entry(8, "bad.png", width=None), "unreadable: image 8"),
    ],
)
def test_a_wrong_image_is_named(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        written.image(tmp_path / "photos" / f"{name}.png")
    (tmp_path / "photos" / "bad.png").write_bytes(b"no image")
    both = [entry(), wrong]
    assert len(read_coco(tmp_path, [annotation()], images=both)) == 1
    with pytest.raises(DataError, match=message):
        read_coco(tmp_path, [annotation()], LIMITS, images=both)


@pytest.mark.parametrize("side", [0, 3_000_000_000, 10**30])
def test_a_size_that_no_image_has_is_not_believed(side: int, tmp_path: Path) -> None:
    """That of the file counts then, as where none is said."""
    written.image(tmp_path / "photos" / "a.png")
    found = read_coco(tmp_path, [annotation()], images=[entry(height=side)])
    size = f"<size><width>10</width><height>{'9' * 5000 if side == 10**30 else side}</height></size>"
    other = voc.read(written.voc(tmp_path / "voc", {"a": voc_object()}, size=size), "train", limits=STRICT)
    for images in (found, other):
        assert images.record(0).size == (6, 10) and images[0][0].shape == (6, 10, 3)


def test_images_of_one_name_in_two_folders_have_two_names(tmp_path: Path) -> None:
    """The scorers tell images apart by them."""
    written.yolo(tmp_path, {"a": LINE, "b": ""})
    for folder in ("one", "two"):
        written.image(tmp_path / "images" / "train" / folder / "a.png")
    found = yolo.read(tmp_path, "train", limits=STRICT)
    ids = [found.record(index).id for index in range(len(found))]
    assert sorted(map(str, ids)) == ["a.png", "b.png", "one/a.png", "two/a.png"]


def test_images_without_objects_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    with caplog.at_level(logging.INFO):
        found = [read_yolo(tmp_path / "a", ""), read_yolo(tmp_path / "b", None), read_voc(tmp_path / "c", "")]
    for source in found:
        assert source[0][1].boxes.shape == (0, 4)
    assert caplog.text.count("1 images without objects") == 3
    assert read_coco(tmp_path, [annotation(iscrowd=1)]).record(0).objects.crowd.tolist() == [True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON, or truncated"),
        ('{"images": []', "not JSON, or truncated"),
        ('{"images": [{"id": 1}, {"id": NaN}], ', r"NaN is not a number in JSON, in images\[1\]"),
        ('{"images": [], "images": []}', "the key 'images' occurs twice"),
        ('{"images": [], "annotations": []}', "it has no list 'categories'"),
        ('{"images": [3], "annotations": [], "categories": []}', "images has 3, not an object"),
        ('{"images": [], "annotations": [], "categories": []}', "has no classes"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "has no images"),
        ('{"images": [], "annotations": [], "categories": []} x', "there is more after the end"),
        ('{"images": [], "annotations": [], "categories": [{"id": "1", "name": "a"}]}', "a category needs a whole"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "categories 'a' and 'b' have the same id 1",
        ),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}',
            "two classes named 'a'",
        ),
    ],
)
def test_a_file_that_is_not_cocos_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "boxes.json"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        coco.read(file, tmp_path, limits=LIMITS)


def test_xml_that_declares_entities_is_refused() -> None:
    bomb = b'<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;">]><a>&y;</a>'
    for data in (bomb, bomb.decode().encode("utf-16"), b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>'):
        with pytest.raises(DataError, match=r"a.xml has a document type declaration"):
            voc.parse(data, "a.xml")
    with pytest.raises(DataError, match=r"a.xml is not XML: undefined entity"):
        voc.parse(b"<a>&y;</a>", "a.xml")
    with pytest.raises(DataError, match=r"a.xml is not XML: mismatched tag"):
        voc.parse(b"<a><b></a>", "a.xml")
    assert voc.parse("<a><b> ä &amp; x</b></a>".encode(), "a.xml").findtext("b") == " ä & x"


def test_unreadable_xml_and_missing_images_of_pascal_voc_are_named(tmp_path: Path) -> None:
    written.voc(tmp_path, {name: voc_object() for name in "abcd"})
    (tmp_path / "Annotations" / "b.xml").write_text("<annotation>")
    (tmp_path / "JPEGImages" / "c.png").unlink()
    (tmp_path / "Annotations" / "d.xml").unlink()
    assert len(voc.read(tmp_path, "train", limits=LENIENT)) == 1
    with pytest.raises(
        DataError, match=r"3 of 4 images.*2 with unreadable annotations.*b.xml is not XML.*d.xml does"
    ) as e:
        voc.read(tmp_path, "train", limits=LIMITS)
    assert "missing in" in str(e.value) and "that of c.xml" in str(e.value)


def test_splits_of_pascal_voc_are_lists_joined_years_or_folders(tmp_path: Path) -> None:
    for year, name in (("VOC2007", "a"), ("VOC2012", "b")):
        written.voc(tmp_path / year, {name: voc_object()}, "trainval")
    both = voc.read(tmp_path, "VOC2007/trainval+VOC2012/trainval", limits=STRICT)
    assert [both.record(i).id for i in range(2)] == ["a", "b"] and both.classes == ("dog",)
    (tmp_path / "VOC2007" / "ImageSets" / "Main" / "dog_val.txt").write_text("a  1\n")
    other = voc.read(tmp_path / "VOC2007", "dog_val", classes=("cat", "dog"), limits=STRICT)
    assert other.record(0).id == "a" and other.record(0).objects.labels.tolist() == [1]
    with pytest.raises(DataError, match=r"class 0 is 'dog' in .*, but 'cat' in"):
        same_classes(both, other)
    folder = tmp_path / "flat" / "train"
    written.image(folder / "x.jpg")
    (folder / "x.xml").write_text(f"<annotation><filename>elsewhere.jpg</filename>{voc_object('cat')}</annotation>")
    flat = voc.read(tmp_path / "flat", "train", limits=STRICT)
    assert flat[0][0].shape == (6, 10, 3) and flat.record(0).objects.boxes.tolist() == [list(BOX)]
    with pytest.raises(DataError, match=r"has neither ImageSets/Main/val.txt nor a folder val"):
        voc.read(tmp_path / "flat", "val", limits=STRICT)


def test_a_class_is_that_of_the_training_split(tmp_path: Path) -> None:
    written.voc(tmp_path, {"a": voc_object("cow"), "b": voc_object("dog")}, "train")
    written.voc(tmp_path, {"c": voc_object("dog"), "d": voc_object("eel")}, "val")
    found = voc.read(tmp_path, "val", classes_from="train", limits=LENIENT)
    assert found.classes == ("cow", "dog") and found.record(0).objects.labels.tolist() == [1]
    assert list(found.faults.lost["boxes"]) == ["unknown class"]


YAML = {
    "folder": "train: images/train\nnames: [cat, dog]",
    "path": "path: .\ntrain: [images/train]\nnames: {1: dog, 0: cat}",
    "list": "train: list.txt\nnames:\n- cat\n- dog",
    "roboflow": "train: ../images/train\nnames: [cat, dog]",
}


@pytest.mark.parametrize("form", YAML)
def test_data_yaml_says_where_the_images_are(form: str, tmp_path: Path) -> None:
    root = written.yolo(tmp_path / "set", {"a": LINE, "b": ""})
    (root / "classes.txt").unlink()
    (root / "list.txt").write_text("images/train/a.png\n\nimages/train/b.png\n")
    (root / "data.yaml").write_text(YAML[form])
    found = yolo.read(root, "train", limits=STRICT)
    assert found.classes == ("cat", "dog") and len(found) == 2
    assert found.record(0).objects.boxes.tolist() == [list(BOX)]
    assert yolo.read(root / "data.yaml", "train", limits=STRICT).fingerprint == found.fingerprint
    with pytest.raises(DataError, match=r"data.yaml has no 'val' \(it has train\)"):
        yolo.read(root, "val", limits=STRICT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [", "data.yaml is not YAML"),
        ("- a", "data.yaml has no names and splits"),
        ("train: images/train\nnames: {0: a, 2: b}", "numbered from 0 without gaps"),
        ("train: images/train\nnames: 3", "names must be a list of the classes, not 3"),
        ("train: images/train\nnames: [a, a]", "two classes named 'a'"),
        ("train: elsewhere\nnames: [a]", "elsewhere does not exist"),
        ("train: {a: b}\nnames: [a]", "the place of 'train' must be a folder or a list"),
        ("train: !!python/object/apply:os.getcwd []\nnames: [a]", "data.yaml is not YAML: could not determine"),
    ],
)
def test_a_wrong_data_yaml_is_refused(text: str, message: str, tmp_path: Path) -> None:
    written.yolo(tmp_path, {"a": LINE})
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        yolo.read(tmp_path, "train", limits=STRICT)


def test_folders_without_names_or_a_split_are_refused(tmp_path: Path) -> None:
    written.yolo(tmp_path, {"a": LINE})
    with pytest.raises(DataError, match="has neither images/val nor val"):
        yolo.read(tmp_path, "val", limits=STRICT)
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"has no names of classes: write data.yaml, or classes.txt"):
        yolo.read(tmp_path, "train", limits=STRICT)
    with pytest.raises(DataError, match="is not a folder"):
        yolo.read(tmp_path / "nowhere", "train", limits=STRICT)


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("/d/images/train/a.b.jpg", "/d/labels/train/a.b.txt"),
        ("/images/d/train/images/a.png", "/images/d/train/labels/a.txt"),
        ("/d/photos/a.jpeg", "/d/photos/a.txt"),
        ("/d/my images/images.jpg", "/d/my images/images.txt"),
    ],
)
def test_the_label_file_of_an_image(image: str, label: str) -> None:
    assert yolo.label_file(Path(image)) == Path(label)


def test_boxes_belong_to_the_stored_pixels_in_coco_and_to_the_upright_ones_in_yolo(tmp_path: Path) -> None:
    turned = written.image(tmp_path / "photos" / "a.jpg", 10, 6, orientation=6)
    stored = coco.read(written.coco(tmp_path, [annotation()], [entry(7, "a.jpg")]), turned.parent, limits=STRICT)
    assert stored[0][0].shape == (6, 10, 3)
    other = [entry(7, "a.jpg", width=6, height=10)]  # a program that turned the image before it was labelled
    assert coco.read(written.coco(tmp_path, [], other), turned.parent, limits=STRICT)[0][0].shape == (10, 6, 3)
    wrong = coco.read(written.coco(tmp_path, [], [entry(7, "a.jpg", width=12)]), turned.parent, limits=STRICT)
    with pytest.raises(DataError, match=r"has 10 × 6 pixels \(height × width\), but its annotations are for 6 × 12"):
        wrong[0]
    written.image(tmp_path / "images" / "train" / "b.jpg", 10, 6, orientation=6)
    written.yolo(tmp_path, {}, "train")
    (tmp_path / "labels" / "train" / "b.txt").write_text("0 0.5 0.5 1 1\n")
    upright = yolo.read(tmp_path, "train", limits=STRICT)
    assert upright[0][0].shape == (10, 6, 3) and upright[0][1].boxes.tolist() == [[0, 0, 6, 10]]


def test_a_fingerprint_changes_with_a_box_or_a_class(tmp_path: Path) -> None:
    marks = {
        read_coco(tmp_path, [annotation(**other)]).fingerprint
        for other in ({}, {"bbox": [2, 1, 5, 3]}, {"category_id": 4}, {"area": 3}, {"iscrowd": 1})
    }
    assert len(marks) == 5 and ONE["coco"](tmp_path).fingerprint in marks
