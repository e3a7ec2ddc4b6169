"""What this project does in a turn, as its own loop and commands do it, and the rate that bounds a training step."""

import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import _products
from experiments.benchmarks._families import FAMILIES
from experiments.benchmarks._sides import Prepared, resident_gb
from fm_jax.checkpoint.store import Store
from fm_jax.core import host_memory, sharding, statistics, tree
from fm_jax.core import mesh as meshes
from fm_jax.generate.decode import generate
from fm_jax.hub import pretrained
from fm_jax.optim import optimizer as optimizers
from fm_jax.train import state as states
from fm_jax.train.step import make_train_step

_PHASES = {  # end of an event's name in jax.monitoring -> its name here
    "jaxpr_trace_duration": "trace_s",
    "jaxpr_to_mlir_module_duration": "lower_s",
    "backend_compile_duration": "compile_s",
}


def train(
    folder: str, family: str, batch: str, *, learning_rate: float, cache: str | None = None, devices: int = 1
) -> Prepared:
    """Prepare a training step of a family: the loop's step, jitted with donation.

    Args:
        folder: the checkpoint.
        family: a name of FAMILIES.
        batch: file with the batch.
        learning_rate: of AdamW, with clipping at norm 1.
        cache: folder of compiled programs, None for none.
        devices: virtual ones, over which the batch is split.
    """
    _begin(cache)
    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)
    started = time.perf_counter()
    step, flops = _step(folder, family, batch, learning_rate=learning_rate, devices=devices)
    loss, norm = step()
    first = time.perf_counter() - started
    for _ in range(2):
        step()
    facts = {
        "loss": loss,
        "grad_norm": norm,
        "first_step_s": round(first, 2),
        "flops": flops(),
        "resident_gb": resident_gb(),
    }
    return facts, lambda: {"loss": step()[0]}


def first_step(
    folder: str, family: str, batch: str, *, learning_rate: float, cache: str, import_s: float
) -> dict[str, float]:
    """Take the first training step of a new process; return the seconds of its parts, `import_s` among them."""
    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in _PHASES.values()}

    def hear(event: str, duration_secs: float, **_: str | int) -> None:
        for end, name in _PHASES.items():
            if event.endswith(end):
                now = time.perf_counter()
                spans[name].append((now - duration_secs, now))

    jax.monitoring.register_event_duration_secs_listener(hear)
    _begin(cache)
    started = time.perf_counter()
    step, _ = _step(folder, family, batch, learning_rate=learning_rate)
    ready = time.perf_counter()
    loss, _ = step()
    end = time.perf_counter()
    # the phases are those of both parts: the optimiser's state is made by a program too
    return {"import_s": import_s, "model_s": ready - started, "step_s": end - ready, "loss": loss} | {
        name: union(found) for name, found in spans.items()
    }


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Return the seconds that some spans cover; a function that is traced inside another counts once."""
    covered, last = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, last))
        last = max(last, end)
    return covered


def _step(
    folder: str, family: str, batch: str, *, learning_rate: float, devices: int = 1
) -> tuple[Callable[[], tuple[float, float]], Callable[[], float]]:
    """Return the step, which gives loss and gradient norm, and what counts its FLOPs."""
    mesh = meshes.make_mesh(meshes.MeshConfig(data=devices), jax.devices()[:devices])
    loaded = pretrained.load(folder, mesh=mesh)
    trained, frozen = statistics.split(loaded.params)
    tx = optimizers.make(optimizers.Config(), learning_rate, trained)
    run = make_train_step(FAMILIES[family].loss(loaded.module.apply), tx, key=jax.random.key(0))
    jitted = jax.jit(run, donate_argnums=0)
    held = [states.place(lambda new, old: states.create(new, tx, frozen=old, ema=False), trained, frozen, mesh)]
    with np.load(batch) as stored:
        fields = jax.device_put({name: stored[name] for name in stored}, sharding.batch_sharding(mesh))

    def step() -> tuple[float, float]:
        with jax.set_mesh(mesh):
            held[0], metrics = jitted(held[0], fields)
        return float(metrics["loss"]), float(metrics["grad_norm"])

    def flops() -> float:
        with jax.set_mesh(mesh):
            return _products.flops(run, held[0], fields)

    return step, flops


def decode(folder: str, prompts: str, *, new_tokens: int, cache: str | None = None) -> Prepared:
    """Prepare greedy generation from a file of prompts [B, T]; the facts have what a token reads at least."""
    _begin(cache)
    loaded = pretrained.load(folder)
    given = np.load(prompts)
    rows, time_ = given.shape
    lengths = np.full(rows, time_, np.int32)

    def run() -> jax.Array:
        out = generate(loaded.module, loaded.params, given, lengths, max_new_tokens=new_tokens)
        return jax.block_until_ready(out.tokens)

    started = time.perf_counter()
    tokens = np.asarray(run())
    first = time.perf_counter() - started
    cfg: Any = loaded.module.cfg
    size = {path: leaf.size * leaf.dtype.itemsize for path, leaf in tree.flatten(loaded.params).items()}
    # of the tables a token reads one row each, but the head reads all of a tied one
    weights = sum(bytes_ for path, bytes_ in size.items() if path != "embed/positions")
    slot = 2 * cfg.num_layers * rows * cfg.attention.num_kv_heads * cfg.attention.head_dim * 4
    return {
        "tokens": tokens.tolist(),
        "weight_bytes": weights,
        "cache_bytes": slot * (time_ + new_tokens / 2),  # keys and values of the filled slots, on average
        "first_s": round(first, 2),
        "resident_gb": resident_gb(),
    }, lambda: {"tokens": run().shape[1]}


def forward(folder: str, *, length: int, precision: str) -> Prepared:
    """Prepare a decoder's forward pass over one text of random tokens, at a precision of products."""
    _begin()
    loaded = pretrained.load(folder)
    cfg: Any = loaded.module.cfg
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, length)).astype(np.int32)
    with jax.default_matmul_precision(precision):
        run = jax.jit(loaded.module.apply).lower({"params": loaded.params}, tokens).compile()

    def turn() -> dict[str, Any]:
        jax.block_until_ready(run({"params": loaded.params}, tokens))
        return {}

    logits: Any = run({"params": loaded.params}, tokens)
    return {"logits": np.asarray(logits)[0, -1].tolist(), "resident_gb": resident_gb()}, turn


def save(folder: str, shapes: list[list[int]], seed: int) -> Prepared:
    """Prepare saves of float32 arrays of these shapes, while products run that stand for the training."""
    _begin()
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    state = {
        str(number): jax.random.normal(key, shape) for number, (key, shape) in enumerate(zip(keys, shapes, strict=True))
    }
    where = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in state.items()}
    square = jax.random.normal(jax.random.key(seed + 1), (1024, 1024))
    multiply = jax.jit(jnp.matmul)

    def rate(until: Callable[[], bool]) -> float:
        count, started = 0, time.perf_counter()
        while not until():
            jax.block_until_ready(multiply(square, square))
            count += 1
        return count / (time.perf_counter() - started)

    def turn() -> dict[str, Any]:
        shutil.rmtree(folder, ignore_errors=True)
        end = time.perf_counter() + 0.5
        alone = rate(lambda: time.perf_counter() > end)
        with Store(folder, meta={}) as store, ThreadPoolExecutor(1) as pool:
            started = time.perf_counter()
            store.save(1, state, {})
            blocked = time.perf_counter() - started
            waiting = pool.submit(store.wait)
            beside = rate(waiting.done) if not waiting.done() else alone
            waiting.result()
            total, started = time.perf_counter() - started, time.perf_counter()
            restored = jax.block_until_ready(store.restore(1, where)[0])
            restore = time.perf_counter() - started
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        same = all(bool((restored[name] == leaf).all()) for name, leaf in state.items())
        shutil.rmtree(folder)
        lost = max(0.0, 1 - beside / alone) * (total - blocked)
        return {
            "stall_s": blocked + lost,
            "blocked_s": blocked,
            "beside": beside / alone,  # rate of the training's products while the save goes on
            "total_s": total,
            "restore_s": restore,
            "disk_bytes": size,
            "same": same,
        }

    bytes_ = sum(leaf.size * leaf.dtype.itemsize for leaf in state.values())
    return {"bytes": bytes_, **turn(), "resident_gb": resident_gb()}, turn


def product(size: int) -> Prepared:
    """Prepare one square product in float32, whose rate bounds a training step."""
    _begin()
    left, right = (jax.random.normal(jax.random.key(number), (size, size)) for number in range(2))
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(left, right))

    def turn() -> dict[str, Any]:
        jax.block_until_ready(multiply(left, right))
        return {"flops": 2 * size**3}

    return {"flops": 2 * size**3}, turn


def _begin(cache: str | None = None) -> None:
    """Keep freed memory, and compiled programs in this folder, as the commands of this project do (`cli.main`)."""
    host_memory.keep_freed()
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", cache)
