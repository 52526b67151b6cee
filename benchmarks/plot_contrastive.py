"""Time and peak memory of the contrastive providers against N.

python benchmarks/plot_contrastive.py PYTEST_BENCHMARK.json PICTURE.png
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

OURS = ("torch", "triton", "cuda")
# The same color in every panel, whoever is in it.
COLORS = {
    "triton": "tab:blue",
    "cuda": "navy",
    "torch": "tab:cyan",
    "open_clip per slot": "tab:orange",
    "flattened": "tab:green",
    "torch.compile": "tab:red",
    "chunked": "tab:purple",
    "Inf-CL": "tab:brown",
    "memeff": "tab:olive",
}
OWN_PEERS = ["tab:pink", "black", "tab:gray"]  # of --peer, in the order in which they come


def curves(results: dict) -> dict[tuple[int, str], dict[str, list[tuple[int, float, float]]]]:
    """{(K, dtype): {provider: [(N, seconds, peak MB), ...]}} of forward and backward."""
    points: dict = defaultdict(lambda: defaultdict(list))
    for case in results["benchmarks"]:
        params = case.get("params") or {}
        if not case["name"].startswith("test_contrastive") or params["phase"] == "forward":
            continue
        n, k, _ = params["shape"]
        points[k, params["dtype"]][params["provider"]].append(
            (n, case["stats"]["median"], case["extra_info"].get("peak_mb", 0.0))
        )
    return {key: {name: sorted(values) for name, values in providers.items()} for key, providers in points.items()}


def main(source: str, target: str) -> None:
    """Draw, or say why there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = curves(json.loads(Path(source).read_text()))
    if not panels:
        sys.exit(f"{source}: no test_contrastive in it")
    own = [name for providers in panels.values() for name in providers if name not in COLORS]
    colors = COLORS | dict(zip(dict.fromkeys(own), OWN_PEERS * len(own), strict=False))
    figure, axes = plt.subplots(2, len(panels), figsize=(4.5 * len(panels), 7), squeeze=False, layout="constrained")
    for column, ((k, dtype), providers) in enumerate(sorted(panels.items())):
        for name, points in providers.items():
            ours = name in OURS
            label = f"dreamlip_kernels, {name}" if ours else name
            style = dict(
                marker="o",
                color=colors[name],
                linewidth=2.5 if ours else 1,
                linestyle="-" if ours else "--",
                label=label,
            )
            n, seconds, peak = zip(*points, strict=True)
            axes[0][column].plot(n, [1e3 * value for value in seconds], **style)
            axes[1][column].plot(n, [max(value, 1.0) for value in peak], **style)
        for row, label in enumerate(("ms, forward + backward", "peak MB beyond inputs")):
            axes[row][column].set(xscale="log", yscale="log", xlabel="N", ylabel=label, title=f"K = {k}, {dtype}")
            axes[row][column].grid(True, which="both", alpha=0.2)
            sizes = sorted({n for points in providers.values() for n, *_ in points})
            axes[row][column].set_xticks(sizes, [str(n) for n in sizes])
            axes[row][column].set_xticks([], minor=True)
    entries = {
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:3])
