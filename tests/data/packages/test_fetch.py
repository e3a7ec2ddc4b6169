"""A set is fetched once and kept; whatever goes wrong leaves no folder."""

import dataclasses
import errno
import json

import pytest

from fm_jax.core.errors import DataError, ResourceError
from fm_jax.data.packages import cache, client, fetch
from tests.data.packages import made

FILES = {"toy/a.txt": b"one\ntwo\n", "toy-1.0.dist-info/licenses/LICENSE": b"Do what you like."}


def convert(packages, out):
    (out / "rows.txt").write_bytes((packages["toy"] / "toy/a.txt").read_bytes())
    return {"rows": 2}


def fail(packages, out):
    (out / "half.txt").write_text("x")
    raise OSError(errno.ENOSPC, "No space left on device", str(out))


@pytest.fixture
def toy(tmp_path):
    """Return (source, folder of package files)."""
    (tmp_path / "given").mkdir()
    file = made.wheel(tmp_path / "given" / "toy-1.0-py3-none-any.whl", FILES)
    return made.source(made.package("pip", file, "toy/*")), file.parent


def left(root):
    return sorted(path.name for path in root.iterdir())


def test_a_set_is_converted_with_its_licence_and_the_second_call_finds_it(toy, tmp_path):
    source, given = toy
    root = tmp_path / "cache"
    with fetch.open_fetcher(root, packages=given) as fetcher:
        record, was_there = fetcher.fetch("toy", source, convert)
        assert not was_there and record["counts"] == {"rows": 2}
        again, was_there = fetcher.fetch("toy", source, fail)  # not called
        assert was_there and again == record
    assert left(root) == [".lock", "toy"]
    assert (root / "toy/rows.txt").read_bytes() == FILES["toy/a.txt"]
    licence = (root / "toy/LICENSE.txt").read_text()
    assert "MIT" in licence and "nobody" in licence and "Do what you like." in licence
    assert set(record["files"]) == {"rows.txt", "LICENSE.txt"}


def test_two_sets_of_one_package_download_it_once(toy, tmp_path, monkeypatch):
    source, given = toy
    calls = []

    def download(package, folder, **_):
        calls.append(package.name)
        return client.given(package, given)

    monkeypatch.setattr(client, "download", download)
    with fetch.open_fetcher(tmp_path / "cache") as fetcher:
        fetcher.fetch("first", source, convert)
        fetcher.fetch("second", source, convert)
    assert calls == ["toy"]


def test_a_full_disk_while_converting_leaves_nothing(toy, tmp_path):
    source, given = toy
    with (
        pytest.raises(ResourceError, match=r"no space left in .* for toy \(No space left on device\)"),
        fetch.open_fetcher(tmp_path / "cache", packages=given) as fetcher,
    ):
        fetcher.fetch("toy", source, fail)
    assert left(tmp_path / "cache") == [".lock"]


def test_a_changed_package_is_not_unpacked_and_leaves_nothing(toy, tmp_path):
    source, given = toy
    file = next(given.iterdir())
    data = file.read_bytes()
    file.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with (
        pytest.raises(DataError, match=r"toy-1\.0-py3-none-any\.whl has changed"),
        fetch.open_fetcher(tmp_path / "cache", packages=given) as fetcher,
    ):
        fetcher.fetch("toy", source, convert)
    assert left(tmp_path / "cache") == [".lock"]


def test_a_newer_debian_package_is_taken_only_if_its_files_are_the_same(tmp_path):
    pin = made.package("apt", made.debian(tmp_path / "toy_1.0-1_all.deb", FILES), "toy/*", version="1.0-1")
    source, given = made.source(pin), tmp_path / "given"
    given.mkdir()
    made.debian(given / "toy_1.0-1+deb12u1_all.deb", {**FILES, "changelog": b"security"})
    with pytest.raises(DataError, match="has no toy_1"), fetch.open_fetcher(tmp_path / "a", packages=given) as fetcher:
        fetcher.fetch("toy", source, convert)
    with fetch.open_fetcher(tmp_path / "b", packages=given, allow=True) as fetcher:
        record, _ = fetcher.fetch("toy", source, convert)
        assert record["packages"][0]["version"] == "1.0-1+deb12u1"
        assert fetcher.fetch("toy", source, convert)[1]
    made.debian(given / "toy_1.0-1+deb12u1_all.deb", {**FILES, "toy/a.txt": b"other"})
    with (
        pytest.raises(DataError, match=r"has other files than toy 1\.0-1"),
        fetch.open_fetcher(tmp_path / "c", packages=given, allow=True) as fetcher,
    ):
        fetcher.fetch("toy", source, convert)
    assert left(tmp_path / "c") == [".lock"]


def test_a_damaged_set_is_not_replaced_silently(toy, tmp_path):
    source, given = toy
    with fetch.open_fetcher(tmp_path / "cache", packages=given) as fetcher:
        fetcher.fetch("toy", source, convert)
        (tmp_path / "cache/toy/rows.txt").write_text("edited")
        with pytest.raises(DataError, match=r"rows\.txt is damaged"):
            fetcher.fetch("toy", source, convert)
    assert (tmp_path / "cache/toy/rows.txt").read_text() == "edited"


def test_a_folder_of_packages_must_exist(tmp_path):
    with (
        pytest.raises(DataError, match=r"--packages .* is not a folder"),
        fetch.open_fetcher(tmp_path / "cache", packages=tmp_path / "absent"),
    ):
        raise AssertionError("it was entered")
    assert not (tmp_path / "cache").exists()


def test_a_record_holds_what_was_counted(toy, tmp_path):
    source, given = toy
    counted = dataclasses.replace(source, attribution="Ärzte")
    with fetch.open_fetcher(tmp_path / "cache", packages=given) as fetcher:
        fetcher.fetch("toy", counted, convert)
    text = (tmp_path / "cache/toy" / cache.RECORD).read_text()
    assert json.loads(text)["attribution"] == "Ärzte" and "Ärzte" in text
