"""Twice as much of one thing changes nothing else, and the law is the work of a token."""

import pytest

from experiments.benchmarks import _ours, growth
from fm_jax.core.errors import ConfigError, DataError
from fm_jax.evals.report import growth as picture
from tests.close import close


def test_a_factor_changes_one_size_and_a_longer_context_takes_fewer_rows():
    cfg = growth.Config()
    first = growth.size(cfg, "layers", 1)
    for kind in ("layers", "width", "rows", "devices"):
        assert {name for name, value in growth.size(cfg, kind, 2).items() if value != first[name]} == {kind}
    longer = growth.size(cfg, "length", 4)
    assert longer["length"] * longer["rows"] == first["length"] * first["rows"]
    assert longer["length"] == 4 * first["length"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"width": 100}, "multiple of 64"), ({"factors": (3,)}, "rows must be"), ({"factors": (1,)}, "from 2")],
)
def test_sizes_that_cannot_be_multiplied_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        growth.Config(**fields)


def test_twice_the_layers_are_less_than_twice_the_work_of_a_token(tmp_path):
    """The head's work does not grow, and a context twice as long adds only its scores."""
    cfg = growth.Config(factors=(2,), layers=1, width=64, length=8, rows=2, vocabulary=32)
    work = {}
    for kind, factor in (("layers", 1), ("layers", 2), ("length", 2)):
        given = growth.start(growth.size(cfg, kind, factor), tmp_path).given
        _, flops = _ours._step(given["folder"], given["family"], given["batch"], learning_rate=1e-3)
        work[kind, factor] = flops()
    head = 3 * 2 * 64 * 32 * 16  # forward and both gradients of the head, for 16 tokens
    close((work["layers", 2] - head) / (work["layers", 1] - head), 2.0)
    scores = 3 * 2 * 2 * 64 * 8 * 16  # q k and weights v: a token's products with 8 others
    close(work["length", 2] - work["layers", 1], float(scores))


def test_a_picture_needs_rows_with_values_above_zero(tmp_path):
    row = {"kind": "layers", "factor": 2, "ratio": 0.6, "law": 0.5}
    picture.draw(tmp_path / "growth.png", [row, row | {"factor": 4, "ratio": 0.3}])
    assert (tmp_path / "growth.png").stat().st_size > 1000
    for wrong in ([], [row | {"ratio": 0.0}]):
        with pytest.raises(DataError, match="above 0"):
            picture.draw(tmp_path / "other.png", wrong)
