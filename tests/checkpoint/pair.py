"""One of two processes that share a store: python -m tests.checkpoint.pair RANK PORT DIRECTORY."""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fm_jax.checkpoint import seal, surgery
from fm_jax.checkpoint.store import Store, load_params
from fm_jax.core.errors import FmError

WEIGHTS = np.arange(8 * 300, dtype=np.float32).reshape(8, 300)


def refused(call) -> str:
    try:
        call()
    except FmError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("not refused")


def right(array) -> bool:
    return all(np.array_equal(part.data, WEIGHTS[part.index]) for part in array.addressable_shards)


def main(rank: int, port: str, directory: Path) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    state = {
        "step": jax.make_array_from_callback((), whole, lambda _: np.int32(4)),
        "params": {"w": jax.make_array_from_callback(WEIGHTS.shape, split, lambda index: WEIGHTS[index])},
    }
    layout = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with Store(directory, keep_last=2, meta={}) as store:
        for step in (1, 2, 3):
            store.save(step, state, {"next_batch": step})
        store.wait()
        assert seal.steps(directory) == [2, 3]
        print("old", refused(lambda: store.save(3, state, {})))
        found, data = store.restore(3, layout)
        assert right(found["params"]["w"]) and int(found["step"]) == 4 and data == {"next_batch": 3}
        assert np.array_equal(load_params(directory)["w"], WEIGHTS)
        assert right(load_params(directory, 2, layout["params"])["w"])
        moved = surgery.load(layout["params"], {"w": WEIGHTS})["w"]
        assert right(moved) and moved.sharding == split

        largest = max(
            (p for p in (directory / "3" / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
        )
        content = bytearray(largest.read_bytes())
        multihost_utils.sync_global_devices("read")
        content[len(content) // 2] ^= 4
        if rank == 0:
            largest.write_bytes(content)
        multihost_utils.sync_global_devices("damaged")
        print("damaged", refused(lambda: store.restore(3, layout)))

        if rank == 0:  # the disk of the process that seals

            def fail(*paths):
                raise OSError(28, "No space left on device")

            seal.publish, publish = fail, seal.publish
        store.save(4, state, {})
        print("unsealed", refused(store.wait))
        assert store.last_step() == 3
        if rank == 0:
            seal.publish = publish
        store.save(4, state, {})
    assert seal.steps(directory) == [3, 4]
    print("done")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
