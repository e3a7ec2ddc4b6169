"""The commands that are run, what comes of them, and one line for each way they fail."""

import shutil
import sys
from pathlib import Path

import pytest

from fm_jax.core.errors import DataError, ResourceError
from fm_jax.data.packages import client
from tests.data.packages import made

NAMES = {  # client -> program, file
    "pip": ("pip3", "toy_set-1.0-py3-none-any.whl"),
    "npm": ("npm", "toy-set-1.0.tgz"),
    "apt": ("apt-get", "toy-set_1%3a1.0-2_all.deb"),
}
MAKE = {"pip": made.wheel, "npm": made.tarball, "apt": made.debian}


@pytest.fixture(params=NAMES)
def toy(request, tmp_path, monkeypatch):
    """Return (package, its file, folder of made programs)."""
    kind = request.param
    (tmp_path / "given").mkdir()
    file = MAKE[kind](tmp_path / "given" / NAMES[kind][1], {"toy/a.txt": b"text"})
    version = "1:1.0-2" if kind == "apt" else "1.0"
    made.only(tmp_path / "bin", monkeypatch)
    return made.package(kind, file, "toy/*", name="toy-set", version=version), file, tmp_path / "bin"


# Writes the given file where the real client would: --dest=, --pack-destination=, or the working directory.
COPY = """
given = [word.partition("=")[2] for word in arguments if word.startswith(("--dest=", "--pack-destination="))]
open({log!r}, "w").write("\\n".join([os.environ["LC_ALL"], *arguments]))
shutil.copy({file!r}, given[0] if given else ".")
"""


def test_a_client_downloads_one_file_and_its_progress_is_seen(toy, tmp_path, monkeypatch):
    package, file, programs = toy
    monkeypatch.setattr(client, "_POLL", 0.01)
    body = COPY.format(log=str(tmp_path / "log"), file=str(file)) + "time.sleep(0.3)"
    made.program(programs, NAMES[package.client][0], body)
    (tmp_path / "to").mkdir()
    seen = []
    found = client.download(package, tmp_path / "to", shown=seen.append)
    assert found.read_bytes() == file.read_bytes() and found.name == file.name
    assert [path.name for path in (tmp_path / "to").iterdir()] == [file.name]  # nothing of the client's own is left
    assert seen and max(seen) <= package.bytes
    client.check(package, found)
    locale, *words = (tmp_path / "log").read_text().splitlines()
    assert locale == "C"
    wanted = {"pip": "toy-set==1.0", "npm": "toy-set@1.0", "apt": "toy-set=1:1.0-2"}[package.client]
    safe = {"pip": "--only-binary=:all: --no-deps download", "npm": "--ignore-scripts pack", "apt": "download"}
    assert {wanted, *safe[package.client].split()} <= set(words)


def test_this_pythons_own_pip_comes_first():
    package = made.Package("pip", "toy", "1.0", 1, "", (), ())
    command = client._command(package, Path("out"), False)
    assert command[:4] == [sys.executable, "-m", "pip", "download"]


def test_a_missing_client_is_named_with_what_to_do(toy, tmp_path):
    package, *_ = toy
    with pytest.raises(
        client.Unavailable, match=rf"downloaded by {NAMES[package.client][0].rstrip('3')}, which is missing"
    ):
        client.download(package, tmp_path)


FAILURES = {
    "no network": (
        "ERROR: HTTPSConnectionPool(host='x'): Failed: NewConnectionError",
        DataError,
        "index did not answer",
    ),
    "npm": (
        "npm error code EAI_AGAIN\nnpm error network request to https://x.y/z failed",
        client.Unavailable,
        "did not answer",
    ),
    "apt": (
        "Err:1 http://x.y z\n  Could not resolve 'x.y'\nE: Failed to fetch http://x.y/z",
        DataError,
        "did not answer",
    ),
    "unknown": (
        "ERROR: No matching distribution found for toy-set==1.0",
        client.Unavailable,
        "No matching distribution",
    ),
    "full": ("OSError: [Errno 28] No space left on device", ResourceError, "no space left"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_one_line_without_addresses_and_leaves_nothing(failure, toy, tmp_path):
    package, _, programs = toy
    text, kind, message = FAILURES[failure]
    made.program(programs, NAMES[package.client][0], f"open('half', 'w').write('x')\nsys.exit({text!r})")
    (tmp_path / "to").mkdir()
    with pytest.raises(kind, match=message) as caught:
        client.download(package, tmp_path / "to")
    assert "://" not in str(caught.value) and "\n" not in str(caught.value) and "toy-set" in str(caught.value)
    assert not list((tmp_path / "to").iterdir())


def test_a_client_that_gives_nothing_is_named(toy, tmp_path):
    package, _, programs = toy
    made.program(programs, NAMES[package.client][0], "")
    with pytest.raises(client.Unavailable, match="gave 0 files"):
        client.download(package, tmp_path)


def test_a_client_that_hangs_is_ended(toy, tmp_path, monkeypatch):
    package, _, programs = toy
    monkeypatch.setattr(client, "STALLED", 0.3)
    made.program(programs, NAMES[package.client][0], "time.sleep(60)")
    with pytest.raises(client.Unavailable, match=r"nothing came for 0\.3 s"):
        client.download(package, tmp_path)


def test_files_brought_from_elsewhere_are_found_by_name_and_version(toy, tmp_path):
    package, file, _ = toy
    assert client.given(package, file.parent) == file
    (tmp_path / "empty").mkdir()
    with pytest.raises(client.Unavailable, match=r"has no toy.set.*of toy-set"):
        client.given(package, tmp_path / "empty")


def test_another_version_of_a_debian_package_needs_to_be_allowed(tmp_path):
    file = made.debian(tmp_path / "toy_1.1-3_all.deb", {"toy/a.txt": b"text"})
    package = made.package("apt", file, "toy/*", version="1.0-1")
    with pytest.raises(DataError, match=r"version 1\.1-3 here, not 1\.0-1; with --allow true"):
        client.check(package, file)
    client.check(package, file, allow=True)
    assert client.given(package, tmp_path, allow=True) == file and client.version_of(package, file) == "1.1-3"
    with pytest.raises(client.Unavailable, match=r"has no toy_1\.0-1"):
        client.given(package, tmp_path)


@pytest.mark.parametrize("kind", ["pip", "npm"])
def test_a_truncated_and_a_changed_package_are_told_apart(kind, tmp_path):
    file = MAKE[kind](tmp_path / NAMES[kind][1], {"toy/a.txt": b"text"})
    package = made.package(kind, file, "toy/*")
    client.check(package, file)
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(DataError, match=f"{len(data) - 1} bytes instead of {len(data)}: it was cut short"):
        client.check(package, file)
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match="has changed: its SHA-256 is"):
        client.check(package, file)


@pytest.mark.slow
def test_the_real_pip_takes_a_wheel_from_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("pip", reason="this Python has no pip")
    info = "toy_set-1.0.dist-info"
    files = {
        "toy/a.txt": b"text",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: toy-set\nVersion: 1.0\nRequires-Dist: absent\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    (tmp_path / "links").mkdir()
    file = made.wheel(tmp_path / "links" / NAMES["pip"][1], files)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(file.parent))
    package = made.package("pip", file, "toy/*", name="toy-set")
    found = client.download(package, tmp_path)
    client.check(package, found)
    file.unlink()
    with pytest.raises(client.Unavailable, match=r"pip could not download toy-set 1\.0: ERROR"):
        client.download(package, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pip", "npm"])
def test_the_real_clients_without_a_network_give_one_line(kind, tmp_path, monkeypatch):
    if kind == "npm" and shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    if kind == "pip":
        pytest.importorskip("pip", reason="this Python has no pip")
    for name in ("PIP_INDEX_URL", "npm_config_registry"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple/")  # nobody listens there
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    package = made.Package(kind, "toy-set", "1.0", 10, "", ("*",), ())  # type: ignore[arg-type]
    with pytest.raises(client.Unavailable, match=r"the package index did not answer for toy-set 1\.0") as caught:
        client.download(package, tmp_path)
    assert "://" not in str(caught.value)
    assert not list(tmp_path.iterdir())
