"""The picture of an ablation: a row per variant, a panel per score, a dot per seed and a bar for their mean."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib import pyplot as plt

from dreamlip_train.ablation.grid import VARIANTS
from dreamlip_train.reporting.style import COLORS, GRID, MUTED, STYLE, save_figure

_PANELS = (
    ("long", "R@1, long caption\n(mean of its sentences)"),
    ("whole", "R@1, long caption\nas one text"),
    ("short", "R@1, short caption"),
    ("sentence", "R@1, single sentence"),
    ("pointing", "top patch inside\nthe region"),
    ("miou", "IoU of the\nselected patches"),
)


def plot_ablation(content: dict[str, Any], png: str | Path) -> None:
    """Draw ablation.json's content; the dashed line is chance."""
    names = list(content["runs"])
    if not names:
        return
    descriptions = {variant.name: variant.what for variant in VARIANTS}
    tables = {variant.name: variant.table for variant in VARIANTS}
    colors = dict(zip(dict.fromkeys(tables.values()), COLORS, strict=False))
    positions, at = {}, 0.0
    for before, name in zip([names[0], *names], names, strict=False):
        at += 1.0 if tables[name] == tables[before] else 1.6  # a gap between the tables
        positions[name] = at
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(1, len(_PANELS), figsize=(16, 1.3 + 0.3 * at), sharey=True, layout="constrained")
        for axis, (score, title) in zip(axes, _PANELS, strict=True):
            for name, row in content["runs"].items():
                values, color = [scores[score] for scores in row.values()], colors[tables[name]]
                axis.barh(positions[name], mean(values), height=0.62, color=color, alpha=0.28, linewidth=0)
                axis.plot(values, [positions[name]] * len(values), "o", color=color, markersize=4, markeredgewidth=0)
            if score in content["chance"]:
                axis.axvline(content["chance"][score], color=MUTED, linestyle="--", linewidth=1)
            axis.set_title(title, fontsize=8.5)
            axis.set_xlim(left=0)
            axis.set_xlabel("%")
            axis.xaxis.grid(True, color=GRID)
            axis.set_axisbelow(True)
            axis.tick_params(axis="y", length=0)
        axes[0].set_yticks(list(positions.values()), [descriptions[name] for name in positions])
        axes[0].invert_yaxis()
        save_figure(figure, png)
