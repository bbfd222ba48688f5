"""The plots of the results: speed-up against density with the break-even marked, share of the bound, memory."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
from pandas import DataFrame, Series

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import PercentFormatter  # noqa: E402

WIDE = 2048  # tokens, of a CPU


def path_for(results: Path) -> Path:
    return results.with_suffix(".png")


def steps(rows: DataFrame) -> DataFrame:
    """Training steps of one layer by density: with Adam on a CPU, without on a GPU, where a graph replays them."""
    if of_gpu(rows):
        return widest(rows[rows.suite == "gradients"])
    rows = rows[(rows.suite == "layer") & (rows["name"] == "step") & (rows.threads == 1)]
    return rows[rows.out_features == 1024]


def of_gpu(rows: DataFrame) -> bool:
    """A CPU's results name its instruction set."""
    return "instruction_set" not in rows or rows.instruction_set.isna().all()


def widest(rows: DataFrame) -> DataFrame:
    """Of a GPU's: replays of the layer that was measured at most densities, in 16 bits."""
    rows = rows[(rows.clock == "graph") & rows.arithmetic.isin(["bfloat16", "float16"])]
    return rows[rows.out_features.isin(rows.out_features.mode()[:1])]


def draw(rows: DataFrame, conditions: str, path: Path) -> None:
    """Everything of one device."""
    (draw_gpu if of_gpu(rows) else draw_cpu)(rows, conditions, path)


def draw_cpu(rows: DataFrame, conditions: str, path: Path) -> None:
    own = steps(rows)
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 8.8), layout="constrained")
    for axis, (tokens, panel) in zip(axes[0], own.groupby("tokens"), strict=True):
        speed_up(axis, panel)
        axis.set_title(f"Speed of a training step, {tokens} tokens")
    axes[0, 1].sharey(axes[0, 0])
    share_of_bound(axes[1, 0], own[own.tokens == WIDE])
    layers = rows[(rows.suite == "memory") & (rows.tokens == WIDE) & (rows.threads == 1) & (rows.out_features == 1024)]
    memory(axes[1, 1], layers)
    figure.suptitle("A 1024 x 1024 layer, one thread; a training step is forward + backward + Adam")
    save(figure, f"Diamonds: as fast as dense. Medians of paired ratios.\n{conditions}", path)


def draw_gpu(rows: DataFrame, conditions: str, path: Path) -> None:
    own = steps(rows)
    kernels = rows[(rows.suite == "products") & (rows["name"] == "three products") & (rows.backend == "triton")]
    kernels, counts = widest(kernels), sorted(own.tokens.unique())
    if not counts:
        return
    figure, axes = pyplot.subplots(1, len(counts), figsize=(5 * len(counts), 5), squeeze=False, layout="constrained")
    for axis, tokens in zip(axes[0], counts, strict=True):
        speed_up(axis, own[own.tokens == tokens])
        for _, ratios, color in by_block_size(kernels[kernels.tokens == tokens], "ratio"):
            axis.plot(ratios.index, ratios, ":", lw=1.2, color=color)
        axis.set_title(f"Speed of a training step, {tokens} tokens")
        axis.set_ylim(0.2, 24)
    case = own.iloc[0]
    figure.suptitle(
        f"A {case.out_features} x {case.in_features} layer, {case.arithmetic}; "
        "a training step is forward + both gradients, replayed as a CUDA graph"
    )
    save(
        figure,
        "Solid: SparseLinear as it comes. Dotted: the Triton kernels alone, also where the chooser takes the dense "
        f"path. Diamonds: as fast as dense.\n{conditions}",
        path,
    )


def draw_together(measured: dict[str, DataFrame], path: Path) -> None:
    """The README's plot: one panel for each device, its widest case."""
    figure, axes = pyplot.subplots(
        1, len(measured), figsize=(5 * len(measured), 4.6), squeeze=False, layout="constrained"
    )
    for axis, (name, rows) in zip(axes[0], measured.items(), strict=True):
        own = steps(rows)
        own = own[own.tokens == own.tokens.max()]
        speed_up(axis, own)
        case = own.iloc[0]
        axis.set_title(
            f"{name}\n{case.out_features} x {case.in_features}, {case.tokens} tokens, {case.arithmetic}", fontsize=10
        )
    figure.suptitle("Speed of a layer's training step over nn.Linear")
    save(figure, "Diamonds: as fast as dense. Medians.", path)


def save(figure, small_print: str, path: Path) -> None:
    figure.supxlabel(small_print, size=7)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def speed_up(axis: Axes, steps: DataFrame) -> None:
    for block_size, ratios, color in by_block_size(steps, "ratio"):
        crossing = break_even(ratios.index.to_numpy(), ratios.to_numpy())
        label = f"{block_size}" if crossing is None else f"{block_size}, even at {crossing:.2g}"
        axis.plot(ratios.index, ratios, "o-", ms=3.5, lw=1.5, color=color, label=label)
        if crossing is not None:
            axis.plot(crossing, 1, "D", ms=7, mfc="white", color=color, zorder=3)
    axis.axhline(1, color="black", lw=1)
    axis.set_yscale("log")
    axis.minorticks_off()
    axis.set_yticks([0.5, 1, 2, 4, 8, 16, 32], ["0.5x", "dense", "2x", "4x", "8x", "16x", "32x"])
    axis.set_ylabel("speed-up over nn.Linear")
    over_density(axis, steps)
    axis.legend(title="block size", ncols=2, fontsize=8, loc="upper left")


def share_of_bound(axis: Axes, steps: DataFrame) -> None:
    """nn.Linear's share comes from density 1, where both have the same work."""
    axis.set_title(f"Share of the roofline bound in a step, {WIDE} tokens")
    if not measured(axis, steps, "roofline"):
        return
    for block_size, shares, color in by_block_size(steps, "roofline"):
        axis.plot(shares.index, shares, "o-", ms=3.5, lw=1.5, color=color, label=f"{block_size}")
    full = steps[steps.density == 1]
    axis.axhline((full.roofline * full.time_us / full.partner_us).median(), color="black", lw=1, label="nn.Linear")
    axis.set(ylim=(0, 1), ylabel="bound / measured time")
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    over_density(axis, steps)
    axis.legend(title="block size", ncols=3, fontsize=8, loc="upper left")


def memory(axis: Axes, layers: DataFrame) -> None:
    axis.set_title(f"Memory in training, {WIDE} tokens")
    if not measured(axis, layers, "ours_peak_bytes"):
        return
    for kind, key, style in (("peak of a step", "_peak_bytes", "-"), ("between steps", "_bytes", "--")):
        axis.axhline(layers[f"dense{key}"].median() / 1e6, color="black", ls=style, lw=1, label=f"nn.Linear, {kind}")
        for density, color in ((0.1, "tab:blue"), (0.05, "tab:orange")):
            own = layers[layers.density == density].sort_values("block_size")
            label = f"density {density:g}, {kind}"
            axis.plot(own.block_size, own[f"ours{key}"] / 1e6, style, marker="o", ms=3.5, color=color, label=label)
    sizes = sorted(layers.block_size.unique())
    axis.set_xscale("log")
    axis.set_xticks(sizes, sizes)
    axis.minorticks_off()
    axis.set(xlabel="block size", ylabel="MB", ylim=(0, 1.5 * layers.dense_peak_bytes.max() / 1e6))
    axis.grid(alpha=0.25)
    axis.legend(ncols=2, fontsize=8, loc="upper left")


def measured(axis: Axes, rows: DataFrame, key: str) -> bool:
    """Whether there is something to draw; else the panel says that there is not."""
    found = key in rows and rows[key].notna().any()
    if not found:
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
        axis.set(xticks=[], yticks=[])
    return found


def by_block_size(steps: DataFrame, key: str) -> Iterator[tuple[int, Series, tuple]]:
    """Block size, values by density, and color of each line."""
    lines = steps.pivot_table(index="density", columns="block_size", values=key)
    for block_size, color in zip(lines, pyplot.cm.viridis(np.linspace(0, 0.92, lines.shape[1])), strict=True):
        yield block_size, lines[block_size].dropna(), color


def over_density(axis: Axes, steps: DataFrame) -> None:
    densities = sorted(steps.density.unique())
    axis.set_xscale("log")
    axis.set_xticks(densities, [f"{d:g}" for d in densities])
    axis.set_xlabel("density (live blocks / all blocks)")
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.invert_xaxis()


def break_even(densities: np.ndarray, ratios: np.ndarray) -> float | None:
    """Highest density up to which sparse is as fast as dense, between two measured ones on logarithmic scales."""
    below = np.flatnonzero(ratios < 1)
    if not len(below) or below[0] == 0:
        return None
    low, high = below[0] - 1, below[0]
    share = np.log(ratios[low]) / np.log(ratios[low] / ratios[high])
    return float(np.exp(np.log(densities[low]) * (1 - share) + np.log(densities[high]) * share))
