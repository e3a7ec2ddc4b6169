import multiprocessing
import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError, ResourceError
from fm_jax.data.stream.loader import Batches, Epoch, HostBatch
from fm_jax.data.stream.mixture import Mixture
from fm_jax.data.text.corpus import Corpus


class Numbers:
    """Row i holds i, so batches show which rows they are of."""

    def __init__(self, count: int = 37, name: str = "numbers", broken: int = -1) -> None:
        self._count, self._broken, self.name, self.fingerprint = count, broken, name, f"{name}-{count}"
        self.limits = {"tokens": 1000}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> HostBatch:
        if index == self._broken:
            raise ValueError("cannot decode")
        return {"tokens": np.full(3, index, np.int32), "weights": np.ones(3, np.float32)}


def _take(batches: Batches, count: int, start: int = 0) -> list[np.ndarray]:
    iterator = batches.iterate(start)
    try:
        return [batch["tokens"] for batch in islice(iterator, count)]
    finally:
        iterator.close()  # type: ignore[attr-defined]


MIXED = Mixture((Numbers(), Numbers(900, "more")), (0.25, 0.75))


@pytest.mark.parametrize("source", [Numbers(), MIXED])
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_assemble_the_same_global_batches_row_for_row(source: Numbers | Mixture, hosts: int) -> None:
    whole = _take(Batches(source, 8, seed=5), 20)
    parts = [_take(Batches(source, 8, seed=5, host=host, hosts=hosts), 20) for host in range(hosts)]
    for step in range(20):
        assert (np.concatenate([part[step] for part in parts]) == whole[step]).all()


@pytest.mark.parametrize("source", [Numbers(), MIXED])
def test_resuming_anywhere_goes_on_with_the_same_stream(source: Numbers | Mixture) -> None:
    batches = Batches(source, 8, seed=5, threads=0)
    whole = _take(batches, 25)
    for start in range(20):
        state = batches.state(start)
        assert all(
            (a == b).all()
            for a, b in zip(whole[start:], _take(batches, 25 - start, batches.resume(state)), strict=True)
        )


def test_resuming_far_ahead_costs_nothing() -> None:
    batches = Batches(Numbers(), 8, seed=5, threads=0)
    (far,) = _take(batches, 1, start=10**12)
    assert far.shape == (8, 3)


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_threads_do_not_change_the_stream(threads: int) -> None:
    wanted = _take(Batches(Numbers(), 8, seed=5, threads=0), 15)
    assert np.array_equal(_take(Batches(Numbers(), 8, seed=5, threads=threads), 15), wanted)


def test_every_row_is_seen_once_a_pass_across_batch_borders() -> None:
    rows = np.concatenate(_take(Batches(Numbers(37), 8, seed=1), 37))[:, 0]
    for start in range(0, len(rows), 37):
        assert sorted(rows[start : start + 37]) == list(range(37))


def test_a_state_of_another_stream_is_refused() -> None:
    batches = Batches(Numbers(), 8, seed=5)
    same = Batches(Numbers(), 8, seed=5, host=1, hosts=2, workers=3, threads=1)
    assert same.resume(batches.state(7)) == 7
    for other in (Batches(Numbers(38), 8, seed=5), Batches(Numbers(), 4, seed=5), Batches(Numbers(), 8, seed=6)):
        with pytest.raises(DataError, match="data, batch_size and seed must be the same"):
            other.resume(batches.state(7))


@pytest.mark.parametrize("threads", [0, 2])
def test_a_row_that_cannot_be_read_is_named(threads: int) -> None:
    with pytest.raises(DataError, match="numbers: row 11: cannot decode"):
        _take(Batches(Numbers(broken=11), 8, threads=threads), 10)
    with pytest.raises(DataError, match="numbers: row 11: cannot decode"):
        list(Epoch(Numbers(broken=11), 4))


@pytest.mark.parametrize("value", [-1, 1000])
def test_ids_out_of_range_are_refused_before_a_device_sees_them(value: int) -> None:
    class Wrong(Numbers):
        def __getitem__(self, index: int) -> HostBatch:
            return super().__getitem__(index) | ({"tokens": np.full(3, value, np.int32)} if index == 9 else {})

    message = f"numbers: tokens contains {value}, outside 0 … 999"
    with pytest.raises(DataError, match=message):
        _take(Batches(Wrong(), 8), 10)
    with pytest.raises(DataError, match=message):
        _take(Batches(Mixture((Numbers(), Wrong()), (1.0, 1.0)), 8), 20)
    with pytest.raises(DataError, match=message):
        list(Epoch(Wrong(), 4))


def test_rows_of_different_shapes_are_refused() -> None:
    class Longer(Numbers):
        def __getitem__(self, index: int) -> HostBatch:
            return {"tokens": np.zeros(4, np.int32), "weights": np.zeros(4, np.float32)}

    with pytest.raises(DataError, match="numbers, longer differ in fields or shapes"):
        _take(Batches(Mixture((Numbers(), Longer(name="longer")), (1.0, 1.0)), 8), 1)


class Dice(Numbers):
    """Row i is drawn: i, and two numbers of its own."""

    def draw(self, index: int, rng: np.random.Generator) -> HostBatch:
        return {"tokens": np.array([index, *rng.integers(0, 1000, 2)]), "weights": np.ones(3, np.float32)}


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_row_that_is_repeated_is_drawn_anew_and_never_stands_beside_itself(hosts: int) -> None:
    parts = [_take(Batches(Dice(40), 8, seed=5, repeats=3, host=host, hosts=hosts), 15) for host in range(hosts)]
    rows = np.concatenate([np.concatenate(batch) for batch in zip(*parts, strict=True)])
    once = np.concatenate(_take(Batches(Dice(40), 8, seed=5), 5))
    few = once[:, 0].reshape(8, 5)  # rows that take turns, three times each
    np.testing.assert_array_equal(rows[:, 0], np.tile(few, 3).ravel())
    assert (rows[1:, 0] != rows[:-1, 0]).all()
    assert len({tuple(row) for row in rows.tolist()}) == len(rows) == 120
    assert Batches(Dice(12), 8, repeats=3).fingerprint != Batches(Dice(12), 8).fingerprint


def test_less_than_one_batch_is_refused_at_once() -> None:
    with pytest.raises(DataError, match="numbers: 7 rows are too few for one batch of 8"):
        Batches(Numbers(7), 8).iterate()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 8, "hosts": 3}, "batch_size 8 is not divisible by 3 hosts"),
        ({"batch_size": 0}, "batch_size 0 is not divisible"),
        ({"batch_size": 8, "host": 2, "hosts": 2}, "host 2 is not in 0 … 1"),
        ({"batch_size": 8, "workers": -1}, r"workers \(-1\)"),
        ({"batch_size": 8, "repeats": 0}, "repeats must be between 1 and batch_size 8, not 0"),
        ({"batch_size": 8, "repeats": 9}, "repeats must be between 1 and batch_size 8, not 9"),
    ],
)
def test_a_description_that_cannot_work_is_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Batches(Numbers(), **fields)


def test_an_epoch_has_every_row_once_in_order_and_fills_up_with_weight_0() -> None:
    epoch = Epoch(Numbers(37), 8)
    for _ in range(2):
        batches = list(epoch)
        assert len(batches) == len(epoch) == 5 and {batch["tokens"].shape for batch in batches} == {(8, 3)}
        rows, used = (np.concatenate([batch[name] for batch in batches]) for name in ("tokens", "weights"))
        assert rows[used[:, 0] > 0][:, 0].tolist() == list(range(37))
        assert used[37:].sum() == 0


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_an_epoch(hosts: int) -> None:
    parts = [list(Epoch(Numbers(9), 8, host=host, hosts=hosts)) for host in range(hosts)]
    for step, whole in enumerate(Epoch(Numbers(9), 8)):
        rows, used = (np.concatenate([part[step][name] for part in parts]) for name in ("tokens", "weights"))
        assert (used == whole["weights"]).all() and (rows[used > 0] == whole["tokens"][used > 0]).all()


def test_an_epoch_of_nothing_and_rows_without_weights_are_refused() -> None:
    class Plain(Numbers):
        def __getitem__(self, index: int) -> HostBatch:
            return {"tokens": np.zeros(3, np.int32)}

    with pytest.raises(DataError, match="numbers is empty"):
        Epoch(Numbers(0), 8)
    with pytest.raises(DataError, match="numbers has no field 'weights'"):
        next(iter(Epoch(Plain(), 8)))


SCRIPT = """
import sys
from itertools import islice
from pathlib import Path
from fm_jax.data.stream import loader, mixture
from fm_jax.data.text import layout, tokens

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    sources = tuple(layout.Blocks(tokens.load(folder / split), 16) for split in ("train", "test"))
    mixed = mixture.Mixture(sources, (3.0, 1.0))
    for workers in (0, 1, 2):
        batches = loader.Batches(mixed, 8, seed=5, workers=workers).iterate(3)
        print(*(batch["tokens"].tobytes().hex() for batch in islice(batches, 6)))
        batches.close()
"""


@pytest.mark.slow
def test_workers_do_not_change_the_stream_and_need_no_absl_flags(small: Corpus, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, str(script), str(small.folder)], capture_output=True, text=True, env={"PYTHONPATH": root}
    )
    assert done.returncode == 0, done.stderr
    none, one, two = done.stdout.splitlines()
    assert none == one == two and len(none) > 1000
    # Batches that Grain's workers had ready when the iterator was closed are freed by Python's resource tracker at
    # exit, which may say so: that is no error.
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_worker_that_is_killed_is_one_line() -> None:
    batches = Batches(Numbers(), 8, workers=1).iterate()
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(ResourceError, match=r"a process that reads data died .*exit code -9.*set fewer workers"):
        for _ in range(1000):  # those read ahead come first
            next(batches)


@pytest.mark.slow
def test_an_error_in_a_worker_is_named_as_one_here() -> None:
    with pytest.raises(DataError, match="numbers: row 11: cannot decode"):
        _take(Batches(Numbers(broken=11), 8, workers=1), 10)
