"""Plans of whole experiments: the estimate without a chip's compiler, and the chips' own compilers where they are."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.language import bert_pretrain, generate, lm_pretrain, t5_translate
from experiments.vision import linear_probe, mae_pretrain
from fm_jax import cli
from fm_jax.core.errors import ConfigError
from fm_jax.train.plan import target

MISSING = {"v5e": "libtpu", "h200": "jax_plugins"}


def plan(workdir: Path, *argv: str, module: object = lm_pretrain) -> tuple[int, dict]:
    """Return the exit status of a plan's command line, and its plan.json."""
    code = 0
    try:
        configs = getattr(module, "CONFIGS", None) or {"debug": getattr(module, "debug", module.config)}
        cli.main(module.run, configs, argv=["--config", "debug", "--workdir", str(workdir), *argv])
    except SystemExit as left:
        code = int(left.code or 0)
    file = workdir / "plan.json"
    return code, json.loads(file.read_text()) if file.exists() else {}


@pytest.fixture
def without_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    hidden = (*MISSING.values(), "jax_plugins.xla_cuda12")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else find(name))


def test_without_the_compiler_a_plan_is_an_estimate(without_wheels: None, tmp_path: Path, capsys) -> None:
    code, said = plan(tmp_path, "--plan", "v5e:2x4", "--mesh.data", "1", "--mesh.fsdp", "8")
    out = capsys.readouterr().out
    assert code == 0
    assert "ESTIMATE" in out
    assert "-m pip install 'jax[tpu]==" in out
    assert said["estimate"]
    assert said["fits"]
    assert said["chips"] == 8
    assert said["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1, "sequence": 1}
    assert said["batch"]["tokens"] == [8, 32]
    assert said["memory"]["optimizer"] >= 2 * said["memory"]["weights"]  # Adam's two moments, sharded as the weights
    assert said["memory"]["weights"] < 4 * said["parameters"] / 4
    gathers = [row for row in said["collectives"] if row["kind"] == "all-gather"]
    assert [row["axes"] for row in gathers] == [["fsdp"]]
    assert 0.5 < sum(said["flops"].values()) / said["model_flops"] < 2
    assert not [path.name for path in tmp_path.iterdir() if path.name != "plan.json"]  # nothing ran


def test_what_trains_nothing_is_refused_before_any_work(tmp_path: Path, capsys) -> None:
    code, _ = plan(tmp_path / "run", "--plan", "v5e:2x4", module=generate)
    assert code == ConfigError.code
    assert "generate: error: --plan: this experiment trains nothing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_trains_many_networks_is_refused_before_any_work(tmp_path: Path) -> None:
    command = [sys.executable, "-m", linear_probe.__name__, "--workdir", str(tmp_path / "run"), "--plan", "v5e:2x4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == ConfigError.code
    assert done.stderr.splitlines()[-1].startswith("linear_probe: error: --plan: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("module", [bert_pretrain, t5_translate])
def test_rows_of_pairs_are_planned(module: object, without_wheels: None, tmp_path: Path) -> None:
    code, said = plan(tmp_path, "--plan", "v5e:2x4", "--batch_size", "16", module=module)
    assert code == 0
    assert {shape[0] for shape in said["batch"].values()} == {16}


@pytest.mark.slow
@pytest.mark.parametrize(("usable", "possible"), [(2_000_000.0, True), (600_000.0, False)])
def test_what_does_not_fit_names_the_nearest_setting_that_does(
    usable: float,
    possible: bool,
    without_wheels: None,
    tmp_path: Path,
    capsys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With 3.3 MB of 8 rows at once, half of it is enough for smaller microbatches, and a fifth for nothing."""
    monkeypatch.setattr(target.Target, "usable", usable)
    code, said = plan(tmp_path, "--plan", "v5e:1x1", "--batch_size", "8")
    assert code == 5
    assert not said["fits"]
    error = capsys.readouterr().err
    assert "does not fit in the memory of a chip" in error
    if possible:
        assert int(said["nearest"]["options"]["accumulate"]) > 1
        assert said["nearest"]["memory"]["peak"] <= usable
        assert "the nearest setting that fits: --accumulate " in error
    else:
        assert said["nearest"] is None
        assert "no setting tried fits" in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--plan", "v9:8"), "is not CHIP:TOPOLOGY"),
        (("--plan", "v5e:8"), "a topology of v5e is ROWSxCOLUMNS, such as 2x4, not 8"),
        (("--plan", "v5e:2x4", "--mesh.data", "1", "--mesh.tensor", "3"), "does not match the 8 available devices"),
        (("--plan", "v5e:2x4", "--batch_size", "6"), "does not divide over 8 shards"),
    ],
)
def test_a_wrong_mesh_is_one_clear_error(without_wheels: None, tmp_path: Path, capsys, argv, message) -> None:
    code, said = plan(tmp_path, *argv)
    assert code == ConfigError.code
    assert not said
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.compilers
@pytest.mark.parametrize("chips", ["v5e:2x4", "h200:8"])
@pytest.mark.parametrize("module", [lm_pretrain, mae_pretrain])
def test_the_chips_own_compiler_accepts_the_step(module: object, chips: str, tmp_path: Path) -> None:
    needed = MISSING[chips.partition(":")[0]]
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    fsdp = ("--mesh.data", "1", "--mesh.fsdp", "8", "--batch_size", "8")
    code, said = plan(tmp_path, "--plan", chips, *fsdp, module=module)
    assert code == 0
    assert not said["estimate"]
    assert said["fits"]
    assert {tuple(row["axes"]) for row in said["collectives"]} == {("fsdp",)}
