"""A small training run of the house's own parts, to be killed, stopped, poisoned and resumed by tests.

`python -m tests.train.trainee WORKDIR NUM_STEPS [--mesh.KEY N] [--poison STEP,STEP] [--crawl SECONDS] [--save-every N]
[--stalls STEP] [--evaluates STEPS] [--batches N]`
prints "loss STEP HEX" a step, "digest HEX" of the final state, and exits with the error's code otherwise.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from fm_jax.checkpoint.store import Store
from fm_jax.core import distributed
from fm_jax.core.errors import FmError
from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.models.language import decoder
from fm_jax.objectives.language import next_token
from fm_jax.optim import optimizer, schedule
from fm_jax.train import loop, state
from fm_jax.train.hooks import Hook
from fm_jax.train.signals import interruptible
from fm_jax.train.state import TrainState
from fm_jax.train.step import make_train_step

ROWS, TIME = 8, 16
METRIC = "validation/nll"


@dataclass(frozen=True)
class Made:
    """Batches drawn from (seed, step), some of them poisoned with a weight of NaN."""

    poison: tuple[int, ...] = ()
    crawl: float = 0.0
    stalls: int = -1  # the batch that never comes

    def state(self, next_batch: int) -> dict[str, int]:
        """Return what a checkpoint keeps."""
        return {"next_batch": next_batch}

    def resume(self, state: dict[str, int]) -> int:
        """Return the number of the next batch."""
        return state["next_batch"]

    def iterate(self, start: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield this process's rows of each global batch."""
        mine = slice(jax.process_index(), None, jax.process_count())
        step = start
        while True:
            if step == self.stalls:
                print("waits", flush=True)
                time.sleep(300)
            rng = np.random.default_rng((7, step))
            tokens = rng.integers(0, 96, (ROWS, TIME + 1), dtype=np.int32)
            weights = np.ones((ROWS, TIME), np.float32)
            weights[0, rng.integers(1, TIME) :] = 0.0
            if step in self.poison:
                weights[1, 3] = np.nan
            batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
            yield {name: field[mine] for name, field in batch.items()}
            time.sleep(self.crawl)
            step += 1


class Print:
    """A writer that prints each loss exactly."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the loss as a hexadecimal float."""
        if "train/loss" in metrics:
            print("loss", step, float(metrics["train/loss"]).hex(), flush=True)

    def close(self) -> None:
        """Do nothing."""


def evaluation(batches: int) -> Callable[[int, TrainState], dict[str, float]]:
    """Return an evaluation of half a second a batch."""

    def evaluate(step: int, state: TrainState) -> dict[str, float]:
        print("evaluates", flush=True)
        for _ in interruptible(iter(range(batches))):
            time.sleep(0.5)
        return {METRIC: float(step)}

    return evaluate


def train(workdir: Path, cfg: loop.FitConfig, mesh_cfg: MeshConfig, batches: Made, hooks: Sequence[Hook] = ()) -> str:
    """Run (or go on with) the training and return a digest of the final state."""
    mesh, model = make_mesh(mesh_cfg), decoder.Decoder(decoder.tiny())
    inputs = (np.zeros((ROWS, TIME), np.int32),)
    plan = schedule.make(schedule.Config(peak=1e-2, num_steps=100, warmup_steps=2))
    key = jax.random.key(3)

    def make_params() -> tuple[dict, dict]:
        return state.init_params(model, inputs, key, mesh), {}

    tx = optimizer.make(optimizer.Config(), plan, jax.eval_shape(make_params)[0])
    store = Store(workdir / "checkpoints", keep_last=2, metric=METRIC, meta={"config": {}})

    def create(params: dict, frozen: dict) -> state.TrainState:
        return state.create(params, tx, frozen=frozen, ema=True)

    layout = state.layout(model, inputs, mesh)
    begun = loop.begin(create, make_params, mesh, store=store, batches=batches, layout=layout)
    step = make_train_step(next_token(model.apply), tx, key=key, ema_decay=0.9)
    print("start", int(begun.step), flush=True)
    done = loop.fit(cfg, step, begun, batches, mesh=mesh, store=store, writer=Print(), hooks=hooks)
    store.close()
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(done):
        whole = jax.jit(lambda x: x, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))(leaf)
        digest.update(np.asarray(whole.addressable_data(0)).tobytes())
    return digest.hexdigest()


def main() -> None:
    """Read the arguments, train, print the digest."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--poison", default="")
    parser.add_argument("--crawl", type=float, default=0.0)
    parser.add_argument("--save-every", type=int, default=1)
    parser.add_argument("--stalls", type=int, default=-1)
    parser.add_argument("--evaluates", type=int, default=0)
    parser.add_argument("--batches", type=int, default=600)
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--max-skipped", type=int, default=3)
    args = parser.parse_args()
    distributed.start()
    poison = tuple(int(step) for step in args.poison.split(",") if step)
    cfg = loop.FitConfig(args.steps, log_every=1, save_every=args.save_every, max_skipped=args.max_skipped)
    batches = Made(poison, args.crawl, args.stalls)
    hooks = [Hook(evaluation(args.batches), args.evaluates)] if args.evaluates else []
    try:
        print("digest", train(args.workdir, cfg, MeshConfig(fsdp=args.fsdp), batches, hooks), flush=True)
    except FmError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.code)


if __name__ == "__main__":
    main()
