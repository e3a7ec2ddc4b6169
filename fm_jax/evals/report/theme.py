"""The matplotlib style of our figures, and how they are written.

Colours are Okabe and Ito's colour-blind safe palette. Lines also differ in dash and marker, so a figure is readable in
grey. Figures are made without pyplot: no global state, no display.
"""

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fm_jax.core.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = "osD^vPX"
GREY = "#9A9A9A"
INK = "#333333"
_STYLE: Any = {
    "font.family": "DejaVu Sans",  # included in matplotlib, so a figure is the same on every machine
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.labelsize": 11,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "lines.linewidth": 1.9,
    "lines.markersize": 6,
}


@contextlib.contextmanager
def picture(png: Path, width: float, height: float) -> "Iterator[Axes]":
    """Yield the axes of an empty figure of this size in inches; write it at the end of the `with` block.

    The file, a PNG at 160 dots per inch, is replaced atomically; an error in the block leaves it unchanged.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError('figures need matplotlib; install "fm_jax[quickstart]"') from error
    held = io.BytesIO()
    with matplotlib.rc_context():  # around drawing and writing: ticks get their style when they are drawn
        matplotlib.rcdefaults()  # ignore the user's matplotlibrc
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure.add_subplot()
        figure.savefig(held, format="png", dpi=160, facecolor="white", bbox_inches="tight", pad_inches=0.12)
    png.parent.mkdir(parents=True, exist_ok=True)
    temporary = png.with_name(f".{png.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(held.getbuffer())
        os.replace(temporary, png)
    finally:
        temporary.unlink(missing_ok=True)


def levels(axes: "Axes", named: Mapping[str, float]) -> None:
    """Draw horizontal lines with names right of the axes, moved apart if they would overlap; call it last."""
    for value in named.values():
        axes.axhline(value, color=GREY, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)  # the names' positions are valid only for these limits
    place = -1.0
    for text, value in sorted(named.items(), key=lambda item: item[1]):
        place = max((value - low) / (high - low), place + 0.065)
        axes.annotate(
            text,
            (1, place),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color="#666666",
            fontsize=9.5,
        )


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Return the centred running mean [N] of the finite values [N] over `width` neighbours (fewer at the ends)."""
    finite = np.isfinite(values)
    kernel = np.ones(width)
    sums = np.convolve(np.where(finite, values, 0), kernel, "same")
    counts = np.convolve(finite.astype(float), kernel, "same")
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
