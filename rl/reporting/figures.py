"""Figures: all that are drawn of the runs of one protocol, for the page and as PNGs."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from rl.config import Config
from rl.reporting.cells import MT10, Cell, groups, of_paper, protocol_title
from rl.reporting.curves import CURVES, small_multiples
from rl.reporting.scores import improvements, points, profiles

INK = "#222221"  # of text and axes; the page puts its own in this colour's place
PARTS = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
STYLE = dict.fromkeys(PARTS, INK) | {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}


def figures(protocol: Config, cells: list[Cell]) -> dict[str, Figure]:
    """All figures, by a name for their file: of every suite its scores, of every suite and agent the others."""
    with matplotlib.rc_context(STYLE):
        drawn, title = {}, protocol_title(protocol)
        for suite in dict.fromkeys(cell.config.suite for cell in cells):
            of_suite = [cell for cell in cells if cell.config.suite == suite]
            drawn[f"{suite}-scores"] = points(of_suite, f"{suite.upper()}, final scores")
        for (suite, agent), of_group in groups(cells).items():
            name, file = f"{suite.upper()}, {agent.upper()}", f"{suite}-{agent}"
            drawn[f"{file}-profiles"] = profiles(of_group, f"{name}: distribution of final scores, runs x tasks")
            drawn[f"{file}-improvement"] = improvements(
                of_group, f"{name}: a run of one scores higher than the other's"
            )
            tasks = {f"score/{task}": task for task in of_group[0].tasks}
            if len(tasks) > 1:
                drawn[f"{file}-tasks"] = small_multiples(
                    of_group, tasks, f"{name}, {of_group[0].score} by task: {title}"
                )
            logged = {name for cell in of_group for name in cell.runs[0].evaluated}
            curves = {metric: label for metric, label in CURVES.items() if metric in logged}
            if of_paper(protocol) is MT10:
                del curves["score/mean"]  # it is the success
            drawn[file] = small_multiples(of_group, curves, f"{name}: {title}")
        return {file: figure for file, figure in drawn.items() if figure}


def draw(protocol: Config, cells: list[Cell], folder: Path, number: int) -> list[Path]:
    """Write all figures as PNGs.

    Args:
        number: of the protocol among those reported; files are named by it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = {folder / f"{number}-{name}.png": figure for name, figure in figures(protocol, cells).items()}
    for file, figure in written.items():
        figure.savefig(file, dpi=80, facecolor="white")
    return list(written)
