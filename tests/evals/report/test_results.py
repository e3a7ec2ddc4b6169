"""results.json holds plain numbers, whole or not at all."""

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.core.errors import DataError
from fm_jax.evals.metrics import Interval
from fm_jax.evals.report import results


def test_what_is_written_is_read_as_plain_values(tmp_path):
    path = tmp_path / "deep" / "results.json"
    results.write(
        path,
        {
            "loss": np.float32(0.5),
            "accuracy": jnp.float32(0.25),
            "steps": np.int64(3),
            "interval": Interval(0.5, 0.25, 0.75),
            "matrix": np.eye(2, dtype=int),
            "by_budget": {8: [0.5, math.nan], 16: (math.inf,)},
            "file": Path("loss.png"),
            "best": None,
            "done": np.bool_(True),
            "name": "é",
        },
    )
    assert results.read(path) == {
        "loss": 0.5,
        "accuracy": 0.25,
        "steps": 3,
        "interval": [0.5, 0.25, 0.75],
        "matrix": [[1, 0], [0, 1]],
        "by_budget": {"8": [0.5, None], "16": [None]},
        "file": "loss.png",
        "best": None,
        "done": True,
        "name": "é",
    }


def test_a_value_json_cannot_hold_is_named_and_the_old_file_stays(tmp_path):
    path = tmp_path / "results.json"
    results.write(path, {"a": 1})
    with pytest.raises(DataError, match=r"results.json: b: c is a set"):
        results.write(path, {"b": {"c": {1, 2}}})
    assert results.read(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.json"):
        results.read(tmp_path / "none.json")
    for text in ("{", "[]", "\x00"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError, match=r"bad\.json"):
            results.read(tmp_path / "bad.json")
