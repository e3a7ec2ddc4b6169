"""The command: what it lists, what it refuses, how it ends, and that a second call finds what is there."""

import errno
import importlib
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from experiments import fetch
from fm_jax import cli
from fm_jax.core.config import apply_overrides
from fm_jax.data.packages import client
from fm_jax.data.packages.sources import SOURCES
from tests.data.packages import made

CONFIGS = {"default": fetch.config, "debug": fetch.debug}
PACKAGES = {package.name: package for source in SOURCES.values() for package in source.packages}


def ended(argv, capsys, tmp_path):
    """Run the command; return its status and its last line on stderr."""
    code = 0
    try:
        cli.main(fetch.run, CONFIGS, resumable=("*",), argv=[*argv, "--workdir", str(tmp_path / "run")])
    except SystemExit as left:
        code = int(left.code or 0)
    lines = capsys.readouterr().err.strip().splitlines()
    return code, lines[-1] if lines else ""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Replace the table by one toy set; return the folder of its package."""
    (tmp_path / "given").mkdir()
    file = made.wheel(tmp_path / "given" / "toy-1.0-py3-none-any.whl", {"toy/a.txt": b"one", "toy/LICENSE": b"MIT"})
    monkeypatch.setattr(fetch, "SOURCES", {"weat": made.source(made.package("pip", file, "toy/*"))})
    monkeypatch.setattr(fetch, "CONVERTERS", {"weat": convert})
    return file.parent


def convert(packages, out):
    (out / "a.txt").write_bytes((packages["toy"] / "toy/a.txt").read_bytes())
    return {"rows": 1}


def test_every_set_has_a_source_and_a_converter():
    assert [*SOURCES, "all"] == [*get_args(fetch.Name)] and list(fetch.CONVERTERS) == list(SOURCES)


@pytest.mark.parametrize("name", PACKAGES)
def test_every_package_is_pinned_by_a_whole_digest(name):
    package = PACKAGES[name]
    assert re.fullmatch(r"[0-9a-f]{64}", package.sha256) and package.bytes > 1000
    assert package.files and package.licences and re.fullmatch(r"[0-9][\w.:+-]*", package.version)
    assert not any(pattern.startswith(("/", "*")) or ".." in pattern for pattern in package.files)


@pytest.mark.parametrize("name", SOURCES)
def test_the_command_that_uses_a_set_is_one_that_exists(name):
    kind, _, rest = SOURCES[name].use.partition(": ")
    if kind == "fields":
        assert (Path(__file__).parents[2] / rest).exists()
    elif kind != "transformers":
        module, *options = shlex.split(SOURCES[name].use.format("/cache/set"))
        apply_overrides(importlib.import_module(module).config(), options)


def test_without_a_name_everything_is_listed_and_nothing_fetched(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(client, "download", None)
    assert fetch.run(replace(fetch.config(), to=tmp_path / "cache"), tmp_path) == {"sets": len(SOURCES)}
    text = capsys.readouterr().out
    for name, source in SOURCES.items():
        assert name in text and source.licence in text and source.gives in text
        assert source.use.format(tmp_path / "cache" / name) in text
    assert not (tmp_path / "cache").exists()


def test_a_set_is_fetched_once_and_then_found(toy, tmp_path, capsys, monkeypatch):
    cfg = fetch.Config(name=("weat",), to=tmp_path / "cache", packages=toy)
    first = fetch.run(cfg, tmp_path)
    text = capsys.readouterr().out
    assert "weat is there: " in text and "licence: MIT" in text and "attribution: nobody" in text and "rows 1" in text
    assert (
        json.loads((tmp_path / "results.json").read_text())["weat"]["counts"] == {"rows": 1} == first["weat"]["counts"]
    )
    monkeypatch.setattr(fetch.fetch, "open_fetcher", None)  # a whole cache is neither locked nor written
    again = fetch.run(replace(cfg, packages=None), tmp_path)
    assert again["weat"]["counts"] == {"rows": 1} and "is there already, and whole" in capsys.readouterr().out


def test_a_damaged_set_ends_with_3_and_names_the_file(toy, tmp_path, capsys):
    argv = ["--name", "weat", "--to", str(tmp_path / "cache"), "--packages", str(toy)]
    assert ended(argv, capsys, tmp_path)[0] == 0
    (tmp_path / "cache/weat/a.txt").write_text("two")
    code, line = ended(argv, capsys, tmp_path)
    assert code == 3 and "a.txt is damaged (its sha256 differs)" in line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--name", "minilmm"], r"--name"),
        (["--name", "minilm,all"], "all is all of them"),
        (["--nam", "minilm"], r"did you mean --name"),
        (["--packages", "absent", "--name", "weat", "--fresh", "true"], "unknown option --fresh"),
    ],
)
def test_a_wrong_command_ends_with_2(argv, message, tmp_path, capsys):
    code, line = ended(argv, capsys, tmp_path)
    assert code == 2 and re.search(message, line)


def test_without_a_network_it_ends_with_3_in_one_line_and_leaves_nothing(toy, tmp_path, capsys, monkeypatch):
    made.only(tmp_path / "bin", monkeypatch)
    made.program(tmp_path / "bin", "pip3", "sys.exit('ERROR: Connection refused: https://index.example/simple')")
    code, line = ended(["--name", "all", "--to", str(tmp_path / "cache")], capsys, tmp_path)
    assert code == 3 and line.startswith("fetch: error: the package index did not answer for toy 1.0")
    assert "index.example" not in line
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_missing_client_ends_with_3(toy, tmp_path, capsys, monkeypatch):
    made.only(tmp_path / "bin", monkeypatch)
    code, line = ended(["--name", "weat", "--to", str(tmp_path / "cache")], capsys, tmp_path)
    assert code == 3 and "downloaded by pip, which is missing here (python -m ensurepip)" in line


def test_a_disk_that_fills_ends_with_5_and_leaves_nothing(toy, tmp_path, capsys, monkeypatch):
    def full(packages, out):
        (out / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device", str(out / "half"))

    monkeypatch.setattr(fetch, "CONVERTERS", {"weat": full})
    argv = ["--name", "weat", "--to", str(tmp_path / "cache"), "--packages", str(toy)]
    code, line = ended(argv, capsys, tmp_path)
    assert code == 5 and "no space left in" in line and "for weat" in line
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("damage", "message"), [("cut", "was cut short or has changed"), ("flip", "has changed: its SHA")]
)
def test_a_changed_package_ends_with_3(damage, message, toy, tmp_path, capsys):
    (file,) = toy.iterdir()
    data = file.read_bytes()
    file.write_bytes(data[:-5] if damage == "cut" else data[:40] + bytes([data[40] ^ 1]) + data[41:])
    argv = ["--name", "weat", "--to", str(tmp_path / "cache"), "--packages", str(toy)]
    code, line = ended(argv, capsys, tmp_path)
    assert code == 3 and file.name in line and message in line
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_ends_with_3(toy, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    argv = ["--name", "weat", "--to", str(tmp_path / "file" / "cache"), "--packages", str(toy)]
    code, line = ended(argv, capsys, tmp_path)
    assert code == 3 and "give another folder with --to" in line
