"""Plots: curves over a run, a line per treatment."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from rl.config import Config
from rl.reporting.cells import MT10, Cell, groups, of_paper, protocol_title

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
DORMANT = 0.05  # what the axis of a share of dormant neurons reaches at least: a thousandth is no finding


def draw(protocol: Config, cells: list[Cell], folder: Path, number: int) -> list[Path]:
    """Draw every suite and agent: one file of means over tasks and of metrics, and one of the tasks' own curves.

    Args:
        number: of the protocol among those reported; files are named by it.
    """
    import matplotlib

    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for (suite, agent), of_group in groups(cells).items():
        name, file = f"{suite.upper()}, {agent.upper()}", f"{number}-{suite}-{agent}"
        logged = {name for cell in of_group for name in cell.runs[0].evaluated}
        curves = {metric: label for metric, label in CURVES.items() if metric in logged}
        if of_paper(protocol) is MT10:
            del curves["score/mean"]  # it is the success
        written.append(small_multiples(of_group, curves, f"{name}: {protocol_title(protocol)}", folder / f"{file}.png"))
        tasks = {f"score/{task}": task for task in of_group[0].tasks}
        if len(tasks) > 1:
            title = f"{name}, {of_group[0].score} by task: {protocol_title(protocol)}"
            written.append(small_multiples(of_group, tasks, title, folder / f"{file}-tasks.png"))
    return written


def small_multiples(cells: list[Cell], curves: dict[str, str], title: str, file: Path) -> Path:
    """Draw a panel for each of these metrics, by its label; the lines are means of seeds, their range is shaded."""
    from matplotlib import pyplot

    columns = 5 if len(curves) % 4 and len(curves) % 5 == 0 else min(4, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4 * columns, 3.2 * rows + 1), squeeze=False, layout="constrained"
    )
    for axis, (metric, label) in zip(axes.flat, curves.items(), strict=False):
        panel(axis, cells, metric)
        axis.set_title(label)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(curves) :]:
        axis.remove()
    for axis in axes.flat[max(len(curves) - columns, 0) : len(curves)]:  # the lowest of each column
        axis.set_xlabel("thousand timesteps")
    lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(len(lines), 5), frameon=False)
    figure.suptitle(f"{title}\nline: mean of seeds; shaded: their range")
    figure.savefig(file, dpi=80)
    pyplot.close(figure)
    return file


def panel(axis, cells: Iterable[Cell], metric: str) -> None:
    """Draw one metric of all cells that have it, on a scale that fits what it is."""
    from matplotlib.ticker import PercentFormatter

    highest = 0.0
    for number, cell in enumerate(cells):
        if metric not in cell.runs[0].evaluated:
            continue
        values = np.array([run.evaluated[metric].to_numpy() for run in cell.runs])
        steps = cell.runs[0].evaluated.index / 1000
        seeds = f"{len(cell.runs)} seed{'s' * (len(cell.runs) > 1)}"
        # a cell has its colour in all panels, also where another one is not measured
        line = {"color": f"C{number}", "marker": ".", "markersize": 4, "linewidth": 1.2}
        axis.plot(steps, values.mean(0), label=f"{cell.name} ({seeds})", **line)
        axis.fill_between(steps, values.min(0), values.max(0), color=line["color"], alpha=0.15, linewidth=0)
        highest = max(highest, values.max())
    kind = metric.partition("/")[0]
    if kind == "dormant":
        axis.set_ylim(0, max(DORMANT, 1.05 * highest))
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    elif kind == "fisher":
        axis.set_yscale("log")
    elif kind == "rank":
        axis.set_ylim(bottom=0)
    else:  # scores, successes and densities are shares
        axis.set_ylim(-0.03, max(1.03, 1.03 * highest))
