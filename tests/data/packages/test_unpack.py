"""Archives of the three kinds come out whole, and a hostile or damaged one leaves nothing outside its folder."""

import gzip
import pickle
import stat
import tarfile
import zipfile

import pytest

from fm_jax.core.errors import DataError
from fm_jax.data.packages import unpack
from tests.data.packages import made

FILES = {"toy/a.txt": b"first", "toy/deep/b.txt": b"second" * 1000, "toy/c.py": b"raise SystemExit", "LICENSE": b"MIT"}
MAKE = {
    "toy.whl": made.wheel,
    "toy.tgz": made.tarball,
    "toy.deb": made.debian,
    "gz.deb": lambda path, files: made.debian(path, files, "gz"),
}


def texts(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", MAKE)
def test_the_chosen_files_come_out_with_their_bytes(name, tmp_path):
    unpack.unpack(MAKE[name](tmp_path / name, FILES), tmp_path / "out", ("toy/*.txt", "LICENSE"))
    assert texts(tmp_path / "out") == {path: text for path, text in FILES.items() if not path.endswith(".py")}


@pytest.mark.parametrize("name", MAKE)
def test_a_file_cut_short_anywhere_is_refused(name, tmp_path):
    whole = MAKE[name](tmp_path / name, FILES).read_bytes()
    for number, share in enumerate((0, 0.1, 0.3, 0.6, 0.9)):
        path = tmp_path / f"{number}{name}"
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(DataError, match=path.name):
            unpack.unpack(path, tmp_path / f"out{number}", ("toy/*.txt",))


@pytest.mark.parametrize("name", MAKE)
def test_what_was_asked_for_must_be_there(name, tmp_path):
    with pytest.raises(DataError, match=r"has no toy/\*\.bin; it is not the package"):
        unpack.unpack(MAKE[name](tmp_path / name, FILES), tmp_path / "out", ("toy/*.bin", "toy/*.txt"))


UNSAFE = ("../x.txt", "/x.txt", "toy/../../x.txt", "toy/./x.txt", "toy//x.txt", "C:/x.txt", "toy\\x.txt", "a" * 301)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("path", UNSAFE)
def test_a_name_that_could_leave_the_folder_ends_the_archive(name, path, tmp_path):
    before = set(tmp_path.parent.iterdir())
    file = MAKE[name](tmp_path / name, {path: b"out", **FILES})
    with pytest.raises(DataError, match="unsafe path"):
        unpack.unpack(file, tmp_path / "in" / "out", ("*.txt",))
    assert set(tmp_path.parent.iterdir()) == before and not (tmp_path / "in" / "x.txt").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_a_link_or_device_among_the_chosen_files_is_refused_and_elsewhere_it_is_skipped(kind, tmp_path):
    def change(info):
        if info.name.endswith("a.txt"):
            info.type, info.linkname, info.size = kind, "/etc/passwd", 0

    for name, make in (("toy.tgz", made.tarball), ("toy.deb", made.debian)):
        file = make(tmp_path / name, FILES, change=change)
        with pytest.raises(DataError, match=r"a\.txt' is a link or a device"):
            unpack.unpack(file, tmp_path / f"{name}1", ("toy/*.txt",))
        unpack.unpack(file, tmp_path / f"{name}2", ("toy/deep/*",))
        assert texts(tmp_path / f"{name}2") == {"toy/deep/b.txt": FILES["toy/deep/b.txt"]}


def test_a_link_in_a_wheel_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "toy.whl", "w") as out:
        info = zipfile.ZipInfo("toy/a.txt")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        out.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match="is a link or a device"):
        unpack.unpack(tmp_path / "toy.whl", tmp_path / "out", ("toy/*",))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_refused_whatever_its_name(protocol, tmp_path):
    data = pickle.dumps({"a": [1, 2]}, protocol)
    with pytest.raises(DataError, match="is a pickle"):
        unpack.unpack(made.wheel(tmp_path / "a.whl", {"toy/a.txt": data}), tmp_path / "a", ("toy/*",))
    with pytest.raises(DataError, match="may be a pickle"):
        unpack.unpack(made.wheel(tmp_path / "b.whl", {"toy/a.pkl": b"x"}), tmp_path / "b", ("toy/*",))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_repeated_name_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "toy.whl", "w") as out:
        out.writestr("toy/a.txt", "one")
        out.writestr("toy/a.txt", "two")
    with pytest.raises(DataError, match="twice"):
        unpack.unpack(tmp_path / "toy.whl", tmp_path / "out", ("toy/*",))


def test_a_name_that_is_file_and_folder_is_refused(tmp_path):
    file = made.wheel(tmp_path / "toy.whl", {"toy/a": b"file", "toy/a/b": b"inside"})
    with pytest.raises(DataError, match="exclude each other"):
        unpack.unpack(file, tmp_path / "out", ("toy/*",))


@pytest.mark.parametrize("name", MAKE)
def test_what_unpacks_to_more_than_the_limit_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(unpack, "MAX_BYTES", 40_000)
    file = MAKE[name](tmp_path / name, {"toy/a.txt": b"0" * 60_000})
    assert file.stat().st_size < 2_000  # a bomb is small
    with pytest.raises(DataError, match="unpacks to more than 40000 bytes"):
        unpack.unpack(file, tmp_path / "out", ("toy/*",))


def test_too_many_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(unpack, "MAX_MEMBERS", 3)
    with pytest.raises(DataError, match="more than 3 files"):
        unpack.unpack(made.wheel(tmp_path / "toy.whl", FILES), tmp_path / "out", ("toy/*",))


def test_an_encrypted_wheel_is_refused(tmp_path):
    data = bytearray(made.wheel(tmp_path / "toy.whl", {"toy/a.txt": b"text"}).read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + at] |= 1
    (tmp_path / "toy.whl").write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        unpack.unpack(tmp_path / "toy.whl", tmp_path / "out", ("toy/*",))


def test_another_kind_of_file_or_packing_is_named(tmp_path):
    (tmp_path / "toy.rpm").write_bytes(b"x")
    with pytest.raises(DataError, match="is not a wheel"):
        unpack.unpack(tmp_path / "toy.rpm", tmp_path / "a", ("*",))
    with pytest.raises(DataError, match=r"packed as data\.tar\.zst"):
        unpack.unpack(made.debian(tmp_path / "toy.deb", FILES, "zst"), tmp_path / "b", ("*",))
    (tmp_path / "toy.tgz").write_bytes(gzip.compress(b"not a tar" * 100))
    with pytest.raises(DataError, match="damaged"):
        unpack.unpack(tmp_path / "toy.tgz", tmp_path / "c", ("*",))


def test_a_flipped_bit_in_a_chosen_file_is_found(tmp_path):
    data = bytearray(made.wheel(tmp_path / "toy.whl", FILES).read_bytes())
    data[data.index(b"toy/a.txt") + len("toy/a.txt") + 2] ^= 1
    (tmp_path / "toy.whl").write_bytes(data)
    with pytest.raises(DataError, match=r"toy\.whl is cut short or damaged"):
        unpack.unpack(tmp_path / "toy.whl", tmp_path / "out", ("toy/*.txt",))


def test_the_digest_changes_with_names_and_contents_of_the_chosen_files_only(tmp_path):
    digests = []
    for number, files in enumerate(({}, {"LICENSE": b"other"}, {"toy/a.txt": b"First"}, {"toy/d.txt": b""})):
        unpack.unpack(made.wheel(tmp_path / f"{number}.whl", {**FILES, **files}), tmp_path / f"{number}", ("*",))
        digests.append(unpack.digest(tmp_path / f"{number}", ("toy/*.txt",)))
    assert digests[0] == digests[1] and len(set(digests)) == 3
