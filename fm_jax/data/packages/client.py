"""Download one package with the ordinary client (pip, npm or apt), and check that it is the pinned one.

The clients bring what this project should not rebuild: mirrors, proxies, certificates, signatures. None of the three
commands runs anything of the package: pip takes wheels only, npm ignores scripts, apt-get downloads without installing.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote

from fm_jax.core.errors import DataError, ResourceError
from fm_jax.data.packages.sources import Package

Shown = Callable[[int], None]  # gets the number of bytes that have come so far


class Unavailable(DataError):
    """A package that cannot be had here: no client, no network, or not in this machine's index."""


STALLED = 180.0  # seconds without a new byte after which a client is ended
_POLL = 0.1
_SUFFIX = {"pip": "whl", "npm": "tgz", "apt": "deb"}
_INSTALL = {
    "pip": "python -m ensurepip",
    "npm": "it comes with Node.js",
    "apt": "it comes with Debian and Ubuntu, so run this there, or in a container of theirs",
}
_NETWORK = re.compile(
    r"Retrying|[Tt]imed out|[Tt]emporary failure|[Cc]onnection (?:refused|reset|error|broken|aborted|timed)|"
    r"NewConnectionError|Could not (?:resolve|connect)|Failed to fetch|Network is unreachable|No route to host|"
    r"ProxyError|SSLError|certificate|ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|EHOSTUNREACH"
)
_FULL = re.compile(r"No space left on device|ENOSPC|Disk quota exceeded|EDQUOT")


def download(package: Package, folder: Path, *, allow: bool = False, shown: Shown = lambda _: None) -> Path:
    """Download a package into a folder and return its file, not yet checked.

    Args:
        package: what to download.
        folder: existing folder; the client's own temporary files go there too, so the sizes there show the progress.
        allow: take whatever version of a Debian package the index has.
        shown: called with the number of bytes so far.

    Raises:
        Unavailable: the client is not installed, the index does not answer, or it does not have the package.
        ResourceError: no space left.
    """
    with tempfile.TemporaryDirectory(prefix="client-", dir=folder) as scratch:
        place = Path(scratch) / "out"
        place.mkdir()
        command = _command(package, place, allow)
        code, text = _run(command, package, Path(scratch), shown)
        if code:
            raise _failure(package, text)
        files = sorted(place.glob(f"*.{_SUFFIX[package.client]}"))
        if len(files) != 1:
            raise Unavailable(f"{command[0]} gave {len(files)} files for {package.label} instead of one")
        return files[0].rename(folder / files[0].name)


def given(package: Package, folder: Path, *, allow: bool = False) -> Path:
    """Return a package's file in a folder of files that were downloaded elsewhere.

    Raises:
        Unavailable: there is none.
    """
    version = "*" if package.client == "apt" and allow else package.version.replace(":", "%3a")
    pattern = {
        "pip": f"{package.name.replace('-', '_')}-{version}-*.whl",
        "npm": f"{package.name}-{version}.tgz",
        "apt": f"{package.name}_{version}_*.deb",
    }[package.client]
    files = sorted(folder.glob(pattern))
    if not files:
        raise Unavailable(f"{folder} has no {pattern} of {package.label}; download it there, or leave --packages out")
    return files[-1]


def version_of(package: Package, file: Path) -> str:
    """Return a package's version; that of a Debian package stands in the name of its file."""
    if package.client != "apt":
        return package.version
    return unquote(file.name.removeprefix(f"{package.name}_")).rpartition("_")[0]


def check(package: Package, file: Path, *, allow: bool = False) -> None:
    """Raise unless a file is the pinned package; of a Debian package only the version in its name is checked here.

    Raises:
        DataError: the size, the SHA-256 or the version differs.
    """
    if package.client == "apt":
        if (version := version_of(package, file)) != package.version and not allow:
            raise DataError(
                f"{package.name} is version {version[:60]} here, not {package.version}; with --allow true it is taken "
                "if the files used are the same"
            )
        return
    if (size := file.stat().st_size) != package.bytes:
        raise DataError(f"{file.name} has {size} bytes instead of {package.bytes}: it was cut short or has changed")
    with file.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    if sha256 != package.sha256:
        raise DataError(
            f"{file.name} has changed: its SHA-256 is {sha256[:16]}…, not {package.sha256[:16]}…; it is not used"
        )


def _command(package: Package, place: Path, allow: bool) -> list[str]:
    if package.client == "pip":
        pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else [_found(package, "pip3", "pip")]
        options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-cache-dir", "--no-input"]
        options += ["--retries=2", "--disable-pip-version-check", f"--dest={place}"]
        return [*pip, "download", *options, f"{package.name}=={package.version}"]
    if package.client == "npm":
        options = ["--ignore-scripts", f"--pack-destination={place}", f"--cache={place.parent / 'cache'}"]
        options += ["--fetch-retries=1", "--no-update-notifier"]
        return [_found(package, "npm"), "pack", f"{package.name}@{package.version}", *options]
    exact = "" if allow else f"={package.version}"
    return [_found(package, "apt-get"), "-o=Acquire::Retries=1", "download", f"{package.name}{exact}"]


def _found(package: Package, *names: str) -> str:
    for name in names:
        if path := shutil.which(name):
            return path
    raise Unavailable(
        f"{package.label} is downloaded by {names[-1]}, which is missing here ({_INSTALL[package.client]}); or give "
        "--packages a folder that has its file"
    )


def _run(command: Sequence[str], package: Package, scratch: Path, shown: Shown) -> tuple[int, str]:
    """Run a client, reporting the bytes that come; return its status and what it printed."""
    environment = {**os.environ, "TMPDIR": str(scratch), "LC_ALL": "C", "NO_COLOR": "1"}
    log = scratch / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=scratch / "out", env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            most, since = 0, time.monotonic()
            while (code := process.poll()) is None:
                if (size := _size(scratch)) > most:
                    most, since = size, time.monotonic()
                    shown(min(size, package.bytes))
                if time.monotonic() - since > STALLED:
                    raise Unavailable(
                        f"{package.label}: nothing came for {STALLED:g} s; check the network and try again"
                    )
                time.sleep(_POLL)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    return code, log.read_text("utf-8", "replace")


def _size(folder: Path) -> int:
    """Return the bytes under a folder in which another process makes and removes files."""
    total = 0
    for inner, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(inner, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _failure(package: Package, text: str) -> Unavailable | ResourceError:
    """Return an error of one line for what a client printed."""
    if _FULL.search(text):
        return ResourceError(f"no space left for the download of {package.label}; give another folder with --to")
    lines = [line.strip() for line in text.splitlines() if re.match(r"\s*(npm )?(ERROR|error|E:|Err)", line)]
    reason = re.sub(r"https?://\S+|file://\S+", "the index", (lines or text.strip().splitlines() or ["no reason"])[0])
    reason = "".join(letter for letter in reason if letter.isprintable())[:140]
    if kinds := _NETWORK.findall(text):
        reason = next((kind for kind in reversed(kinds) if kind != "Retrying"), reason)
        return Unavailable(
            f"the package index did not answer for {package.label} ({reason}); check the network or the mirror of "
            f"{package.client}, or give --packages a folder that has its file"
        )
    refresh = "; run apt-get update, or give --allow true to take another version" if package.client == "apt" else ""
    return Unavailable(f"{package.client} could not download {package.label}: {reason}{refresh}")
