"""Draw how speed changes with size, beside the law that it should follow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fm_jax.core.errors import DataError
from fm_jax.evals.report import theme


def draw(png: Path, rows: Sequence[Mapping[str, Any]], *, title: str = "Tokens per second at a larger size") -> None:
    """Draw {"kind", "factor", "ratio", "law"} rows: a line per kind over the factor, and its law in grey.

    Args:
        png: the file to write.
        rows: ratio is the speed over that at factor 1, law the ratio that is expected; both are above 0.
        title: the figure's title.

    Raises:
        DataError: no rows, or a value that is not above 0, which a logarithmic axis cannot show.
        ConfigError: matplotlib is missing.
    """
    if not rows or any(not row[name] > 0 for row in rows for name in ("factor", "ratio", "law")):
        raise DataError("growth needs at least one row, and factors, ratios and laws above 0")
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    with theme.picture(png, 7.2, 4.4) as axes:
        for number, kind in enumerate(kinds):
            mine = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["factor"])
            x = [1, *(row["factor"] for row in mine)]
            axes.plot(x, [1, *(row["law"] for row in mine)], color=theme.GREY, linewidth=1.2, zorder=1)
            axes.plot(
                x,
                [1, *(row["ratio"] for row in mine)],
                color=theme.COLORS[number % len(theme.COLORS)],
                linestyle=theme.DASHES[number % len(theme.DASHES)],
                marker=theme.MARKERS[number % len(theme.MARKERS)],
                label=kind,
            )
        axes.plot([], [], color=theme.GREY, linewidth=1.2, label="law")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        ticks = sorted({1, *(row["factor"] for row in rows)})
        axes.set_xticks(ticks, [f"{factor}×" for factor in ticks])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}×")
        axes.set_xlabel("size")
        axes.set_ylabel("tokens per second")
        axes.grid(axis="y")
        axes.set_title(title)
        axes.legend(loc="lower left")
