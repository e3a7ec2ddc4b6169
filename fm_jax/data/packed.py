"""Files packed by gzip or zstandard: read as a stream, or unpacked to a temporary file for random access.

A damaged or truncated file, and one that unpacks without end, is an error of one line that names it.
"""

import gzip
import io
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fm_jax.core.errors import DataError
from fm_jax.data import files

SUFFIXES = (".gz", ".zst")

# Text shrinks to a fifth, logs to a fiftieth; gzip can reach a thousandth and zstandard far less.
MOST_TIMES = 200  # a file may unpack to this many times its size,
MOST_BYTES = 1 << 28  # or to this many bytes if that is more


def is_packed(file: Path) -> bool:
    """Return whether the name says that the file is packed."""
    return file.name.lower().endswith(SUFFIXES)


def plain(file: Path) -> str:
    """Return the file's name in lower case, without the suffix of packing."""
    name = file.name.lower()
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


def with_packed(*suffixes: str) -> tuple[str, ...]:
    """Return suffixes and their packed forms."""
    return (*suffixes, *(suffix + packed for suffix in suffixes for packed in SUFFIXES))


def pyarrow(file: Path, what: str) -> Any:
    """Import pyarrow, which only packed and columnar files need.

    Raises:
        DataError: it is not installed; the message names the file and the command.
    """
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{file}: reading {what} needs pyarrow; install it: pip install 'fm_jax[columns]'") from None
    return pyarrow


def limit(file: Path) -> int:
    """Return the number of bytes that a file may unpack to."""
    return max(MOST_BYTES, MOST_TIMES * files.check(file).st_size)


@contextmanager
def reading(file: Path) -> Iterator[BinaryIO]:
    """Open a file, packed or not, as a stream of its content.

    Raises:
        DataError: not a file, unreadable, damaged, truncated, or unpacking to more than `limit`; also while it
            is read.
        ResourceError: too many open files.
    """
    most = limit(file)
    try:
        with _opened(file) as inner:
            yield io.BufferedReader(_Guarded(inner, file, most), 1 << 16) if is_packed(file) else inner
    except OSError as error:
        raise files.failed(error, f"cannot read {file}") from error


def _opened(file: Path) -> Any:
    if file.name.lower().endswith(".gz"):
        return gzip.open(file, "rb")
    if file.name.lower().endswith(".zst"):
        return pyarrow(file, "zstandard files").input_stream(str(file), compression="zstd")
    return open(file, "rb")


class _Guarded(io.RawIOBase):
    """A stream that is being unpacked, with a limit; what the unpacker raises becomes a DataError."""

    def __init__(self, inner: Any, file: Path, most: int) -> None:
        self._inner, self._file, self._most, self._done = inner, file, most, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._inner.read(len(buffer))
        except (EOFError, zlib.error, OSError) as error:  # also gzip.BadGzipFile and pyarrow's errors
            if isinstance(error, OSError) and error.errno:
                raise
            raise DataError(
                f"{self._file} is damaged or truncated after {self._done} unpacked bytes: {error}"
            ) from None
        self._done += len(data)
        if self._done > self._most:
            raise DataError(
                f"{self._file} unpacks to more than {self._most} bytes, {MOST_TIMES} times its size; "
                "unpack it yourself if that is right"
            )
        buffer[: len(data)] = data
        return len(data)


class Spool:
    """Bytes in one nameless temporary file, read by position from any thread; it is gone with the process."""

    def __init__(self) -> None:
        self.size, self._written = 0, 0
        try:
            self._file = tempfile.TemporaryFile(prefix="fm_jax-")  # noqa: SIM115  (open as long as the spool is)
        except OSError as error:
            raise files.failed(error, "cannot make a temporary file; set TMPDIR to a folder with space") from error

    def append(self, data: bytes) -> int:
        """Add bytes and return the position after them."""
        try:
            self._file.write(data)
        except OSError as error:
            raise self._failed(error) from error
        self.size += len(data)
        return self.size

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to before `stop`."""
        try:
            if self._written < self.size:
                self._file.flush()
                self._written = self.size
            parts = []
            while start < stop and (part := os.pread(self._file.fileno(), stop - start, start)):
                parts.append(part)
                start += len(part)
        except OSError as error:
            raise self._failed(error) from error
        return b"".join(parts)

    def _failed(self, error: OSError) -> Exception:
        return files.failed(error, f"cannot unpack data to {tempfile.gettempdir()}; set TMPDIR to a folder with space")
