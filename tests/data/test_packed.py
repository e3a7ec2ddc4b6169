"""Packed files come out whole, or with one line that names them."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fm_jax.core.errors import DataError, ResourceError
from fm_jax.data import packed
from tests.data import kinds
from tests.data.kinds import put

ROOT = Path(__file__).parents[2]
CONTENT = "".join(f"line {number} {number * 7919 % 1009}\n" for number in range(3000)).encode()


def read(file: Path) -> bytes:
    with packed.reading(file) as stream:
        return stream.read()


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst", ".TXT.GZ"])
def test_the_content_comes_out_whole(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes(kinds.packed(CONTENT, file.suffix.lower()))
    assert read(file) == CONTENT and packed.plain(file) == "a.txt"
    with packed.reading(file) as stream:
        assert b"".join(stream) == CONTENT


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_parts_packed_one_by_one_are_one_file(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes(kinds.packed(CONTENT, suffix) + kinds.packed(b"more", suffix))
    assert read(file) == CONTENT + b"more"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_or_truncated_file_is_named(suffix: str, tmp_path: Path) -> None:
    whole, file = kinds.packed(CONTENT, suffix), tmp_path / f"a{suffix}"
    for data in (whole[: len(whole) // 2], whole[:-1], b"no such thing", whole + b"rest", b"\0" + whole[1:]):
        file.write_bytes(data)
        with pytest.raises(DataError, match=rf"a{suffix} is damaged or truncated after \d+ unpacked bytes: ") as error:
            read(file)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_unpacks_without_end_is_stopped(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "MOST_BYTES", 1 << 20)
    file = put(tmp_path / f"a{suffix}", bytes(1 << 24))
    assert 200 * file.stat().st_size < 1 << 24
    with pytest.raises(DataError, match=rf"a{suffix} unpacks to more than \d+ bytes, 200 times its size"):
        read(file)


def test_without_pyarrow_the_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(tmp_path / "a.zst", b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"a.zst: reading zstandard files needs pyarrow; install it: pip install"):
        read(file)


def test_reading_what_is_not_packed_does_not_import_pyarrow(tmp_path: Path) -> None:
    file = put(tmp_path / "train.jsonl.gz", b'{"text": "a"}')
    code = (
        "import sys; from pathlib import Path; from fm_jax.data.text import folder\n"
        f"folder.column(Path({str(file)!r}), 'train', 'text')\n"
        "assert 'pyarrow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_spool_is_read_by_position_from_any_thread() -> None:
    spool, wrong = packed.Spool(), []
    ends = [spool.append(bytes([number]) * number) for number in range(200)]

    def work() -> None:
        for number, end in enumerate(ends):
            if spool.read(end - number, end) != bytes([number]) * number:
                wrong.append(number)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and spool.size == sum(range(200))


def test_a_full_temporary_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    spool = packed.Spool()
    spool.append(b"x")
    monkeypatch.setattr(os, "pread", full)
    with pytest.raises(ResourceError, match=r"cannot unpack data to .*; set TMPDIR to a folder with space: no space"):
        spool.read(0, 1)


def test_a_limit_on_open_files_is_one_line(tmp_path: Path) -> None:
    file = put(tmp_path / "a.txt", b"x")
    code = f"""
import resource
from pathlib import Path
from fm_jax.core.errors import ResourceError
from fm_jax.data import packed
held = open("/dev/null")
resource.setrlimit(resource.RLIMIT_NOFILE, (held.fileno() + 1, held.fileno() + 1))
try:
    with packed.reading(Path({str(file)!r})):
        pass
except ResourceError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "a.txt: this process has too many open files; raise the limit (ulimit -n)" in done.stdout, done.stderr
