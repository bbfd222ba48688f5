"""Curves over a run: a panel per metric, a line per treatment."""

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rl.reporting.cells import Cell
from rl.reporting.conclusions import IQM_RUNS
from rl.reporting.statistics import band, iqm

CURVES = {
    "score/mean": "normalised score",
    "success/mean": "success",
    "dormant/actor": "dormant neurons, actor",
    "dormant/critic": "dormant neurons, critic",
    "rank/actor": "effective rank, actor",
    "rank/critic": "effective rank, critic",
    "fisher/actor": "Fisher trace, actor",
    "sparse/density": "live / dense parameters",
}
# what an axis shows at least, the same in every figure: a thousandth of dormant neurons is no finding
SCALES = {"dormant": (0, 0.05), "rank": (0, 400), "fisher": (1, 1000)}
SHARE = (-0.03, 1.03)  # of scores, successes and densities


def small_multiples(cells: list[Cell], curves: dict[str, str], title: str) -> Figure:
    """Draw a panel for each of these metrics, by its label."""
    columns = 5 if len(curves) % 4 and len(curves) % 5 == 0 else min(4, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.7 * rows + 1.2), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (metric, label) in zip(axes.flat, curves.items(), strict=False):
        panel(axis, cells, metric)
        axis.set_title(label)
        axis.grid(alpha=0.2)
    for axis in axes.flat[len(curves) :]:
        axis.remove()
    for axis in axes.flat[max(len(curves) - columns, 0) : len(curves)]:  # the lowest of each column
        axis.set_xlabel("thousand timesteps")
    lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(len(lines), 4), frameon=False)
    few = any(len(cell.runs) < IQM_RUNS for cell in cells)
    figure.suptitle(
        f"{title}\nline: IQM of seeds{', of fewer than four their mean' if few else ''}; shaded: its 95% interval"
    )
    return figure


def panel(axis: Axes, cells: Iterable[Cell], metric: str) -> None:
    """Draw one metric of all cells that have it, on a scale that fits what it is."""
    kind = metric.partition("/")[0]
    lowest, highest = SCALES.get(kind, SHARE)
    for number, cell in enumerate(cells):
        if metric not in cell.runs[0].evaluated:
            continue
        values = np.array([run.evaluated[metric].to_numpy() for run in cell.runs])
        steps = cell.runs[0].evaluated.index / 1000
        line = iqm(values.T)
        # a cell has its colour in all panels, also where another one is not measured
        style = {"color": f"C{number}", "marker": "." if len(steps) == 1 else None, "linewidth": 1.2}
        axis.plot(steps, line, label=cell.label, **style)
        low, high = band(values)  # of one run, the run
        axis.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
        lowest, highest = min(lowest, low.min()), max(highest, 1.05 * high.max())
    if kind == "fisher":
        axis.set_yscale("log")
    if kind == "dormant":
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set_ylim(lowest, highest)
