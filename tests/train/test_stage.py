"""The numbers that every stage has, and its run: refusals, shares of hosts, and the same state after a resume."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.checkpoint import read
from fm_jax.core import sharding
from fm_jax.core.errors import CheckpointError, ConfigError, DataError
from fm_jax.core.mesh import MeshConfig
from fm_jax.core.types import Loss
from fm_jax.data.stream import loader
from fm_jax.models.language import decoder
from fm_jax.optim import optimizer as optimizers
from fm_jax.train import log, loop, stage, step
from tests.close import close


class Rows:
    """Ten rows, each its own number."""

    name, fingerprint, limits = "ten", "ten", dict[str, int]()

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"x": np.array([index], np.float32), "weights": np.array(1, np.float32)}


PLAN = stage.Plan(
    fit=loop.FitConfig(6, log_every=1, save_every=2, eval_every=3),
    learning_rate=0.1,
    batch_size=8,
    warmup=0.5,
    optimizer=optimizers.Config(name="sgd", momentum=0.0, weight_decay=0.0, clip_norm=None),
    mesh=MeshConfig(data=1),
)


MODEL = decoder.Decoder(decoder.tiny())  # what the checkpoints say; the loss is of one number


def loss(params: Any, batch: Any, rng: Any, step: Any) -> Loss:
    error = jnp.square(params["w"] - batch["x"][:, 0]) * batch["weights"]
    return Loss(error.sum(), batch["weights"].sum(), {"error": (error.sum(), batch["weights"].sum())})


def single() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), ("data", "fsdp", "sequence", "tensor"))


def begin() -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    return {"w": jnp.zeros(())}, {}


def trainer(cfg: stage.Plan = PLAN, **more: Any) -> stage.Trainer:
    return stage.make_trainer(cfg, loss, stage.rates(cfg, "linear"), begin, **more)


def train(workdir: Path, cfg: stage.Plan = PLAN, ema_decay: float | None = None, **more: Any) -> Any:
    given = {"make_params": begin, "trainer": trainer(cfg, ema_decay=ema_decay)} | more
    batches = stage.batches(cfg, Rows())
    return stage.train(cfg, workdir, batches=batches, mesh=single(), model=MODEL, meta={"config": {}}, **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"accumulate": 3}, "batch_size 8 must be a multiple of accumulate 3"),
        ({"learning_rate": -1.0}, r"^learning_rate must be at least 0, not -1\.0"),
        ({"warmup": 1.0}, r"warmup is a share .* not 1\.0"),
    ],
)
def test_numbers_that_no_stage_can_have_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(PLAN, **changes)


def test_a_batch_that_does_not_divide_over_the_mesh_is_refused() -> None:
    assert stage.open_mesh(replace(PLAN, mesh=MeshConfig(data=4, fsdp=2))).size == 8
    with pytest.raises(ConfigError, match="batch_size 8 / accumulate 2 does not divide over 8 shards"):
        stage.open_mesh(replace(PLAN, mesh=MeshConfig(data=4, fsdp=2), accumulate=2))


def test_the_schedule_spans_the_run() -> None:
    found = stage.rates(PLAN, "linear", final_ratio=0.25)
    assert (found.kind, found.peak, found.num_steps, found.warmup_steps, found.final_ratio) == (
        "linear",
        0.1,
        6,
        3,
        0.25,
    )


def test_a_split_is_seen_once_with_weight_0_where_the_last_batch_is_filled_up() -> None:
    mesh = stage.open_mesh(replace(PLAN, mesh=MeshConfig(data=4, fsdp=2)))
    seen = list(stage.one_pass(PLAN, Rows(), mesh))
    assert [int(batch["weights"].sum()) for batch in seen] == [8, 2]
    parts = stage.one_pass(replace(PLAN, accumulate=2), Rows(), single())
    assert [int(batch["weights"].sum()) for batch in parts] == [4, 4, 2]  # as much at once as in training
    kept = np.concatenate([np.asarray(batch["x"])[np.asarray(batch["weights"]) > 0, 0] for batch in seen])
    np.testing.assert_array_equal(kept, np.arange(10))


def test_the_numbers_of_a_stage_reach_its_batches_and_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ten = Rows()
    cfg = replace(PLAN, seed=3, accumulate=2, workers=1)
    assert stage.batches(cfg, ten, repeats=2) == loader.Batches(ten, 8, seed=3, workers=1, repeats=2)
    asked: dict[str, Any] = {}

    def make(*args: Any, **options: Any) -> Any:
        asked.update(options)
        return step.make_train_step(*args, **options)

    monkeypatch.setattr(stage, "make_train_step", make)
    train(tmp_path, replace(cfg, workers=0), ema_decay=0.5)
    assert (asked["accumulate"], asked["ema_decay"]) == (2, 0.5)
    assert jax.random.key_data(asked["key"]).tolist() == jax.random.key_data(jax.random.key(3)).tolist()


def test_a_run_that_was_cut_off_ends_where_it_would_have(tmp_path: Path) -> None:
    seen: list[int] = []

    def validate(step: int, now: Any) -> dict[str, float]:
        seen.append(step)
        return {"w": float(now.params["w"])}

    whole = train(tmp_path / "whole", validate=validate, metric="w", ema_decay=0.5)
    assert seen == [3, 6] and float(whole.params["w"]) > 0.1
    assert [row["step"] for row in log.read(tmp_path / "whole" / "metrics.jsonl") if "validation/w" in row] == seen
    assert read.best(tmp_path / "whole" / "checkpoints")
    assert [row["step"] for row in log.read(tmp_path / "whole" / "metrics.jsonl") if "train/error" in row] == [
        *range(1, 7)
    ]
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "6")
    again = train(tmp_path / "whole", validate=validate, metric="w", ema_decay=0.5)
    assert seen == [3, 6, 6]
    np.testing.assert_array_equal(again.params["w"], whole.params["w"])
    np.testing.assert_array_equal(again.ema["w"], whole.ema["w"])
    assert float(whole.ema["w"]) != float(whole.params["w"])


def test_a_run_whose_checkpoints_are_gone_does_not_train_anew(tmp_path: Path) -> None:
    train(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"the run has begun .* or start anew with another --workdir"):
        train(tmp_path, trainer=None)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before and not (tmp_path / "checkpoints").exists()


def test_a_run_that_goes_on_makes_no_parameters(tmp_path: Path) -> None:
    """They would be read from a hub, or drawn, only to be dropped; with a layout their shapes are enough."""
    whole = train(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    made: list[str] = []

    def counted() -> Any:
        made.append("traced" if isinstance(jnp.zeros(()) + 0, jax.core.Tracer) else "made")
        return begin()

    layout = {"w": jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(single()))}
    again = train(tmp_path, make_params=counted, layout=layout)
    assert made == ["traced"]
    np.testing.assert_array_equal(again.params["w"], whole.params["w"])


def test_a_fit_of_seconds_leaves_nothing_and_shares_what_is_compiled(tmp_path: Path) -> None:
    compiled = 0

    def counted(*args: Any) -> Loss:
        nonlocal compiled
        compiled += 1
        return loss(*args)

    shared = stage.make_trainer(PLAN, counted, stage.rates(PLAN, "linear"), begin)
    quiet = {"trainer": shared, "store": False, "writer": log.Tee([])}
    first = train(tmp_path / "none", **quiet)
    again = train(tmp_path / "none", make_params=lambda: ({"w": jnp.ones(())}, {}), **quiet)
    assert not (tmp_path / "none").exists() and compiled == 1
    assert int(again.step) == int(first.step) == 6 and float(again.params["w"]) != float(first.params["w"])
    assert float(first.params["w"]) == float(train(tmp_path / "kept").params["w"])


def test_trained_and_frozen_leaves_combine_as_the_stage_says(tmp_path: Path) -> None:
    parts = lambda: ({"delta": jnp.zeros(())}, {"w": jnp.zeros(())})  # noqa: E731
    combine = lambda trained, frozen: {"w": frozen["w"] + trained["delta"]}  # noqa: E731
    moved = stage.make_trainer(PLAN, loss, stage.rates(PLAN, "linear"), parts, combine=combine)
    done = train(tmp_path / "parts", trainer=moved, make_params=parts)
    close(done.params["delta"], train(tmp_path / "whole").params["w"])
    assert float(done.frozen["w"]) == 0


def test_few_rows_make_a_small_batch_in_whole_shares_of_the_mesh() -> None:
    wide = replace(PLAN, mesh=MeshConfig(data=4, fsdp=2), batch_size=64, accumulate=2)
    mesh = stage.open_mesh(wide)
    assert [stage.at_most(wide, rows, mesh).batch_size for rows in (100, 64, 63, 40, 16)] == [64, 64, 48, 32, 16]
    assert stage.at_most(PLAN, 5, single()).batch_size == 5
    with pytest.raises(DataError, match="15 rows are fewer than one for each of 16 shards and parts"):
        stage.at_most(wide, 15, mesh)


def test_an_evaluation_may_take_more_rows_at_once() -> None:
    mesh = stage.open_mesh(replace(PLAN, mesh=MeshConfig(data=4, fsdp=2)))
    sizes = {rows: [len(batch["x"]) for batch in stage.one_pass(PLAN, Rows(), mesh, rows=rows)] for rows in (1, 8, 17)}
    assert sizes == {1: [8, 8], 8: [8, 8], 17: [16]}


def test_passes_are_rounded_once_over_the_whole_run() -> None:
    plan = stage.epochs(1000, 1_268_355, 4096)
    assert (plan.num_steps, plan.eval_every, plan.save_every) == (309_656, 15_482, 3_096)
