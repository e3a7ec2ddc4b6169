import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fm_jax.core.errors import DataError
from fm_jax.data.images.folder import ImageFolder


def put(path: Path, value: int, size: tuple[int, int] = (6, 5)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        put(tmp_path / split / "dog" / "b.png", 4)
        put(tmp_path / split / "cat" / "2.PNG", 2)
        put(tmp_path / split / "cat" / "10.bmp", 1)
        put(tmp_path / split / "cat" / "more" / "deep.png", 3)
        (tmp_path / split / "cat" / "notes.txt").write_text("no image")
        (tmp_path / split / "cat" / ".hidden.png").write_text("no image")
    return tmp_path


def test_files_come_in_sorted_order_with_the_number_of_their_folder(root: Path) -> None:
    found = ImageFolder(root, "train")
    assert found.classes == ("cat", "dog") and len(found) == 4
    rows = [found[i] for i in range(4)]
    assert [int(image[0, 0, 0]) for image, _ in rows] == [1, 2, 3, 4] and [label for _, label in rows] == [0, 0, 0, 1]
    assert rows[0][0].shape == (5, 6, 3) and rows[0][0].dtype == np.uint8
    assert [found.id(i) for i in range(4)] == ["cat/10.bmp", "cat/2.PNG", "cat/more/deep.png", "dog/b.png"]


def test_classes_are_numbered_as_in_training_where_a_split_lacks_one(root: Path) -> None:
    for file in (root / "val" / "cat").rglob("*.*"):
        file.unlink()
    (root / "val" / "cat" / "more").rmdir()
    (root / "val" / "cat").rmdir()
    found = ImageFolder(root, "val", classes_from="train")
    assert found.classes == ("cat", "dog") and found[0][1] == 1


def test_the_fingerprint_changes_with_a_file(root: Path) -> None:
    before = ImageFolder(root, "train").fingerprint
    assert ImageFolder(root, "train").fingerprint == before != ImageFolder(root, "val").fingerprint
    put(root / "train" / "dog" / "b.png", 4, size=(60, 50))
    assert (changed := ImageFolder(root, "train").fingerprint) != before
    put(root / "train" / "dog" / "c.png", 4)
    assert ImageFolder(root, "train").fingerprint != changed


@pytest.mark.parametrize(("link", "target"), [("cat/again", "."), ("cat/more/up", "../.."), ("emu", "..")])
def test_a_link_to_a_folder_above_is_named(root: Path, link: str, target: str) -> None:
    (root / "train" / link).symlink_to(target)
    with pytest.raises(DataError, match=r"links to a folder that contains it; remove the link"):
        ImageFolder(root, "train")


def test_a_link_to_another_folder_is_followed(root: Path) -> None:
    (root / "train" / "dog" / "cats").symlink_to(root / "val" / "cat")
    assert [ImageFolder(root, "train").id(i) for i in range(3, 6)] == ["dog/b.png", "dog/cats/10.bmp", "dog/cats/2.PNG"]


@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".tif"])
def test_other_suffixes_of_photographs_are_read(root: Path, suffix: str) -> None:
    file = root / "train" / "dog" / f"a{suffix}"
    Image.new("RGB", (6, 5), (9, 9, 9)).save(file, "TIFF" if suffix == ".tif" else "JPEG")
    found = ImageFolder(root, "train")
    assert found.id(3) == f"dog/a{suffix}" and found[3][0].shape == (5, 6, 3)


def test_the_validation_folder_goes_by_many_names(root: Path) -> None:
    assert ImageFolder(root, "validation", classes_from="train").name == str(root / "val")
    put(root / "dev" / "cat" / "a.png", 0)
    with pytest.raises(DataError, match=r"has val and dev, each of which may be the validation split; move"):
        ImageFolder(root, "validation")


def test_a_class_that_is_no_text_is_named(root: Path) -> None:
    os.mkdir(os.fsencode(root / "train") + b"/\xff")
    with pytest.raises(DataError, match=r"the class '\\udcff', which is not UTF-8; rename it"):
        ImageFolder(root, "train")


def test_a_folder_that_must_not_be_read_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def scandir(folder: Path) -> Any:
        if Path(folder).name == "more":  # whoever runs the tests may be allowed everything
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"cannot read .*more: Permission denied"):
        ImageFolder(root, "train")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: path.symlink_to("nowhere.png"), "cannot read the file: No such file"),
        (lambda path: path.symlink_to(path.name), "cannot read the file: Too many levels"),
        (lambda path: os.mkfifo(path), "not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a file"),
    ],
)
def test_what_is_no_file_is_found_when_it_is_read(root: Path, make: Callable[[Path], None], why: str) -> None:
    make(root / "train" / "cat" / "3.png")
    found = ImageFolder(root, "train")
    assert (len(found), found.id(2)) == (5, "cat/3.png")
    with pytest.raises(DataError, match=f"cat/3.png: {why}"):
        found[2]


def test_a_class_that_training_lacks_is_named(root: Path) -> None:
    put(root / "val" / "emu" / "a.png", 0)
    with pytest.raises(DataError, match=r"val has the class 'emu', which is missing in .*train"):
        ImageFolder(root, "val", classes_from="train")


def test_a_folder_that_is_missing_or_empty_is_named(root: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*dev: No such file.*one folder per class"):
        ImageFolder(root, "dev")
    (root / "train" / "eel").mkdir()
    with pytest.raises(DataError, match=r"eel has no image files \(\.jpg, "):
        ImageFolder(root, "train")
    with pytest.raises(DataError, match=r"more has no folders"):
        ImageFolder(root / "train" / "cat", "more")


def test_a_damaged_file_is_named_when_it_is_read(root: Path) -> None:
    (root / "train" / "dog" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"^dog/a\.png: the file is empty"):
        ImageFolder(root, "train")[3]
