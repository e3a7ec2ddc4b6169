import itertools

import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.stream.loader import Batches
from fm_jax.data.stream.phases import Phases
from fm_jax.data.text.corpus import Corpus


@pytest.fixture
def found(small: Corpus) -> tuple[Batches, Batches]:
    first, second = (Batches(small.blocks("train", length), 4, threads=0) for length in (8, 16))
    return first, second


@pytest.mark.parametrize("start", [0, 2, 3, 4])
def test_a_phase_begins_where_it_says_from_any_start(found: tuple[Batches, Batches], start: int) -> None:
    first, second = (list(itertools.islice(one.iterate(), 6)) for one in found)
    wanted = [*first[:3], *second[:3]]
    read = itertools.islice(Phases(found, (0, 3)).iterate(start), 6 - start)
    for batch, expected in zip(read, wanted[start:], strict=True):
        np.testing.assert_array_equal(batch["tokens"], expected["tokens"])


def test_a_phase_of_no_steps_is_passed_over(found: tuple[Batches, Batches]) -> None:
    assert next(Phases(found, (0, 0)).iterate())["tokens"].shape == (4, 16)


def test_phases_resume_only_as_themselves(found: tuple[Batches, Batches]) -> None:
    phases = Phases(found, (0, 3))
    assert phases.resume(phases.state(5)) == 5
    with pytest.raises(DataError, match="phases must be the same"):
        Phases(found, (0, 4)).resume(phases.state(5))
    with pytest.raises(ConfigError, match="one ascending start per phase, from 0"):
        Phases(found, (1, 3))
