from collections import Counter

import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.stream import mixture
from fm_jax.data.stream.mixture import Mixture


class Numbers:
    def __init__(self, count: int, name: str = "numbers") -> None:
        self._count, self.name, self.fingerprint = count, name, f"{name}-{count}"
        self.limits = {"tokens": 1000}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": np.full(3, index, np.int32)}


MIXED = Mixture((Numbers(7, "a"), Numbers(20, "b"), Numbers(1, "c")), (1.0, 2.0, 0.5))


def _keys(source: Numbers | Mixture, seed: int, count: int) -> list[tuple[int, int]]:
    order = mixture.order(source, seed)
    return [order[i] for i in range(count)]


def test_every_row_is_used_once_before_any_is_used_again_in_a_new_order() -> None:
    found = [row for _, row in _keys(Numbers(50), 0, 150)]
    passes = [found[i : i + 50] for i in range(0, 150, 50)]
    assert all(sorted(one) == list(range(50)) for one in passes)
    assert passes[0] != passes[1] != passes[2] and passes[0] != list(range(50))


def test_weights_hold_in_every_stretch() -> None:
    found = np.array([source for source, _ in _keys(MIXED, 3, 700)])
    for source, share in enumerate(np.array(MIXED.weights) / sum(MIXED.weights)):
        given = np.cumsum(found == source)
        assert np.abs(given - share * np.arange(1, 701)).max() <= 2


def test_each_source_of_a_mixture_goes_through_its_rows_evenly() -> None:
    found = _keys(MIXED, 3, 700)
    for source, rows in enumerate((7, 20, 1)):
        counts = Counter(row for one, row in found if one == source)
        assert len(counts) == rows and max(counts.values()) - min(counts.values()) <= 1


def test_the_order_depends_on_the_seed_alone() -> None:
    assert _keys(MIXED, 3, 100) == _keys(MIXED, 3, 100)
    assert _keys(MIXED, 3, 100) != _keys(MIXED, 4, 100)
    # Neighbouring seeds share no pass: pass 1 of one seed is not pass 0 of the next.
    assert [r for _, r in _keys(Numbers(50), 0, 100)[50:]] != [r for _, r in _keys(Numbers(50), 1, 50)]
    assert _keys(Numbers(50), 2**40, 50) != _keys(Numbers(50), 0, 50)


def test_sources_of_one_length_are_not_shuffled_alike() -> None:
    found = _keys(Mixture((Numbers(50, "a"), Numbers(50, "b")), (1.0, 1.0)), 0, 100)
    first, second = ([row for one, row in found if one == source] for source in (0, 1))
    assert len(first) == len(second) == 50 and first != second


def test_any_place_is_reached_at_once() -> None:
    order = mixture.order(MIXED, 0)
    source, row = order[10**12]
    assert 0 <= row < len(MIXED.sources[source])


def test_the_fingerprint_holds_sources_and_weights() -> None:
    other = Mixture(MIXED.sources, (1.0, 2.0, 0.25))
    assert len({mixture.fingerprint(one) for one in (MIXED, other, Numbers(7), Numbers(8))}) == 4


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_weights_that_do_not_fit_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="mixture"):
        Mixture((Numbers(2), Numbers(3)), weights)


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(DataError, match="numbers is empty"):
        mixture.order(Numbers(0), 0)
