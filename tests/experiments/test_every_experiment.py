"""Every experiment: its `debug()` runs, its numbers are finite, and a run taken up again ends with the same ones.

Adding an experiment is one line here.
"""

import importlib.util
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import lm_finetune, lm_pretrain, quickstart
from fm_jax.checkpoint.store import load_params

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("pretrained")
    lm_pretrain.run(lm_pretrain.debug(), workdir)
    return workdir


def configs(pretrained: Path) -> dict[str, tuple[Any, Any, str]]:
    """Name -> (module, config, folder of its checkpoints); "" where it keeps none of its own."""
    finetune = replace(lm_finetune.debug(), pretrained=pretrained)
    return {
        "lm_pretrain": (lm_pretrain, lm_pretrain.debug(), "checkpoints"),
        "lm_finetune": (lm_finetune, finetune, "checkpoints"),
        "quickstart": (quickstart, quickstart.debug(), "pretrain/checkpoints"),
    }


NAMES = ("lm_pretrain", "lm_finetune", "quickstart")


def numbers(found: Any) -> Iterator[float]:
    if isinstance(found, dict):
        for part in found.values():
            yield from numbers(part)
    elif isinstance(found, list | tuple):
        for part in found:
            yield from numbers(part)
    elif isinstance(found, int | float):
        yield float(found)


def test_the_list_is_complete() -> None:
    stems = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"__init__"}
    assert stems == set(NAMES)
    for stem in stems:
        spec = importlib.util.find_spec(f"experiments.{stem}")
        assert spec is not None and spec.origin is not None


@pytest.mark.parametrize("name", NAMES)
def test_debug_runs_and_resumes_to_the_same_numbers(name: str, pretrained: Path, tmp_path: Path) -> None:
    module, cfg, checkpoints = configs(pretrained)[name]
    measured = module.run(cfg, tmp_path)
    assert all(map(math.isfinite, numbers(measured)))
    assert json.loads((tmp_path / "results.json").read_text())
    before = load_params(tmp_path / checkpoints, "last")

    (tmp_path / "results.json").unlink()
    newest = max((tmp_path / checkpoints).glob("[0-9]*"), key=lambda folder: int(folder.name))
    shutil.rmtree(newest)  # the run was cut off before its last save
    module.run(cfg, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, before, load_params(tmp_path / checkpoints, "last"))


def test_quickstart_run_again_says_that_it_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text('{"pretrain": {"bits_per_byte": 2.0}}')
    assert quickstart.run(quickstart.debug(), tmp_path) == {"pretrain": {"bits_per_byte": 2.0}}
    assert "already done" in capsys.readouterr().out


@pytest.mark.parametrize("way", lm_finetune.WAYS)
def test_every_way_trains_what_it_says(way: lm_finetune.Way, pretrained: Path, tmp_path: Path) -> None:
    base = lm_finetune.debug()
    cfg = replace(base, pretrained=pretrained, way=way, recipe=replace(base.recipe, frozen_layers=1))
    measured = lm_finetune.run(cfg, tmp_path)
    before = load_params(pretrained / "checkpoints", "best")
    whole = sum(leaf.size for leaf in jax.tree.leaves(before))
    head = (32 + 1) * 10
    layer = sum(leaf[0].size for leaf in jax.tree.leaves(before["blocks"]))
    pair = 2 * 2 * 2 * (32 * 8)  # layers, q and v, A and B
    tables = sum(leaf.size for leaf in jax.tree.leaves(before["embed"]))
    wanted = {
        "scratch": whole + head,
        "full": whole + head,
        "probe": head,
        "lora": pair + head,
        "frozen": whole - tables - layer + head,
    }
    assert measured["trained_parameters"] == wanted[way]
    assert (tmp_path / "adapter.safetensors").exists() == (way == "lora")
