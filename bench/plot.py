"""The README's plot: speed-up of a training step against density, a line per block size, with the break-even marked."""

from pathlib import Path

import matplotlib
import numpy as np
from pandas import DataFrame

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


def path_for(results: Path) -> Path:
    return results.with_suffix(".png")


def draw(rows: DataFrame, conditions: str, path: Path) -> None:
    rows = rows[(rows["name"] == "step") & (rows.threads == 1) & (rows.out_features == 1024)]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.6), sharey=True, layout="constrained")
    for axis, (tokens, panel) in zip(axes, rows.groupby("tokens"), strict=True):
        lines = panel.pivot_table(index="density", columns="block_size", values="ratio")
        for block_size, color in zip(lines, pyplot.cm.viridis(np.linspace(0, 0.92, lines.shape[1])), strict=True):
            ratios = lines[block_size].dropna()
            crossing = break_even(ratios.index.to_numpy(), ratios.to_numpy())
            label = f"{block_size}" if crossing is None else f"{block_size}, even at {crossing:.2g}"
            axis.plot(ratios.index, ratios, "o-", ms=3.5, lw=1.5, color=color, label=label)
            if crossing is not None:
                axis.plot(crossing, 1, "D", ms=7, mfc="white", color=color, zorder=3)
        axis.axhline(1, color="black", lw=1)
        axis.set(xscale="log", yscale="log", title=f"{tokens} tokens", xlabel="density (live blocks / all blocks)")
        axis.set_xticks(lines.index, [f"{d:g}" for d in lines.index])
        axis.set_yticks([0.5, 1, 2, 4, 8, 16, 32], ["0.5x", "dense", "2x", "4x", "8x", "16x", "32x"])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.invert_xaxis()
        axis.legend(title="block size", ncols=2, fontsize=8, loc="upper left")
    axes[0].set_ylabel("speed-up over nn.Linear")
    figure.suptitle("Training step (forward + backward + Adam) of a 1024 x 1024 layer, one thread")
    figure.supxlabel(f"Diamonds: as fast as dense. Medians of paired ratios.\n{conditions}", size=7)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def break_even(densities: np.ndarray, ratios: np.ndarray) -> float | None:
    """Highest density up to which sparse is as fast as dense, between two measured ones on logarithmic scales."""
    below = np.flatnonzero(ratios < 1)
    if not len(below) or below[0] == 0:
        return None
    low, high = below[0] - 1, below[0]
    share = np.log(ratios[low]) / np.log(ratios[low] / ratios[high])
    return float(np.exp(np.log(densities[low]) * (1 - share) + np.log(densities[high]) * share))
