"""Wrong commands end in one line and a status before anything is compiled, and leave what was there as it was."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import pytest

from experiments import lm_finetune, lm_pretrain
from fm_jax import run

COMPILED: list[str] = []  # one entry for each program that XLA was given
WORDS = "the quick brown fox jumps over the lazy dog and says nothing of it to anyone at all\n"


@pytest.fixture(scope="module", autouse=True)
def watch_the_compiler() -> None:
    """Count compilations, and prove that the count moves."""
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
    )
    jax.jit(lambda x: x * 3.25 + 1)(2.0)
    assert COMPILED


def corpus(folder: Path, text: str) -> Path:
    for split in ("train", "validation", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        (folder / split / "one.txt").write_text(text)
    return folder


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def another_experiment(folder: Path) -> None:
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"experiment": "experiments.other", "config": {}}))


def foreign(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")


def nothing(folder: Path) -> None:
    del folder


def a_file(folder: Path) -> None:
    folder.write_text("not a directory")


CASES: dict[str, tuple[tuple[str, ...], int, str, Callable[[Path], None]]] = {
    "misspelt": (("--batch_sise", "8"), 2, r"unknown option --batch_sise; did you mean --batch_size", nothing),
    "misspelt inside": (("--model.nun_layers", "8"), 2, r"did you mean --model.num_layers", nothing),
    "ill-typed": (("--batch_size", "many"), 2, r"batch_size", nothing),
    "bad choice": (("--schedule", "cosinus"), 2, r"schedule", nothing),
    "preset": (("--config", "gpt2_smal"), 2, r"did you mean gpt2_small", nothing),
    "mesh": (("--mesh.fsdp", "3"), 2, r"8 devices do not divide by 3", nothing),
    "two free axes": (("--mesh.fsdp", "-1"), 2, r"only one mesh axis may be -1", nothing),
    "batch": (("--batch_size", "12"), 2, r"batch_size 12 .* does not divide over 8", nothing),
    "heads": (("--model.attention.num_kv_heads", "3"), 2, r"must be a multiple of num_kv_heads 3", nothing),
    "another experiment": ((), 2, r"experiments\.other", another_experiment),
    "foreign directory": ((), 2, r"workdir|work directory", foreign),
    "a file": ((), 2, r"", a_file),
    "corpus missing": (("--data.kind", "text", "--data.path", "nowhere"), 3, r"nowhere", nothing),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_commands(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, code, message, prepare = CASES[name]
    workdir = tmp_path / "work"
    prepare(workdir)
    before = digest(tmp_path)
    refuse(lm_pretrain.run, lm_pretrain.CONFIGS, workdir, options, code, message, capsys)
    if prepare is not nothing:
        assert digest(tmp_path) == before


@pytest.mark.parametrize(("text", "message"), [("", r"empty"), (WORDS, r"lower vocab_size or add text")])
def test_a_corpus_that_is_too_small(
    text: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--data.kind", "text", "--data.path", str(corpus(tmp_path / "texts", text)))
    refuse(lm_pretrain.run, lm_pretrain.CONFIGS, tmp_path / "work", options, 3, message, capsys)


def test_finetuning_from_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configs = {"debug": lm_finetune.debug}
    options = ("--pretrained", str(tmp_path / "nowhere"))
    refuse(lm_finetune.run, configs, tmp_path / "work", options, 4, r"nowhere", capsys)


def refuse(
    experiment: Callable[[Any, Path], Any],
    configs: Mapping[str, Callable[[], Any]],
    workdir: Path,
    options: tuple[str, ...],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run the command and check its status, its one line, and that nothing was compiled."""
    before = len(COMPILED)
    argv = ["--workdir", str(workdir), *(() if "--config" in options else ("--config", "debug")), *options]
    with pytest.raises(SystemExit) as stop:
        run.main(experiment, configs, argv=argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == code, lines
    errors = [line for line in lines if ": error: " in line]
    assert len(errors) == 1 and len(errors[0]) <= 400
    assert re.search(message, errors[0]), errors[0]
    assert not any("Traceback" in line for line in lines)
    assert COMPILED[before:] == []
