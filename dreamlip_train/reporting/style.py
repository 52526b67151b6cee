"""Colors and matplotlib settings that every figure shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from dreamlip_train.jobs.atomic_file import atomic_write
from dreamlip_train.jobs.job_folder import failed_writes_named
from dreamlip_train.jobs.plain_text import plain

matplotlib.use("Agg")

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLORS = ("#2563eb", "#e8590c", "#0f9d76", "#c2255c", "#7048e8", "#d9a400", "#5c4033")
"""One for each of the seven caption columns of the paper's data."""
STYLE: dict[Any, Any] = {  # keys of matplotlib's rcParams
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "text.parse_math": False,  # captions and names are text: a "$" in them is a dollar
}


def legend_label(text: str) -> str:
    """``text`` as a legend shows it: matplotlib hides labels that begin with an underscore, as a run's name may."""
    return plain(f" {text}" if text.startswith("_") else text)


def save_figure(figure: Figure, png: str | Path) -> None:
    """Write ``figure`` to ``png``, whole or not at all, and close it; by another ending, such as .pdf, as that."""
    png = Path(png)
    try:
        with failed_writes_named(png.parent, str(png)), atomic_write(png) as partial:
            figure.savefig(partial, dpi=150, facecolor="white", format=png.suffix[1:].lower() or "png")
    finally:
        plt.close(figure)
