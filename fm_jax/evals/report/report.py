"""Figures and tables of results: PNG files, written atomically, and Markdown."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fm_jax.core.errors import DataError
from fm_jax.evals.metrics import mean_interval
from fm_jax.evals.report import theme


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | Mapping[str, str]) -> str:
    """Return a Markdown table; text is aligned left, numbers right.

    Floats get four significant digits; a missing or None value becomes an em dash.

    Args:
        rows: one mapping per row.
        columns: keys of the rows, in order; or {key: heading}.

    Raises:
        DataError: no columns, or a column that no row has.
    """
    heads = dict(columns) if isinstance(columns, Mapping) else {key: key for key in columns}
    if not heads:
        raise DataError("a table needs at least one column")
    if rows and (absent := [key for key in heads if not any(key in row for row in rows)]):
        raise DataError(f"no row has the column {absent[0]!r}; the first row has {', '.join(map(str, rows[0]))}")
    cells = [[_cell(row.get(key)) for key in heads] for row in rows]
    right = [bool(rows) and all(_is_number(row.get(key)) for row in rows) for key in heads]
    titles = [_cell(head) for head in heads.values()]
    widths = [max(3, *(len(cell) for cell in column)) for column in zip(titles, *cells, strict=True)]

    def line(values: Sequence[str]) -> str:
        padded = (v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 1) + ":" if r else "-" * (w + 2) for w, r in zip(widths, right, strict=True))
    return "\n".join([line(titles), f"|{rule}|", *map(line, cells)]) + "\n"


def loss_curves(
    png: Path,
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    title: str = "",
    ylabel: str = "loss (nats per token)",
    lines: Mapping[str, float] | None = None,
) -> None:
    """Draw {name: (steps [N], values [N])}, and {name: value} of `lines` as horizontal lines.

    A curve of more than 100 points is drawn pale, with its running mean over 2 % of the points on top.

    Raises:
        DataError: no curves, different numbers of steps and values, or a curve without a finite value.
        ConfigError: matplotlib is missing.
    """
    if not curves:
        raise DataError("there are no curves to draw")
    with theme.picture(png, 7.2, 4.2) as axes:
        for i, (name, (steps, values)) in enumerate(curves.items()):
            x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
            if x.ndim != 1 or x.shape != y.shape or not np.isfinite(y).any():
                raise DataError(
                    f"curve {name!r} needs as many steps as values and at least one finite value; "
                    f"its shapes are {x.shape} and {y.shape}"
                )
            color = theme.COLORS[i % len(theme.COLORS)]
            few = len(x) <= 30
            if len(x) > 100:
                axes.plot(x, y, color=color, alpha=0.22, linewidth=0.8)
                y = theme.smooth(y, max(3, len(y) // 50))
            axes.plot(
                x,
                y,
                color=color,
                linestyle=theme.DASHES[i % len(theme.DASHES)],
                marker=theme.MARKERS[i % len(theme.MARKERS)] if few else "",
                markersize=4.5,
                label=name,
            )
        theme.levels(axes, {f"{name} {value:.3g}": value for name, value in (lines or {}).items()})
        axes.grid(axis="y")
        axes.set(xlabel="step", ylabel=ylabel)
        axes.set_title(title)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        if len(curves) > 1:
            axes.legend(loc="upper right")


def bits_per_byte_bars(
    png: Path, values: Mapping[str, float], *, highlight: Sequence[str] = (), title: str = ""
) -> None:
    """Draw one bar per language model, in the given order; `highlight` names ours, the baselines are grey.

    Raises:
        DataError: no bars, a value that is negative or not finite, or an unknown name in `highlight`.
        ConfigError: matplotlib is missing.
    """
    if not values or not all(0 <= value < math.inf for value in values.values()):
        raise DataError(f"the bars need at least one value, each finite and at least 0, not {dict(values)}")
    if unknown := set(highlight) - values.keys():
        raise DataError(f"cannot highlight {sorted(unknown)[0]!r}; the bars are {', '.join(values)}")
    with theme.picture(png, 7.2, 0.9 + 0.42 * len(values)) as axes:
        colors = [theme.COLORS[0] if name in highlight else "#BDBDBD" for name in values]
        bars = axes.barh(list(values), list(values.values()), color=colors, height=0.68)
        numbers = axes.bar_label(bars, labels=[f"{value:.3f}" for value in values.values()], padding=4)
        for name, number, label in zip(values, numbers, axes.get_yticklabels(), strict=True):
            if name in highlight:
                number.set_fontweight("bold")
                label.set_fontweight("bold")
        axes.invert_yaxis()  # the first on top
        axes.set_xlim(0, max(max(values.values()) * 1.12, 1e-9))
        axes.set_xlabel("bits per byte (lower is better)")
        axes.set_title(title)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)


def accuracy_over_labels(
    png: Path,
    methods: Mapping[str, Mapping[int, Sequence[float]]],
    *,
    baseline: Mapping[str, float] | None = None,
    title: str = "",
    xlabel: str = "labels per class",
    ylabel: str = "test accuracy",
    confidence: float = 0.95,
) -> None:
    """Draw {method: {labels: [accuracy of each seed]}}: means, Student-t bands over seeds, and seeds as faint dots.

    A single seed has no band. The axis of budgets is logarithmic.

    Args:
        png: the file to write.
        methods: accuracies in [0, 1]; methods may differ in budgets and numbers of seeds.
        baseline: {name: accuracy}, drawn as horizontal lines.
        title: the figure's title.
        xlabel: label of the axis of budgets.
        ylabel: label of the axis of accuracies.
        confidence: level of the bands.

    Raises:
        DataError: no methods, a method without budgets, a budget below 1 or without seeds, or a value outside [0, 1].
        ConfigError: matplotlib is missing.
    """
    _check_methods(methods)
    with theme.picture(png, 7.2, 4.4) as axes:
        budgets = sorted({budget for accuracies in methods.values() for budget in accuracies})
        for i, (name, accuracies) in enumerate(methods.items()):
            x = sorted(accuracies)
            seeds = [np.asarray(accuracies[budget], np.float64) for budget in x]
            bounds = [mean_interval(s, confidence) if len(s) > 1 else (s[0],) * 3 for s in seeds]
            mean, low, high = (np.clip(part, 0, 1) for part in np.array(bounds).T)
            color = theme.COLORS[i % len(theme.COLORS)]
            axes.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0)
            if len(x) == 1:
                axes.vlines(x, low, high, color=color, alpha=0.5)
            axes.plot(
                x,
                mean,
                color=color,
                linestyle=theme.DASHES[i % len(theme.DASHES)],
                marker=theme.MARKERS[i % len(theme.MARKERS)],
                label=name,
            )
            for budget, points in zip(x, seeds, strict=True):
                if len(points) > 1:
                    axes.plot([budget] * len(points), points, ".", color=color, alpha=0.45, markersize=4)
        theme.levels(axes, {f"{name} {value:.3f}": value for name, value in (baseline or {}).items()})
        axes.set_xscale("log")
        axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
        axes.set_xticks([], minor=True)
        axes.grid(axis="y")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_title(title)
        axes.figure.legend(loc="outside lower center", ncols=min(len(methods), 4))


def confusion_matrix(png: Path, counts: ArrayLike, names: Sequence[str], *, title: str = "") -> None:
    """Draw a confusion matrix [C, C] (row = label, column = prediction), coloured by the share of the row.

    Raises:
        DataError: not square, not of the size of `names`, or with negative counts.
        ConfigError: matplotlib is missing.
    """
    matrix = np.asarray(counts)
    if matrix.ndim != 2 or matrix.shape != (len(names), len(names)) or not len(names) or matrix.min() < 0:
        raise DataError(
            f"the confusion matrix of {len(names)} classes must be counts >= 0 of shape "
            f"{(len(names), len(names))}, not of shape {matrix.shape}"
        )
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = max(3.4, 1.9 + 0.5 * len(names))
    with theme.picture(png, side + 0.3, side) as axes:
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        if len(names) <= 25:  # numbers in smaller cells are illegible
            for (row, column), count in np.ndenumerate(matrix):
                color = "white" if share[row, column] > 0.55 else theme.INK
                if count:
                    axes.text(column, row, f"{count:g}", ha="center", va="center", color=color, fontsize=9.5)
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set(xlabel="predicted", ylabel="true")
        axes.set_title(title)
        beside = axes.inset_axes((1.03, 0, 0.03, 1))  # exactly as high as the matrix
        bar = axes.figure.colorbar(image, cax=beside)
        bar.outline.set_visible(False)
        bar.set_label("share of the true class")


def _check_methods(methods: Mapping[str, Mapping[int, Sequence[float]]]) -> None:
    if not methods:
        raise DataError("there are no methods to draw")
    for name, accuracies in methods.items():
        if not accuracies:
            raise DataError(f"method {name!r} has no label budgets")
        for budget, seeds in accuracies.items():
            values: np.ndarray = np.asarray(seeds, np.float64)
            if budget < 1 or not values.size or not np.all((values >= 0) & (values <= 1)):
                raise DataError(
                    f"{name!r} at {budget} labels needs a budget of at least 1 and accuracies in [0, 1], not {seeds}"
                )


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float | np.number) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    if value is None:
        return "—"
    if isinstance(value, float | np.floating):
        number = float(value)
        return f"{number:,.0f}" if 1e4 <= abs(number) < 1e15 else f"{number:#.4g}".rstrip(".")
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return f"{value:,}"
    return " ".join(str(value).split()).replace("|", "\\|")
