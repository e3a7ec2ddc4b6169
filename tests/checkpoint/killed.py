"""Kill a saving process again and again, at random moments; each successor checks what it finds.

    python -m tests.checkpoint.killed DIRECTORY KILLS SEED

Every third read of a seal or a record fails while a process saves, as on a faulty disk: no step may be lost by it.
Children are forked before the backend starts, which spares each of them the imports. Prints one line of JSON.
"""

import errno
import itertools
import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from fm_jax.checkpoint import seal
from fm_jax.checkpoint.store import Store
from fm_jax.train import log

SIZE = 400_000


def initial() -> dict:
    return {"step": jnp.int32(0), "params": {"w": jnp.arange(SIZE, dtype=jnp.uint32), "b": jnp.zeros(7, jnp.bfloat16)}}


def advance(state: dict) -> dict:
    """Mix every bit, exactly: any other state than the one of this step is told apart."""
    step, words = state["step"] + 1, state["params"]["w"] * jnp.uint32(1664525) + jnp.uint32(1013904223)
    words = words ^ (words >> jnp.uint32(13)) ^ step.astype(jnp.uint32)
    return {"step": step, "params": {"w": words, "b": (words[:7] & jnp.uint32(63)).astype(jnp.bfloat16)}}


def loss(step: int) -> float:
    """Return the metric of a step; its lowest value comes at any time."""
    return float(step * 7919 % 101)


def make_reads_fail() -> None:
    """Let every third read of a small file fail."""
    content, calls = seal._content, itertools.count(1)

    def read(path: Path) -> bytes:
        if next(calls) % 3 == 0:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return content(path)

    seal._content = read


def child(directory: Path, announced: int, say: Callable[[int], None], steps: int | None) -> None:
    """Check the newest sealed step, go on from there, and say after every save which step is sealed."""
    with Store(directory, keep_last=2, metric="loss", meta={}) as store:
        last = store.last_step() or 0
        assert last >= announced, f"step {announced} was sealed, {last} is the newest"
        state = initial()
        if last:
            state, data = store.restore(last, jax.eval_shape(initial))
            right = jax.jit(lambda n: jax.lax.fori_loop(0, n, lambda _, s: advance(s), initial()))(last)
            same = jax.tree.map(lambda a, b: bool((a == b).all()) and a.dtype == b.dtype, state, right)
            assert jax.tree.all(same) and data == {"next_batch": last}, (last, same, data)
            best = store.best_step()
            assert best == min(range(1, last + 1), key=lambda n: (loss(n), n)), f"the best step is not {best}"
        say(last)
        make_reads_fail()
        metrics = log.JsonLines(directory / "metrics.jsonl", resume_step=last)
        step = jax.jit(advance, donate_argnums=0)
        first = int(state["step"])
        while steps is None or int(state["step"]) < first + steps:
            state = step(state)
            number = int(state["step"])
            metrics.write(number, {"loss": loss(number)})
            store.save(number, state, {"next_batch": number}, {"loss": loss(number)})
            say(store.last_step() or 0)


def fork(directory: Path, announced: int, steps: int | None) -> tuple[int, int]:
    """Start a child; return its process id and the pipe that it speaks into."""
    reader, writer = os.pipe()
    if (process := os.fork()) == 0:
        os.close(reader)
        code = 1
        try:
            child(directory, announced, lambda step: os.write(writer, b"%d\n" % step) and None, steps)
            code = 0
        finally:
            sys.stderr.flush()
            if code:
                import traceback

                traceback.print_exc()
            os._exit(code)
    os.close(writer)
    return process, reader


def unfinished(directory: Path) -> bool:
    """Return whether a save, or a deletion, is under way or was cut off."""
    return any((directory / "unsealed").iterdir())


def main(directory: Path, kills: int, seed: int) -> None:
    """Print how many kills there were, how many of them cut a save off, and the steps reached."""
    chance, announced, cut = random.Random(seed), 0, 0
    for _ in range(kills):
        process, reader = fork(directory, announced, None)
        said = b""
        while said.count(b"\n") < 3:  # alive, and one save is sealed
            if not (more := os.read(reader, 4096)):
                raise SystemExit("a child failed")
            said += more
        until = time.monotonic() + chance.uniform(0, 0.3)
        while (left := until - time.monotonic()) > 0:
            if select.select([reader], [], [], left)[0]:
                said += os.read(reader, 4096)
        if chance.random() < 0.5:  # most of a save is waiting for the disk; aim at the rest of it, too
            while not unfinished(directory):
                time.sleep(chance.uniform(0, 0.002))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        while more := os.read(reader, 4096):
            said += more
        os.close(reader)
        announced = max(announced, *(int(line) for line in said.split(b"\n")[:-1]))
        cut += unfinished(directory)
    process, reader = fork(directory, announced, 3)
    status = os.waitpid(process, 0)[1]
    final = seal.steps(directory)[-1]
    logged = [line["step"] for line in log.read(directory / "metrics.jsonl")]
    assert logged == list(range(1, final + 1)), logged
    moved = directory / "metrics.jsonl.removed"
    assert not moved.exists() or len(log.read(moved)) <= 3 * kills, "lines were copied, not moved"
    print(json.dumps({"kills": kills, "cut": cut, "announced": announced, "final": final, "status": status}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
