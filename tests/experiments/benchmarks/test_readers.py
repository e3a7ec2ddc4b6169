"""Every pipeline of the data benchmark reads rows of the asked size, and every turn reads on."""

import numpy as np
import pytest

from experiments.benchmarks import _readers, data
from experiments.benchmarks._pairs import Measured
from experiments.benchmarks._sides import Turn
from fm_jax.data.stream.loader import Batches
from tests.close import close


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


@pytest.mark.parametrize("name", _readers.PIPELINES)
def test_a_pipeline_reads_rows_of_the_asked_size(name, folder):
    facts, turn = _readers.read(name, str(folder), 32, 4, 2, threads=0)
    assert facts["rows"] == turn()["rows"] == 8
    row = next(Batches(_readers.PIPELINES[name].source(folder, 32), 4, threads=0).iterate())
    field = row["image"] if "image" in row else row["source"] if "source" in row else row["tokens"]
    assert field.shape == ((4, 32, 32, 3) if "image" in row else (4, 32))
    assert len(np.unique(field)) > 1


def test_times_are_those_of_one_row():
    reading, step = Turn(2.0, 3.0, 1.0, 0, {}), Turn(4.0, 6.0, 2.0, 0, {})
    turns = Measured({"ours": [reading], "step": [step]}, 0.0, 0.0, 0.0).each({"ours": 8, "step": 4}).turns
    assert [(turn.wall, turn.cpu) for turn in (turns["ours"][0], turns["step"][0])] == [(0.25, 0.5), (1.0, 2.0)]
    found = data.cores(Measured(turns, 0.0, 0.0, 0.0))
    close(found["cores"], 2.0)
    close(found["rows_per_core_s"], 2.0)
