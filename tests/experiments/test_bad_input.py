"""Wrong commands end in one line and a status before anything is compiled, and leave what was there as it was."""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.language import harness, lm_pretrain, text_classify
from fm_jax import cli
from fm_jax.data.text import tokenizer
from fm_jax.hub import families, pretrained
from fm_jax.models.language import decoder

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
    (folder / "results.json").write_text("{}")


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
    "mesh": (("--mesh.fsdp", "3"), 2, r"8 devices are not divisible by 3", nothing),
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


def no_model(folder: Path) -> None:
    del folder


def pickled(folder: Path) -> None:
    saved_model(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def another_family(folder: Path) -> None:
    saved_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))


def without_tokenizer(folder: Path) -> None:
    saved_model(folder)
    (folder / "tokenizer.json").unlink()


def saved_model(folder: Path) -> None:
    """Write a tiny GPT-2 without computing anything."""
    module = decoder.Decoder(replace(decoder.tiny(), vocab_size=258))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), families.abstract(module))
    pretrained.save(folder, module, params, tokenizer.train([WORDS], 258))


FINETUNE: dict[str, tuple[tuple[str, ...], int, str, Callable[[Path], None]]] = {
    "no model": ((), 4, r"model does not exist; give a run", no_model),
    "pickled": ((), 4, r"pickle", pickled),
    "family": ((), 4, r"'mamba' is not supported", another_family),
    "tokenizer": ((), 4, r"has no tokenizer.json", without_tokenizer),
    "head": (("--head", "first"), 2, r"head first .*choose mean or last", saved_model),
    "no labels": (("--labels", "-1"), 2, r"labels must be at least 0 .*not -1", saved_model),
    "labels": (("--labels", "5"), 3, r"cannot draw 5 examples per class: bad has only 4", saved_model),
    "label": (("--data.label", "odd"), 3, r"test has the label 'rare', which no training text has", saved_model),
    "second text": (("--data.second", "other"), 3, r"no field 'other'", saved_model),
    "length": (("--length", "64"), 2, r"64 tokens exceed the model's max_length 32", saved_model),
    "lora": (("--method", "lora", "--lora.targets", "attn/z"), 2, r"'attn/z' matches no parameter", saved_model),
    "layers": (("--method", "frozen", "--frozen_layers", "3"), 2, r"between 0 and 2 .*not 3", saved_model),
    "export": (("--export", "model"), 4, r"model exists already", saved_model),
    "export head": (("--export", "new"), 4, r"transformers has no class for this model.*pool mean", saved_model),
}


@pytest.mark.parametrize("name", FINETUNE)
def test_wrong_finetuning(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, code, message, prepare = FINETUNE[name]
    prepare(tmp_path / "model")
    (tmp_path / "texts").mkdir()
    for split in ("train", "validation", "test"):
        labels = {"train": ("usual", "good"), "validation": ("usual", "bad"), "test": ("rare", "bad")}[split]
        rows = [{"text": "a dog", "label": kind, "odd": labels[0]} for kind in ("good", "bad") for _ in range(4)]
        (tmp_path / "texts" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    given = ("--init.from", "model", "--data.path", "texts", *(("--labels", "0") if "--labels" not in options else ()))
    refuse(text_classify.run, {"debug": text_classify.debug}, Path("work"), (*given, *options), code, message, capsys)


ASKED: dict[str, tuple[tuple[str, ...], int, str]] = {
    "no task": (("--tasks", ""), 2, r"tasks"),
    "limit": (("--limit", "-1"), 2, r"limit must be at least 0, not -1"),
    "rows": (("--batch_size", "0"), 2, r"batch_size must be at least 1, not 0"),
}


@pytest.mark.parametrize("name", ASKED)
def test_wrong_questions(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, code, message = ASKED[name]
    refuse(harness.run, {"debug": harness.debug}, tmp_path / "work", options, code, message, capsys)


def test_without_the_harness_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = r"the harness is not installed .*; install fm_jax\[harness\]"
    refuse(harness.run, {"debug": harness.debug}, tmp_path / "work", (), 2, message, capsys)


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
        cli.main(experiment, configs, argv=argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == code, lines
    errors = [line for line in lines if ": error: " in line]
    assert len(errors) == 1 and len(errors[0]) <= 400
    assert re.search(message, errors[0]), errors[0]
    assert not any("Traceback" in line for line in lines)
    assert COMPILED[before:] == []
