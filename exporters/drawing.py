"""What all pictures share: colours, sizes, saving, and defaults that no user's settings change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#69707a", "#e3e6ea"
BLUE, ORANGE = "#2f6db3", "#d9772b"
_DPI = 120


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Draw with matplotlib's own defaults and ours, whatever a matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": 9, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK,
                "xtick.color": MUTED, "ytick.color": MUTED, "axes.titlesize": 10.5,
                "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 10,
            }
        )  # fmt: skip
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, with a canvas of its own."""
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    # Without the Software entry, which names the version of matplotlib.
    figure.savefig(path, format="png", metadata={"Software": None})


def tidy(axes: Axes) -> None:
    """Leave out what says nothing, and draw light lines behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
