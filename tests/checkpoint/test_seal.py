import hashlib
import os
from pathlib import Path

import pytest

from fm_jax.checkpoint import seal
from fm_jax.core.errors import CheckpointError, ResourceError

FILES = {
    "state/d/big": bytes(range(256)) * 40,
    "state/_METADATA": b"{}",
    "state/empty": b"",
    "checkpoint.json": b'{"a":1}',
}


def _grow(folder: Path) -> Path:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def sealed(tmp_path):
    assert seal.publish(_grow(tmp_path / "unsealed" / "7"), tmp_path / "7") == sum(map(len, FILES.values()))
    return tmp_path / "7"


def test_the_seal_lists_size_and_digest_of_every_file(sealed):
    assert seal.manifest(sealed) == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in FILES.items()
    }
    seal.verify(sealed)
    assert seal.read(sealed, "checkpoint.json") == FILES["checkpoint.json"]


def test_everything_is_on_disk_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    """A power cut keeps what was flushed and loses the rest, so the order of the calls is the whole promise."""
    folder, final, events = _grow(tmp_path / "unsealed" / "7"), tmp_path / "7", []
    fsync, replace = os.fsync, os.replace

    def flush(descriptor):
        events.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def name(source, target):
        inside = [Path(source), *Path(source).rglob("*")]
        flushed = [inode for kind, inode in events if kind == "fsync"]
        assert {path.stat().st_ino for path in inside} <= set(flushed)
        for path in inside:  # a folder is flushed after the last name was made in it
            if path.is_dir():
                last = {inode: i for i, inode in enumerate(flushed)}
                assert all(last[path.stat().st_ino] > last[child.stat().st_ino] for child in path.iterdir())
        assert (Path(source) / seal.SEAL).is_file()
        events.append(("replace", Path(source).stat().st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", name)
    seal.publish(folder, final)
    monkeypatch.undo()
    kinds = [kind for kind, _ in events]
    assert kinds.count("replace") == 1
    after = {inode for _, inode in events[kinds.index("replace") + 1 :]}
    assert {tmp_path.stat().st_ino, (tmp_path / "unsealed").stat().st_ino} <= after


@pytest.mark.parametrize("fails_at", range(len(FILES) + 5))
def test_a_failed_flush_leaves_no_sealed_folder(tmp_path, monkeypatch, fails_at):
    folder, final = _grow(tmp_path / "unsealed" / "7"), tmp_path / "7"
    calls, fsync = iter(range(100)), os.fsync

    def flush(descriptor):
        if next(calls) == fails_at:
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    with pytest.raises(OSError, match="Input/output error"):
        seal.publish(folder, final)
    # Files, the seal and three folders come before the name; the folder around it only after.
    assert final.exists() == (fails_at >= len(FILES) + 1 + 3)


def test_every_flipped_bit_of_the_seal_is_found(sealed):
    path = sealed / seal.SEAL
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 13):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"checkpoint 7 in .*: seal.json is damaged"):
            seal.verify(sealed)
    path.write_bytes(whole)
    seal.verify(sealed)


def test_an_added_file_is_no_damage_but_an_unlisted_one_is_not_read(sealed):
    (sealed / "notes.txt").write_text("good run")
    seal.verify(sealed)
    with pytest.raises(CheckpointError, match="the seal does not list it"):
        seal.read(sealed, "notes.txt")


def test_shares_cover_every_file_once(sealed):
    (sealed / "state/d/big").write_bytes(b"other")
    found = 0
    for share in range(3):
        try:
            seal.verify(sealed, share=(share, 3))
        except CheckpointError:
            found += 1
    assert found == 1


def test_steps_are_whole_names_with_a_seal(sealed):
    root = sealed.parent
    for name in ("007", "12", "3.deleted", "x9", "²"):
        (root / name).mkdir()
    (root / "15").write_text("a file")
    assert seal.steps(root) == [7]
    assert seal.unsealed(root) == [12]
    assert seal.steps(root / "nowhere") == []


def test_messages_stay_short_however_long_the_path(tmp_path):
    deep = tmp_path.joinpath(*["d" * 200] * 4) / "7"
    message = str(seal.damaged(deep, "state/" + "f" * 900, "missing"))
    assert len(message) <= 400
    assert message.startswith("checkpoint 7 in ")
    unread = seal.unread(deep, "state/" + "f" * 900, OSError(5, "Input/output error"))
    assert len(f"the best step is unknown: {unread}") <= 400


@pytest.mark.parametrize("name", [seal.SEAL, "checkpoint.json", "state/d/big"])
def test_what_cannot_be_read_is_not_called_damaged(sealed, monkeypatch, name):
    opened = Path.open

    def fail(path, *args, **options):
        if path == sealed / name:
            raise OSError(5, "Input/output error", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(
        CheckpointError, match=r"checkpoint 7 in .* could not be read \(Input/output error\); try again"
    ):
        seal.verify(sealed)


def test_a_directory_that_cannot_be_listed_is_not_empty(sealed, monkeypatch):
    def failing(function, refused):
        def call(path, **options):
            if Path(path) == refused:
                raise OSError(13, "Permission denied", str(path))
            return function(path, **options)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", failing(os.scandir, sealed.parent))
        with pytest.raises(CheckpointError, match=r"checkpoints in .* could not be listed \(Permission denied\)"):
            seal.steps(sealed.parent)
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", failing(os.stat, sealed / seal.SEAL))
        with pytest.raises(CheckpointError, match=r"could not be read \(Permission denied\); try again"):
            seal.steps(sealed.parent)


def test_a_link_to_what_is_away_is_a_step_without_a_seal(sealed):
    (sealed.parent / "9").symlink_to(sealed.parent / "unmounted")
    assert (seal.steps(sealed.parent), seal.unsealed(sealed.parent)) == ([7], [9])


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(28, "No space left on device"), ResourceError),
        (OSError(122, "Disk quota exceeded"), ResourceError),
        (ValueError("RESOURCE_EXHAUSTED: Error writing ... File too large"), ResourceError),
        (OSError(13, "Permission denied"), CheckpointError),
        (RuntimeError("line\nbreak"), CheckpointError),
    ],
)
def test_failures_become_one_line(error, kind):
    said = seal.failure("saving checkpoint 3 in /runs/a", error)
    assert type(said) is kind
    assert str(said).startswith("saving checkpoint 3 in /runs/a failed: ")
    assert "\n" not in str(said)
