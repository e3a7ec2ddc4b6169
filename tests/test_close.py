"""The comparison that all tests use must itself be able to fail."""

import json

import numpy as np
import pytest

from tests import close as comparing
from tests.close import close, small

WANT = np.array([1e-9, 0.0, -2.0, 100.0])


def test_an_error_is_measured_in_units_of_the_largest_value():
    close(WANT + 0.9e-3, WANT)  # 1e-5 of 100, also where the value is zero
    with pytest.raises(AssertionError, match=r"1\.10e-05 × 100"):
        close(np.add(WANT, [0, 1.1e-3, 0, 0]), WANT)
    close(WANT + 0.9e-3, WANT, 1e-3, scale=1.0)
    with pytest.raises(AssertionError, match=r"2\.00e-03 × 1"):
        close(WANT + 2e-3, WANT, 1e-3, scale=1.0)


def test_each_leaf_of_a_tree_has_its_own_unit_and_is_named():
    want = {"large": WANT, "little": {"leaf": (WANT * 1e-6, 3.0)}}
    close(want, want)
    with pytest.raises(AssertionError, match=r"\['little'\]\['leaf'\]\[0\]"):
        close(want | {"little": {"leaf": (WANT * 1e-6 + 1e-8, 3.0)}}, want)
    with pytest.raises(AssertionError, match="not the same tree"):
        close({"large": WANT}, want)


@pytest.mark.parametrize(
    ("got", "want", "message"),
    [
        ([1.0, np.nan], [1.0, np.nan], "NaN"),
        ([1.0, 5.0], [1.0, np.inf], "inf"),
        (np.ones(2), np.ones(3), "shape"),
        (np.ones(2), np.ones((2, 2)), "shape"),
        (1e-12, 0.0, "scale"),
    ],
)
def test_what_cannot_be_compared_fails(got, want, message):
    with pytest.raises((AssertionError, ValueError), match=message):
        close(np.asarray(got), np.asarray(want))


def test_what_is_equal_passes():
    close([1.0, -np.inf], [1.0, -np.inf])
    close(np.zeros(3), 0.0)
    close(np.zeros((0, 3)), np.zeros((0, 3)))
    close(np.float32(1 / 3), 1 / 3)
    close(np.array([True, False]), np.array([True, False]))


def test_a_margin_makes_every_tolerance_tighter(monkeypatch):
    close(1 + 5e-6, 1.0)
    small(5e-6, 1e-5)
    monkeypatch.setattr(comparing, "MARGIN", 10.0)
    for check in (lambda: close(1 + 5e-6, 1.0), lambda: small(5e-6, 1e-5)):
        with pytest.raises(AssertionError, match=r"more than 1\.00e-06"):
            check()


def test_every_comparison_can_be_recorded(monkeypatch, tmp_path):
    monkeypatch.setenv("FM_MARGINS", str(tmp_path / "margins"))
    close({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0 + 1e-6})
    small(1e-3, 0.1)
    lines = [json.loads(line) for line in (tmp_path / "margins").read_text().splitlines()]
    assert [line["within"] for line in lines] == [1e-5, 1e-5, 0.1]
    assert all("test_close.py" in line["line"] and line["test"].endswith("recorded") for line in lines)
