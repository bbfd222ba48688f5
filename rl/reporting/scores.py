"""Figures of final scores, as rliable draws them: points with intervals, distributions, probability of improvement."""

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend

from rl.reporting.cells import Cell, groups, papers_seeds, reference
from rl.reporting.conclusions import IQM_RUNS, pairs
from rl.reporting.statistics import improvement, interval, iqm, profile

PAPER = "0.5"  # the colour of what is not ours


def points(cells: list[Cell], title: str) -> Figure:
    """Draw a row per cell: the IQM of its runs with its interval, every run, and the paper's interval below."""
    figure, axis = rows(len(cells), title)
    agents = len({cell.config.agent for cell in cells}) > 1
    numbered = [(number, cell) for of_group in groups(cells).values() for number, cell in enumerate(of_group)]
    for y, (number, cell) in enumerate(numbered):
        colour, by_run = f"C{number}", cell.by_run
        few = len(cell.runs) < IQM_RUNS
        ours = (iqm(by_run[:, 0]), *(interval(by_run) if len(by_run) > 1 else ()))
        label = "mean of fewer than four runs" if few else "IQM of runs, 95% interval"
        point(axis, ours, y - 0.12, label, color=colour, marker="o", fillstyle="none" if few else "full")
        axis.plot(by_run, [y - 0.12] * len(by_run), "|", color=colour, alpha=0.6, markersize=11, label="a run")
        if paper := reference(cell):
            label = f"paper, {papers_seeds(cell.config)} seeds, 95% interval"
            point(axis, paper, y + 0.22, label, color=PAPER, marker="s")
    names = [f"{cell.config.agent}, {cell.label}" if agents else cell.label for _, cell in numbered]
    axis.set_yticks(range(len(cells)), names)
    axis.set_xlabel(f"{cells[0].score}, mean over tasks")
    for mark in legend(figure, axis).legend_handles:  # which stand for all cells
        if mark.get_color() != PAPER:
            mark.set_color(rcParams["text.color"])
    return figure


def profiles(cells: list[Cell], title: str) -> Figure | None:
    """Draw the share of runs x tasks above every score, for cells of enough runs to speak of a distribution."""
    enough = [(number, cell) for number, cell in enumerate(cells) if len(cell.runs) >= IQM_RUNS]
    if not enough:
        return None
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    levels = np.linspace(0, 1, 101)
    for number, cell in enough:
        share, band = profile(cell.scores, levels)
        axis.plot(levels, share, color=f"C{number}", label=cell.label)
        axis.fill_between(levels, *band, color=f"C{number}", alpha=0.15, linewidth=0)
    axis.set(xlim=(0, 1), ylim=(0, 1.03), xlabel=f"{cells[0].score} of a task in a run", ylabel="share above it")
    axis.grid(alpha=0.2)
    figure.suptitle(f"{title}\nshaded: 95% interval")
    legend(figure, axis)
    return figure


def improvements(cells: list[Cell], title: str) -> Figure | None:
    """Draw how probably a run of one cell scores higher than one of another, for all pairs that may be compared."""
    compared = pairs(cells)
    if not compared:
        return None
    figure, axis = rows(len(compared), title)
    axis.axvline(0.5, color=PAPER, linestyle="--", linewidth=1)
    for y, (cell, before) in enumerate(compared):
        point(
            axis, improvement(cell.by_run, before.by_run), y - 0.12, "of runs' means over tasks", color="C0", marker="o"
        )
        by_task = improvement(cell.scores, before.scores)
        point(axis, by_task, y + 0.18, "of each task, mean over tasks", color="C1", marker="D")
    axis.set_yticks(range(len(compared)), [f"{cell.name} > {before.name}" for cell, before in compared])
    axis.set_xlabel("probability, with 95% interval; one half (dashed): no difference")
    legend(figure, axis)
    return figure


def rows(number: int, title: str) -> tuple[Figure, Axes]:
    """An empty figure with so many rows, the first on top, whose scale is from 0 to 1."""
    figure = Figure(figsize=(8, 1.7 + 0.5 * number), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(0, 1), ylim=(number - 0.5, -0.5))
    axis.grid(axis="x", alpha=0.2)
    figure.suptitle(title)
    return figure, axis


def point(axis: Axes, estimate: tuple[float, ...], y: float, label: str, **style) -> None:
    """Draw a value and, if it has one, its interval."""
    value, *bounds = estimate
    axis.plot([value], [y], linestyle="none", label=label, **style)
    if bounds:
        axis.plot(bounds, [y, y], color=style["color"], linewidth=4, alpha=0.4, solid_capstyle="butt")


def legend(figure: Figure, axis: Axes) -> Legend:
    """Explain every kind of mark once."""
    handles, labels = axis.get_legend_handles_labels()
    kinds = dict(zip(labels, handles, strict=True))
    return figure.legend(
        kinds.values(), kinds.keys(), loc="outside lower center", ncols=min(len(kinds), 4), frameon=False
    )
