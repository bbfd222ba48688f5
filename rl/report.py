"""Compare finished runs with the paper: python rl/report.py bench/results/rl runs --html report.html.

A table holds runs of one length and with the same settings, but for suite, agent, seed, treatment, and what the name of
its row says: density, block size, networks, first weights, pruning interval. An unfinished run is named and left out.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # started as a script: the checkout is where `rl` is

from rl.reporting.cells import by_protocol
from rl.reporting.figures import draw
from rl.reporting.page import write
from rl.reporting.runs import find
from rl.reporting.tables import show


@dataclass(frozen=True)
class Report:
    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("bench/results/rl"),)
    """Folders to look for runs in, at any depth."""
    plots: Path | None = None
    """Draw the page's figures as PNGs into this folder: scores, distributions, improvement, tasks, and metrics."""
    html: Path | None = None
    """Write one page that holds everything: figures, tables, and the command and commit of every run."""


def main() -> None:
    report = tyro.cli(Report, description=__doc__, prog="python rl/report.py")
    runs = find(report.runs)
    left_out = [run for run in runs if not run.finished]
    for run in left_out:
        print(f"left out, at timestep {run.clock:,} of {run.config.timesteps:,}: {run.folder}")
    tables = by_protocol(run for run in runs if run.finished)
    if not tables:
        sys.exit(f"report.py: no finished run in {', '.join(map(str, report.runs))}")
    for number, (protocol, cells) in enumerate(tables.items(), 1):
        show(protocol, cells)
        if report.plots:
            for file in draw(protocol, cells, report.plots, number):
                print(file)
    if report.html:
        write(tables, left_out, report.html)
        print(report.html)


if __name__ == "__main__":
    main()
