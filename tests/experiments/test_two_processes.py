"""Experiments as two processes over loopback: each reads its share of every batch, and the losses are those of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fm_jax.train import log
from tests.close import close

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
EXPERIMENTS = ("language.lm_pretrain", "language.text_classify", "language.bert_squad", "vision.resnet_imagenet")
FLAGS = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"


def begin(name: str, workdir: Path, options: tuple[str, ...], **more: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", f"experiments.{name}", "--config", "debug", "--workdir", str(workdir), *options]
    env = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", **more}
    return subprocess.Popen(line, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def alone(name: str, workdir: Path, *options: str) -> None:
    process = begin(name, workdir, options)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said


def together(name: str, workdir: Path, *options: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    given = {"FM_COORDINATOR_ADDRESS": address, "FM_NUM_PROCESSES": "2"}
    pair = [begin(name, workdir, options, **given, FM_PROCESS_ID=str(index)) for index in range(2)]
    try:
        said = [process.communicate(timeout=600)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], said


def losses(workdir: Path) -> dict[str, float]:
    """Return {"STEP NAME": value} of all losses, accuracies and gradients' norms."""
    rows = log.read(workdir / "metrics.jsonl")
    return {
        f"{row['step']} {name}": value
        for row in rows
        for name, value in row.items()
        if name.startswith(("train/", "validation/"))
    }


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("lm_pretrain")
    alone("language.lm_pretrain", workdir)
    return workdir


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_two_processes_share_the_work_of_one(name: str, language_model: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    options = ("--data_dir", str(tmp_path / "data"))
    if name == "language.text_classify":
        options = ("--init.from", str(language_model), "--fit.log_every", "1", *options)
    if name == "language.lm_pretrain":
        one = language_model
    else:
        alone(name, one, *options)
    together(name, two, *options)
    wanted, found = losses(one), losses(two)
    assert found.keys() == wanted.keys() and len(wanted) >= 4
    close(found, wanted, 1e-4, scale=1.0)  # nats, shares and norms of order 1
    results = [json.loads((workdir / "results.json").read_text()) for workdir in (one, two)]
    assert results[0].keys() == results[1].keys()
