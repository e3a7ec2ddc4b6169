"""Take chosen files out of a wheel, an npm tarball or a Debian package; nothing in it can write elsewhere or run.

A name that leaves the folder, a repeated name, a link or device among the chosen files, a pickle, or more than the
limits ends the whole archive. The limits count what is decompressed, not what headers say.
"""

import gzip
import hashlib
import io
import lzma
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, BinaryIO

from fm_jax.core.errors import DataError

MAX_BYTES = 1 << 30
MAX_MEMBERS = 50_000
_CHUNK = 1 << 20
_LONGEST = 300  # characters of a name
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".dill", ".npy", ".npz")  # .npy may hold pickles
_PROTOCOL = re.compile(rb"\x80[\x02-\x05]")  # how every pickle of protocol 2 to 5 begins

Readable = IO[bytes] | gzip.GzipFile
Member = tuple[str, str, Callable[[], IO[bytes]]]  # name; "" if a plain file, else what it is; how to open it


def unpack(archive: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    """Write the files of an archive that match any of `patterns` into a new folder, with their paths.

    Raises:
        DataError: the archive is damaged, hostile, of another kind, or has no file of a pattern.
    """
    folder.mkdir(parents=True)
    missing, names, total = set(patterns), set[str](), 0
    try:
        with archive.open("rb") as file:
            for name, oddity, content in _members(archive, file):
                path = _checked(archive, name)
                if path in names:
                    raise DataError(f"{archive.name} has {path!r} twice; it is not the package that was asked for")
                names.add(path)
                if len(names) > MAX_MEMBERS:
                    raise DataError(f"{archive.name} has more than {MAX_MEMBERS} files; at most so many are taken")
                matched = {pattern for pattern in patterns if fnmatchcase(path, pattern)}
                if oddity == "a folder" or not matched:
                    continue
                if oddity:
                    raise DataError(f"{archive.name}: {path!r} is {oddity}, not a file; it is refused")
                missing -= matched
                total = _write(archive, path, content(), folder / path, total)
    except (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise _damaged(archive, error) from error
    except (RuntimeError, ValueError, OverflowError) as error:  # an encrypted or absurd zip
        raise _damaged(archive, error) from error
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:  # a name that is file and folder
        raise DataError(f"{archive.name} has names that exclude each other; it is refused") from error
    if missing:
        raise DataError(f"{archive.name} has no {min(missing)}; it is not the package that was asked for")


def digest(folder: Path, patterns: tuple[str, ...]) -> str:
    """Return the SHA-256 of the names and contents of the files under a folder that match any pattern."""
    whole = hashlib.sha256()
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name in sorted(files):
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            with files[name].open("rb") as file:
                whole.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def _damaged(archive: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:100] or type(error).__name__
    return DataError(f"{archive.name} is cut short or damaged ({reason}); fetch it again")


def _members(archive: Path, file: BinaryIO) -> Iterator[Member]:
    """Yield what an archive holds; its suffix says its kind."""
    if archive.name.endswith((".whl", ".zip")):
        yield from _zip(file)
    elif archive.name.endswith((".tgz", ".tar.gz")):
        yield from _tar(archive, gzip.GzipFile(fileobj=file))
    elif archive.name.endswith(".deb"):
        yield from _tar(archive, _debian_data(archive, file))
    else:
        raise DataError(f"{archive.name} is not a wheel, a .tgz or a .deb")


def _zip(file: BinaryIO) -> Iterator[Member]:
    with zipfile.ZipFile(file) as whole:
        for info in whole.infolist():
            mode = info.external_attr >> 16
            odd = stat.S_IFMT(mode) not in (0, stat.S_IFREG)
            oddity = "a folder" if info.is_dir() else "a link or a device" if odd else ""
            yield info.filename, oddity, lambda info=info: whole.open(info)  # type: ignore[misc]


def _tar(archive: Path, file: Readable) -> Iterator[Member]:
    stream = _Bounded(archive, file)
    with tarfile.open(fileobj=stream, mode="r|") as whole:
        for info in whole:
            oddity = "" if info.isreg() else "a folder" if info.isdir() else "a link or a device"
            yield info.name, oddity, lambda info=info: _opened(whole, info)  # type: ignore[misc]
    while stream.read(_CHUNK):  # to the end, where the checksums are
        continue


def _opened(whole: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    content = whole.extractfile(info)
    assert content is not None  # a regular file always has content
    return content


def _debian_data(archive: Path, file: BinaryIO) -> Readable:
    """Return the decompressed data.tar of a Debian package, which is an `ar` archive of two tarballs."""
    if file.read(8) != b"!<arch>\n":
        raise DataError(f"{archive.name} is not a Debian package")
    while len(head := file.read(60)) == 60:
        name, size = head[:16].decode("ascii", "replace").strip().rstrip("/"), head[48:58].strip()
        if not size.isdigit() or int(size) > MAX_BYTES or head[58:] != b"`\n":
            break
        if name in ("data.tar.xz", "data.tar.gz", "data.tar"):
            if len(data := file.read(int(size))) < int(size):
                break
            raw = io.BytesIO(_xz(data) if name.endswith("xz") else data)
            return gzip.GzipFile(fileobj=raw) if name.endswith("gz") else raw
        if name.startswith("data.tar"):
            raise DataError(f"{archive.name} is packed as {name}; only xz and gzip are read, as Debian packs them")
        file.seek(int(size) + int(size) % 2, io.SEEK_CUR)
    raise DataError(f"{archive.name} is cut short or damaged (no data.tar); fetch it again")


def _xz(data: bytes) -> bytes:
    """Decompress xz data; the header may ask for gigabytes of memory, of which xz -9 needs 65 MB."""
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 28)
    raw = decompressor.decompress(data, max_length=MAX_BYTES + 1)
    if not decompressor.eof and len(raw) <= MAX_BYTES:
        raise EOFError("the xz data end too early")
    return raw  # longer than MAX_BYTES: `_Bounded` says so


class _Bounded(io.RawIOBase):
    """A stream that ends with an error after MAX_BYTES."""

    def __init__(self, archive: Path, file: Readable) -> None:
        self._archive, self._file, self._left = archive, file, MAX_BYTES

    def read(self, size: int = -1, /) -> bytes:
        block = self._file.read(_CHUNK if size < 0 else min(size, self._left + 1))
        self._left -= len(block)
        if self._left < 0:
            raise _too_large(self._archive)
        return block


def _too_large(archive: Path) -> DataError:
    return DataError(f"{archive.name} unpacks to more than {MAX_BYTES} bytes; at most so many are taken")


def _checked(archive: Path, name: str) -> str:
    """Return a member's path, which stays inside the folder on every system."""
    path = name.removeprefix("./").rstrip("/")
    parts = path.split("/")
    bad = not path.isprintable() or len(path) > _LONGEST or "\\" in path or ":" in parts[0]
    bad |= any(len(part.encode("utf-8", "replace")) > 255 for part in parts)
    if bad or (path not in ("", ".") and any(part in ("", ".", "..") for part in parts)):
        raise DataError(f"{archive.name} has the unsafe path {name[:80]!a}; it is not the package that was asked for")
    return path


def _write(archive: Path, name: str, content: IO[bytes], path: Path, total: int) -> int:
    """Write one file; return the bytes written so far."""
    if name.lower().endswith(_PICKLES):
        raise DataError(f"{archive.name}: {name!r} may be a pickle, which can run code; it is refused")
    path.parent.mkdir(parents=True, exist_ok=True)
    with content, path.open("xb") as out:
        while block := content.read(_CHUNK):
            if not out.tell() and _PROTOCOL.match(block):
                raise DataError(f"{archive.name}: {name!r} is a pickle, which can run code; it is refused")
            total += len(block)
            if total > MAX_BYTES:
                raise _too_large(archive)
            out.write(block)
    return total
