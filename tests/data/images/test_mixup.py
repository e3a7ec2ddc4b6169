from itertools import islice

import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.images.mixup import Mix, Mixed, mixed
from fm_jax.data.stream.loader import Batches, HostBatch
from tests.close import close


def batch(rows: int = 8, size: int = 16) -> HostBatch:
    """Row i is i + 1 everywhere, of class i."""
    value = np.arange(1, rows + 1, dtype=np.float32)
    return {
        "image": np.broadcast_to(value[:, None, None, None], (rows, size, size, 3)).copy(),
        "label": np.arange(rows, dtype=np.int32),
        "weights": np.ones(rows, np.float32),
    }


def test_mixup_mixes_pixels_and_targets_by_the_same_share() -> None:
    given = batch()
    found = mixed(given, Mix(mixup=1.0, cutmix=0.0), 10, seed=0)
    partner = np.arange(8) ^ 1
    share = found["target"][np.arange(8), given["label"]]
    close(found["target"].sum(1), 1.0)
    close(found["target"][np.arange(8), partner], 1 - share, scale=1.0)
    wanted = share[:, None, None, None] * given["image"] + (1 - share[:, None, None, None]) * given["image"][partner]
    close(found["image"], wanted)
    assert len(set(np.round(share[::2], 6))) == 4  # every pair has its own
    assert (found["label"] == np.where(share >= 0.5, np.arange(8), partner)).all()
    assert np.array_equal(given["image"], batch()["image"]) and found["weights"] is given["weights"]


def test_cutmix_pastes_a_rectangle_and_counts_its_pixels() -> None:
    given = batch()
    shares = []
    for seed in range(40):
        found = mixed(given, Mix(mixup=0.0, cutmix=1.0), 8, seed=seed)
        for row in range(8):
            other = found["image"][row, ..., 0] == (row ^ 1) + 1
            assert ((found["image"][row, ..., 0] == row + 1) | other).all()
            ys, xs = np.flatnonzero(other.any(1)), np.flatnonzero(other.any(0))
            assert other.sum() == len(ys) * len(xs)
            close(found["target"][row, row], 1 - other.mean(), scale=1.0)
            shares.append(other.mean())
    assert min(shares) < 0.05 and max(shares) > 0.7


def test_both_take_turns_and_some_pairs_stay() -> None:
    given, kinds = batch(2), []
    for seed in range(300):
        image = mixed(given, Mix(switch=0.25, probability=0.5), 2, seed=seed)["image"][0]
        kinds.append("none" if (image == 1).all() else "cutmix" if set(np.unique(image)) <= {1, 2} else "mixup")
    assert 120 < kinds.count("none") < 190 and 15 < kinds.count("cutmix") < 60 and 75 < kinds.count("mixup") < 150


def test_equal_classes_stay_hard() -> None:
    given = batch() | {"label": np.full(8, 3, np.int32)}
    found = mixed(given, Mix(), 5, seed=1)
    close(found["target"][:, 3], 1.0)
    assert (found["label"] == 3).all()


class Rows:
    name, fingerprint, limits = "rows", "rows", {"label": 32}

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> HostBatch:
        return {
            "image": np.full((4, 4, 3), index, np.float32),
            "label": np.array(index, np.int32),
            "weights": np.ones((), np.float32),
        }


def test_hosts_mix_the_same_global_batches_and_a_resumed_stream_goes_on() -> None:
    def take(host: int = 0, hosts: int = 1, start: int = 0) -> list[HostBatch]:
        stream = Mixed(Batches(Rows(), 8, seed=5, host=host, hosts=hosts, threads=0), Mix(), 32)
        return list(islice(stream.iterate(start), 6 - start))

    whole, parts, later = take(), [take(host, 2) for host in range(2)], take(start=2)
    for step in range(6):
        for name in ("image", "target", "label"):
            assert np.array_equal(np.concatenate([part[step][name] for part in parts]), whole[step][name])
            if step >= 2:
                assert np.array_equal(later[step - 2][name], whole[step][name])


@pytest.mark.parametrize("repeats", [2, 3, 4])
def test_an_image_that_is_repeated_is_mixed_with_others(repeats: int) -> None:
    """As DeiT has both: its repeats go to other devices, and each device mixes its own images."""
    stream = Mixed(Batches(Rows(), 8, repeats=repeats, threads=0), Mix(switch=0.0, cutmix=0.0), 32)
    for batch in islice(stream.iterate(0), 6):
        assert ((batch["target"] > 0).sum(axis=1) == 2).all()


def test_the_state_is_of_this_stream_alone() -> None:
    batches = Batches(Rows(), 8)
    one, other = Mixed(batches, Mix(), 32), Mixed(batches, Mix(mixup=0.2), 32)
    assert one.resume(one.state(7)) == 7 and one.fingerprint != batches.fingerprint
    with pytest.raises(DataError, match="seed and mixing must be the same"):
        other.resume(one.state(7))


def test_what_cannot_be_mixed_is_refused() -> None:
    with pytest.raises(ConfigError, match="mixup and cutmix are both 0"):
        Mix(mixup=0, cutmix=0)
    with pytest.raises(ConfigError, match="mixup and cutmix must be at least 0"):
        Mix(mixup=-1)
    with pytest.raises(ConfigError, match="batch_size 6 over 2 hosts gives an odd number of rows"):
        Mixed(Batches(Rows(), 6, hosts=2), Mix(), 32)
    with pytest.raises(DataError, match="in pairs: 3 rows"):
        mixed({name: value[:3] for name, value in batch().items()}, Mix(), 10, seed=0)
    with pytest.raises(DataError, match="labels are 0 to 7, outside 0 … 6"):
        mixed(batch(), Mix(), 7, seed=0)
