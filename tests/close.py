"""How tests compare numbers: by the error in units of what is compared, with room for another machine.

Another processor, thread count or XLA release adds up in another order, so a float32 result moves by some 1e-7 of the
largest number that went into it, wherever it is near zero too. An absolute tolerance therefore passes on one machine
and fails on the next. Here an error is divided by the largest value of the array that is expected, and a tolerance is
at least ten times what was measured. Two environment variables serve that rule:

    FM_MARGIN=10      every comparison must hold with a tenth of its tolerance
    FM_MARGINS=FILE   every comparison appends {"test", "line", "error", "within"} to the file, as a line of JSON
"""

import json
import os
import sys
from typing import Any

import jax
import numpy as np

MARGIN = float(os.environ.get("FM_MARGIN", "1"))


def close(got: Any, want: Any, within: float = 1e-5, *, scale: float | None = None) -> None:
    """Assert that two numbers, arrays or trees of them agree, leaf by leaf.

    Args:
        got: numbers, arrays or (nested) dicts, lists and tuples of them; none is NaN, an infinity must be met exactly.
        want: the same tree; a leaf may be broadcast to the shape of the one in `got`.
        within: the largest allowed error, in units of `scale`.
        scale: what errors are measured in; None: the largest absolute value of each leaf of `want`. Give it where the
            expected value is zero, or what cancelled on the way was larger than what is left.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(want)
    others, other = jax.tree_util.tree_flatten_with_path(got)
    assert other == structure, f"not the same tree: {other} instead of {structure}"
    for (path, expected), (_, actual) in zip(leaves, others, strict=True):
        _compare(jax.tree_util.keystr(path), np.asarray(actual), np.asarray(expected), within, scale)


def about(statistic: Any, want: float, within: float) -> None:
    """Assert that a statistic of seeded draws is near its expectation, relative to it.

    The error is that of the draw and the same on every machine, so `FM_MARGIN` does not concern it.
    """
    assert abs(float(statistic) / want - 1) <= within, f"{float(statistic):.4g} instead of {want:.4g}"


def small(error: Any, within: float) -> None:
    """Assert that an error, which is already in units of something, is at most `within`."""
    error = float(error)
    _record(error, within)
    assert error * MARGIN <= within, f"an error of {error:.2e} is more than {within / MARGIN:.2e}"


def _compare(path: str, got: np.ndarray, want: np.ndarray, within: float, scale: float | None) -> None:
    got, want = (array.astype(np.result_type(array.dtype, np.float64)) for array in (got, want))
    assert np.broadcast_shapes(got.shape, want.shape) == got.shape, f"{path}: shape {got.shape} instead of {want.shape}"
    want = np.broadcast_to(want, got.shape)
    if not got.size:
        return
    assert not np.isnan(got).any() and not np.isnan(want).any(), f"{path}: NaN in {got} or {want}"
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=path)
    if not finite.any():
        return
    error, unit = np.abs(got - want)[finite], scale or float(np.abs(want[finite]).max())
    assert unit or not error.any(), f"{path}: zero is expected, not {got}: give the scale of what went into it"
    worst = float(error.max() / (unit or 1.0))
    _record(worst, within)
    if not worst * MARGIN <= within:
        place = np.unravel_index(np.abs(np.where(finite, got - want, 0)).argmax(), got.shape)
        raise AssertionError(
            f"{path}: an error of {worst:.2e} × {unit:.3g} is more than {within / MARGIN:.2e}; "
            f"at {tuple(map(int, place))}: {got[place]!r} instead of {want[place]!r}"
        )


def _record(error: float, within: float) -> None:
    if not (file := os.environ.get("FM_MARGINS")):
        return
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    line = f"{os.path.relpath(frame.f_code.co_filename)}:{frame.f_lineno}"
    test = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
    with open(file, "a") as out:  # one short write at a time: several workers append to it
        out.write(json.dumps({"test": test, "line": line, "error": error, "within": within}) + "\n")
