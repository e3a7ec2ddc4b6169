"""Every experiment: its `debug()` runs, its numbers are finite, and a run taken up again ends with the same ones.

Adding an experiment is one line here.
"""

import importlib.util
import json
import math
import runpy
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import fetch, quickstart
from experiments.benchmarks import (
    checkpoint,
    data,
    decode,
    detectors,
    growth,
    hub_load,
    image_pipeline,
    precision,
    startup,
    train_step,
)
from experiments.hub import hub_convert, hub_verify
from experiments.language import (
    bert_pretrain,
    bert_squad,
    few_labels,
    generate,
    harness,
    lm_pretrain,
    t5_pretrain,
    t5_translate,
    text_classify,
)
from experiments.vision import (
    detect,
    efficientnet_imagenet,
    faster_rcnn_coco,
    linear_probe,
    mae_pretrain,
    resnet_imagenet,
    simclr_pretrain,
    vit_finetune,
    vit_imagenet,
    yolov3_coco,
    yolox_coco,
)
from fm_jax import cli
from fm_jax.checkpoint.store import load_params
from fm_jax.core.config import changes
from fm_jax.core.errors import ConfigError
from fm_jax.data.packages.sources import SOURCES
from fm_jax.evals.report import boxes as pictures
from fm_jax.tasks.init import Init
from fm_jax.tasks.text_classifier import METHODS, Method
from fm_jax.train.plan import target

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("pretrained")
    lm_pretrain.run(lm_pretrain.debug(), workdir)
    simclr_pretrain.run(simclr_pretrain.debug(), workdir / "images")
    mae_pretrain.run(mae_pretrain.debug(), workdir / "masked")
    yolox_coco.run(yolox_coco.debug(), workdir / "boxes")
    pictures.save(workdir / "photos" / "grey.png", np.full((48, 64, 3), 128, np.uint8))
    return workdir


def configs(pretrained: Path) -> dict[str, tuple[Any, Any, str]]:
    """Name -> (module, config, folder of its checkpoints); "" where it keeps none of its own."""
    return {
        "lm_pretrain": (lm_pretrain, lm_pretrain.debug(), "checkpoints"),
        "text_classify": (text_classify, replace(text_classify.debug(), init=Init(pretrained)), "checkpoints"),
        "few_labels": (few_labels, replace(few_labels.debug(), init=Init(pretrained)), ""),
        "harness": (harness, replace(harness.debug(), model=pretrained), ""),
        "generate": (generate, replace(generate.debug(), init=Init(pretrained)), ""),
        "quickstart": (quickstart, quickstart.debug(), "pretrain/checkpoints"),
        "t5_translate": (t5_translate, t5_translate.debug(), "checkpoints"),
        "bert_squad": (bert_squad, bert_squad.debug(), "checkpoints"),
        "bert_pretrain": (bert_pretrain, bert_pretrain.debug(), "checkpoints"),
        "t5_pretrain": (t5_pretrain, t5_pretrain.debug(), "checkpoints"),
        "simclr_pretrain": (simclr_pretrain, simclr_pretrain.debug(), "checkpoints"),
        "linear_probe": (linear_probe, replace(linear_probe.debug(), models=(pretrained / "images",)), ""),
        "resnet_imagenet": (
            resnet_imagenet,
            replace(resnet_imagenet.debug(), init=Init(pretrained / "images")),
            "checkpoints",
        ),
        "efficientnet_imagenet": (efficientnet_imagenet, efficientnet_imagenet.debug(), "checkpoints"),
        "vit_imagenet": (vit_imagenet, vit_imagenet.debug(), "checkpoints"),
        "mae_pretrain": (mae_pretrain, mae_pretrain.debug(), "checkpoints"),
        "vit_finetune": (
            vit_finetune,
            replace(vit_finetune.debug(), init=Init(pretrained / "masked")),
            "checkpoints",
        ),
        "yolox_coco": (yolox_coco, replace(yolox_coco.debug(), baselines=True), "checkpoints"),
        "yolov3_coco": (yolov3_coco, yolov3_coco.debug(), "checkpoints"),
        "faster_rcnn_coco": (faster_rcnn_coco, faster_rcnn_coco.debug(), "checkpoints"),
        "detect": (
            detect,
            replace(detect.debug(), init=Init(pretrained / "boxes"), images=pretrained / "photos"),
            "",
        ),
    }


NAMES = (
    "lm_pretrain",
    "text_classify",
    "few_labels",
    "harness",
    "generate",
    "quickstart",
    "t5_translate",
    "bert_squad",
    "bert_pretrain",
    "t5_pretrain",
    "simclr_pretrain",
    "linear_probe",
    "resnet_imagenet",
    "efficientnet_imagenet",
    "vit_imagenet",
    "mae_pretrain",
    "vit_finetune",
    "yolox_coco",
    "yolov3_coco",
    "faster_rcnn_coco",
    "detect",
)


# these keep no checkpoints: they convert, fetch or measure time
PAIRS = {
    "train_step": train_step,
    "decode": decode,
    "detectors": detectors,
    "startup": startup,
    "checkpoint": checkpoint,
    "precision": precision,
    "data": data,
    "growth": growth,
}
ONCE = ("fetch", "hub_convert", "hub_verify", "hub_load", "image_pipeline", *PAIRS)
UNPLANNED = {"harness", "generate", "detect", "linear_probe", *ONCE}  # nothing, or many networks at once, to train


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
    files = [path for path in (ROOT / "experiments").rglob("*.py") if not path.stem.startswith("_")]
    # a name is used once, in whichever folder: it is that of runs/NAME, and launch.sh finds what moved by it
    assert sorted(path.stem for path in files) == sorted([*NAMES, *ONCE])
    for path in files:
        spec = importlib.util.find_spec(".".join(path.relative_to(ROOT).with_suffix("").parts))
        assert spec is not None and spec.origin == str(path)


@pytest.mark.parametrize("name", [*NAMES, *ONCE])
def test_the_first_preset_is_called_default(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    presets: list[str] = []
    monkeypatch.setattr(cli, "main", lambda _, configs, **__: presets.extend(configs))
    (path,) = (ROOT / "experiments").rglob(f"{name}.py")
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    monkeypatch.delitem(sys.modules, module, raising=False)
    runpy.run_module(module, run_name="__main__")
    assert presets[0] == "default" and presets[-1] == "debug"


@pytest.mark.parametrize("name", NAMES)
def test_debug_runs_and_resumes_to_the_same_numbers(name: str, pretrained: Path, tmp_path: Path) -> None:
    if name == "harness":
        pytest.importorskip("lm_eval", reason="experiments.language.harness needs lm_eval: pip install lm_eval")
    module, cfg, checkpoints = configs(pretrained)[name]
    measured = module.run(cfg, tmp_path)
    assert all(map(math.isfinite, numbers(measured)))
    assert json.loads((tmp_path / "results.json").read_text())
    if not checkpoints:
        assert module.run(cfg, tmp_path) == measured
        return
    before = load_params(tmp_path / checkpoints, "last")

    (tmp_path / "results.json").unlink()
    newest = max((tmp_path / checkpoints).glob("[0-9]*"), key=lambda folder: int(folder.name))
    shutil.rmtree(newest)  # the run was cut off before its last save
    module.run(cfg, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, before, load_params(tmp_path / checkpoints, "last"))


@pytest.mark.parametrize("name", [*NAMES, *ONCE])
def test_a_plan_compiles_the_first_training_and_what_has_none_refuses_it(
    name: str, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(target, "_described", lambda *_, **__: target._virtual(2))  # the estimate, in any environment
    argv = [name, "--config", "debug", "--plan", "v5e:1x2", "--workdir", str(tmp_path / "run")]
    if name in NAMES:
        module, cfg, _ = configs(pretrained)[name]
        argv += [part for key, (_, new) in changes(module.debug(), cfg).items() for part in (f"--{key}", new)]
    (path,) = (ROOT / "experiments").rglob(f"{name}.py")
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delitem(sys.modules, spelt := ".".join(path.relative_to(ROOT).with_suffix("").parts), raising=False)
    if name in UNPLANNED:
        with pytest.raises(SystemExit) as left:
            runpy.run_module(spelt, run_name="__main__")
        assert left.value.code == ConfigError.code
        assert capsys.readouterr().err.startswith(f"{name}: error: --plan: ")
        assert not (tmp_path / "run").exists()
        return
    runpy.run_module(spelt, run_name="__main__")
    said = json.loads((tmp_path / "run/plan.json").read_text())
    assert said["fits"] and 0 < said["trained"] <= said["parameters"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["plan.json"]  # nothing was trained


@pytest.mark.parametrize("name", ONCE)
def test_what_trains_nothing_runs_at_its_debug_size(name: str, pretrained: Path, tmp_path: Path) -> None:
    public = tmp_path / "public"
    convert = replace(hub_convert.debug(), source=pretrained, target=public)
    if name == "fetch":
        measured = fetch.run(replace(fetch.debug(), to=tmp_path / "cache"), tmp_path)
        assert measured == {"sets": len(SOURCES)} and not (tmp_path / "cache").exists()
    elif name == "hub_convert":
        measured = hub_convert.run(convert, tmp_path)
        assert measured["model"] == "GPT2LMHeadModel"
    elif name == "hub_verify":
        pytest.importorskip("torch", reason="experiments.hub.hub_verify needs torch: pip install torch")
        hub_convert.run(convert, tmp_path)
        measured = dict(hub_verify.run(replace(hub_verify.debug(), folder=str(public)), tmp_path))
        assert measured["first_wrong"] == ""
    elif name in PAIRS:
        file = tmp_path / "history.jsonl"
        measured = PAIRS[name].run(replace(PAIRS[name].debug(), history=file), tmp_path)
        row = measured["rows"][0]
        assert row["ratio"] > 0 and row["ours"] > 0
        assert row["against"] == {"precision": "default", "data": "gpt2 step", "growth": "base"}.get(name, "again")
        assert json.loads(file.read_text())["numbers"][f"{row['family']}/{row['against']}/ratio"] == row["ratio"]
    elif name == "image_pipeline":
        file = tmp_path / "history.jsonl"
        measured = image_pipeline.run(replace(image_pipeline.debug(), history=file), tmp_path)
        assert json.loads(file.read_text())["numbers"]["decode/0 workers"] == measured["rows"][0]["0"]
        assert not (tmp_path / "images").exists() and min(row["0"] for row in measured["rows"]) > 0
    else:
        file = tmp_path / "history.jsonl"
        measured = hub_load.run(replace(hub_load.debug(), history=file), tmp_path)
        median = json.loads(file.read_text())["numbers"]["float32/warm/ours/cpu_s"]
        assert median == measured["medians"][0]["cpu_s"]
        assert not (tmp_path / "model").exists()
    assert all(map(math.isfinite, numbers(measured)))
    assert json.loads((tmp_path / "results.json").read_text())


def test_quickstart_run_again_says_that_it_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text('{"pretrain": {"bits_per_byte": 2.0}}')
    assert quickstart.run(quickstart.debug(), tmp_path) == {"pretrain": {"bits_per_byte": 2.0}}
    assert "already done" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_what_it_says(method: Method, pretrained: Path, tmp_path: Path) -> None:
    cfg = replace(text_classify.debug(), init=Init(pretrained), method=method, frozen_layers=1)
    measured = text_classify.run(cfg, tmp_path)
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
    assert measured["trained_parameters"] == wanted[method]
    assert (tmp_path / "adapter.safetensors").exists() == (method == "lora")
