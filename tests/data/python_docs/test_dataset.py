import subprocess
import sys
from pathlib import Path

import pytest

from fm_jax.core.errors import DataError, ResourceError
from fm_jax.data.python_docs import dataset, library
from fm_jax.data.text.corpus import Corpus

ONLY = ("email", "http", "queue", "textwrap", "wsgiref")


def _files(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*.array_record*")}


@pytest.mark.parametrize("content", ["modules", "docstrings"])
def test_two_builds_write_the_same_bytes(content: dataset.Content, tmp_path: Path) -> None:
    built = []
    for name in ("one", "two"):
        library.read.cache_clear()
        dataset.build(tmp_path / name, content, only=ONLY)
        built.append(_files(tmp_path / name))
    assert len(built[0]) == 3
    assert built[0] == built[1]


def test_splits_have_all_modules_and_share_none(small: Corpus, data_dir: Path) -> None:
    builder = dataset.build(data_dir, "modules", only=ONLY)
    rows = {split: dataset.rows(builder, split) for split in builder.info.splits}
    found = {split: [row["module"].decode() for row in mine] for split, mine in rows.items()}
    assert set(found) == set(library.SPLITS)
    everything = [name for names in found.values() for name in names]
    assert len(everything) == len(set(everything))
    assert sorted(everything) == sorted(module.name for module in library.read(ONLY))


def test_records_hold_text_module_package_and_kind(small: Corpus, data_dir: Path) -> None:
    rows = dataset.rows(dataset.build(data_dir, "modules", only=ONLY), "test")
    wanted = {module.name: module for module in library.read(ONLY)}
    for row in rows:
        module = wanted[row["module"].decode()]
        assert (row["text"].decode(), row["package"].decode(), row["kind"]) == (module.text, module.package, 0)


def test_what_is_built_is_not_built_again(small: Corpus, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(only: tuple[str, ...] = ()) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(library, "read", refuse)
    assert dataset.build(data_dir, "modules", only=ONLY).is_prepared()


def test_another_python_does_not_reuse_it(small: Corpus, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = dataset.build(data_dir, "modules", only=ONLY).data_path
    monkeypatch.setattr(library, "fingerprint", lambda only: "3.99.0-00000000")
    monkeypatch.setattr(library, "read", lambda only: (_ for _ in ()).throw(DataError("would build")))
    with pytest.raises(DataError, match="would build"):
        dataset.build(data_dir, "modules", only=ONLY)
    assert here.exists()


def test_a_split_without_examples_is_refused(tmp_path: Path) -> None:
    builder = dataset.build(tmp_path, "modules", only=("textwrap",))
    assert len(dataset.rows(builder, "train")) == 1
    with pytest.raises(DataError, match="no examples in split 'test'"):
        dataset.rows(builder, "test")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot build modules-.* under .*file"):
        dataset.build(tmp_path / "file", "modules", only=("textwrap",))


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(builder: object) -> None:
        raise RuntimeError("Failed to finalize: write() failed: No space left on device; at byte 100")

    monkeypatch.setattr(dataset.PythonDocs, "download_and_prepare", full)
    with pytest.raises(ResourceError, match=r"cannot build modules-.* under .*: no space is left on the disk$"):
        dataset.build(tmp_path, "modules", only=("textwrap",))


def test_other_tools_open_the_folder_without_tensorflow_and_without_us(small: Corpus, data_dir: Path) -> None:
    path = dataset.build(data_dir, "modules", only=ONLY).data_path
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        f"rows = tfds.builder_from_directory({str(path)!r}).as_data_source('train')\n"
        "print(rows[0]['module'].decode(), 'tensorflow' in sys.modules, 'fm_jax' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["email", "False", "False"]
