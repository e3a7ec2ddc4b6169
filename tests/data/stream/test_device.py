from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fm_jax.core import mesh, sharding
from fm_jax.data.stream import device


def _batches(count: int, log: list[str]) -> Iterator[dict[str, np.ndarray]]:
    try:
        for step in range(count):
            log.append(f"read {step}")
            yield {"tokens": np.arange(48, dtype=np.int32).reshape(16, 3) + step, "label": np.arange(16) + step}
    finally:
        log.append("closed")


@pytest.fixture(scope="module")
def split() -> NamedSharding:
    return sharding.batch_sharding(mesh.make_mesh(mesh.MeshConfig(data=4, fsdp=2)))


@pytest.mark.parametrize("depth", [0, 1, 3, 20])
def test_batches_arrive_in_order_whole_and_split_over_devices(depth: int, split: NamedSharding) -> None:
    found = list(device.prefetch(_batches(7, []), split, depth=depth))
    assert len(found) == 7
    for batch, wanted in zip(found, _batches(7, []), strict=True):
        for name, value in wanted.items():
            assert isinstance(batch[name], jax.Array) and batch[name].sharding.is_equivalent_to(split, value.ndim)
            assert np.array_equal(batch[name], value)
            assert {shard.data.shape[0] for shard in batch[name].addressable_shards} == {2}


def test_it_reads_just_so_far_ahead_and_closes_the_reader(split: NamedSharding) -> None:
    log: list[str] = []
    found = device.prefetch(_batches(9, log), split, depth=2)
    assert log == []
    next(found)
    assert log == ["read 0", "read 1", "read 2"]
    next(found)
    assert log[-1] == "read 3"
    found.close()  # type: ignore[attr-defined]
    assert log[-1] == "closed"


def test_fields_may_be_placed_differently(split: NamedSharding) -> None:
    whole = NamedSharding(split.mesh, PartitionSpec())
    (batch,) = device.prefetch(_batches(1, []), lambda name, value: whole if name == "label" else split)
    assert batch["label"].sharding.is_fully_replicated and not batch["tokens"].sharding.is_fully_replicated


def test_a_process_of_several_passes_its_rows(split: NamedSharding, monkeypatch: pytest.MonkeyPatch) -> None:
    # One process that takes the path of several: its rows are then all rows.
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    (batch,) = device.prefetch(_batches(1, []), split)
    (wanted,) = _batches(1, [])
    assert np.array_equal(batch["tokens"], wanted["tokens"])


def test_a_negative_depth_is_refused(split: NamedSharding) -> None:
    with pytest.raises(ValueError, match="depth must be 0 or more"):
        next(device.prefetch(_batches(1, []), split, depth=-1))
