"""Tables by their text; pictures by what is on their axes and by their bytes on the disk."""

import sys

import matplotlib
import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.evals.report import report, theme
from tests.close import close


def pixels(png):
    from PIL import Image

    return np.asarray(Image.open(png).convert("RGB"))


def test_a_table_aligns_numbers_right_and_names_left():
    rows = [{"name": "a|b", "n": 12345, "x": 2.15, "y": 1e-5}, {"name": "long name", "n": None, "x": 12345.6}]
    assert report.table(rows, {"name": "model", "n": "n", "x": "bits", "y": "lr"}) == (
        "| model     |      n |   bits |        lr |\n"
        "|-----------|-------:|-------:|----------:|\n"
        "| a\\|b      | 12,345 |  2.150 | 1.000e-05 |\n"
        "| long name |      — | 12,346 |         — |\n"
    )


def test_a_table_without_rows_is_its_head_and_an_unknown_column_is_refused():
    assert report.table([], ["a", "b"]) == "| a   | b   |\n|-----|-----|\n"
    with pytest.raises(DataError, match="'c'; the first row has a, b"):
        report.table([{"a": 1, "b": 2}], ["a", "c"])
    with pytest.raises(DataError, match="at least one column"):
        report.table([{"a": 1}], [])


def test_bars_have_their_values_beside_them_and_ours_stands_out(tmp_path, drawn):
    values = {"order 1": 4.767, "order 5": 2.15, "model": 1.7}
    report.bits_per_byte_bars(tmp_path / "new" / "bars.png", values, highlight=["model"])
    (axes,) = drawn
    assert [bar.get_width() for bar in axes.patches] == list(values.values())
    assert {text.get_text() for text in axes.texts} == {"4.767", "2.150", "1.700"}
    assert [label.get_text() for label in axes.get_yticklabels()] == list(values)
    assert len({bar.get_facecolor() for bar in axes.patches}) == 2
    assert pixels(tmp_path / "new" / "bars.png").std() > 10


def test_curves_keep_their_data_and_level_lines_their_names_apart(tmp_path, drawn):
    steps = np.arange(500)
    noisy = 5 * np.exp(-steps / 100) + np.random.default_rng(0).normal(0, 0.1, 500)
    noisy[250] = np.nan
    report.loss_curves(
        tmp_path / "loss.png", {"train": (steps, noisy), "valid": ([0, 499], [5, 0.1])}, lines={"a": 2.0, "b": 2.01}
    )
    (axes,) = drawn
    raw, smooth, valid, *_ = axes.lines
    np.testing.assert_array_equal(raw.get_ydata(), noisy)
    assert np.isfinite(smooth.get_ydata()).all()
    assert np.nanstd(np.diff(smooth.get_ydata())) < np.nanstd(np.diff(noisy)) / 3
    assert list(valid.get_ydata()) == [5, 0.1]
    heights = sorted(text.xy[1] for text in axes.texts)
    assert len(heights) == 2 and heights[1] - heights[0] > 0.06


def test_bands_are_the_intervals_over_seeds(tmp_path, drawn):
    ways = {"lora": {8: [0.4, 0.5, 0.6], 64: [0.7, 0.8, 0.75]}, "once": {8: [0.3], 64: [0.4]}}
    report.accuracy_over_labels(tmp_path / "acc.png", ways, baseline={"TF-IDF": 0.55})
    (axes,) = drawn
    path = axes.collections[0].get_paths()[0].vertices
    at_8 = path[path[:, 0] == 8][:, 1]
    half = 4.302652729911275 * 0.1 / 3**0.5  # t(0.975, 2 degrees) · s / √3
    close((at_8.min(), at_8.max()), (0.5 - half, 0.5 + half), 1e-9)
    close(np.ptp(axes.collections[1].get_paths()[0].vertices[:, 1]), 0.1, 1e-9)  # a line, no band
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "64"]
    assert axes.texts[0].get_text() == "TF-IDF 0.550"


def test_a_confusion_matrix_shows_counts_and_stays_readable_when_large(tmp_path, drawn):
    report.confusion_matrix(tmp_path / "c.png", [[8, 2], [0, 0]], ["a", "b"])
    report.confusion_matrix(tmp_path / "d.png", np.eye(30, dtype=int), [str(i) for i in range(30)])
    small, large = drawn
    assert [text.get_text() for text in small.texts] == ["8", "2"]
    close(small.images[0].get_array(), np.array([[0.8, 0.2], [0, 0]]))  # a class without examples too
    assert not large.texts


def test_a_failed_drawing_leaves_the_old_picture_and_no_other_file(tmp_path):
    png = tmp_path / "bars.png"
    report.bits_per_byte_bars(png, {"a": 1.0})
    before = png.read_bytes()
    with pytest.raises(RuntimeError), theme.picture(png, 3, 2):
        raise RuntimeError
    assert png.read_bytes() == before
    report.bits_per_byte_bars(png, {"a": 2.0})
    assert png.read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["bars.png"]


def test_pictures_neither_read_nor_change_the_users_matplotlib(tmp_path):
    report.bits_per_byte_bars(tmp_path / "a.png", {"a": 1.0})
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        report.bits_per_byte_bars(tmp_path / "b.png", {"a": 1.0})
        assert dict(matplotlib.rcParams) == before
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda png: report.loss_curves(png, {}), "no curves"),
        (lambda png: report.loss_curves(png, {"x": ([1, 2], [1])}), r"'x'.*\(2,\) and \(1,\)"),
        (lambda png: report.loss_curves(png, {"x": ([1], [np.nan])}), "finite"),
        (lambda png: report.bits_per_byte_bars(png, {}), "at least one"),
        (lambda png: report.bits_per_byte_bars(png, {"a": np.nan}), "finite"),
        (lambda png: report.bits_per_byte_bars(png, {"a": 1}, highlight=["b"]), "cannot highlight 'b'"),
        (lambda png: report.accuracy_over_labels(png, {}), "no methods"),
        (lambda png: report.accuracy_over_labels(png, {"a": {}}), "no label budgets"),
        (lambda png: report.accuracy_over_labels(png, {"a": {8: [80.0]}}), r"in \[0, 1\]"),
        (lambda png: report.accuracy_over_labels(png, {"a": {0: [0.8]}}), "at least 1"),
        (lambda png: report.confusion_matrix(png, [[1, 2]], ["a"]), "counts >= 0 of shape"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(tmp_path, call, said):
    with pytest.raises(DataError, match=said):
        call(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="quickstart"):
        report.bits_per_byte_bars(tmp_path / "x.png", {"a": 1.0})
