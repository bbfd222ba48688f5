"""Compare finished runs with the paper: python rl/report.py bench/results/rl runs --plots plots.

Runs that differ in anything but suite, agent, treatment and seed are never put into one table. An unfinished run is
named and left out.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import tyro
from rich.table import Table

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # started as a script: the checkout is where `rl` is

from rl.config import PARTS, Config, SETConfig
from rl.envs import SUITES
from rl.reporting.iqm import interval, iqm
from rl.reporting.paper import TABLE, TABLE_MT10, Score
from rl.reporting.runs import Run, find, identity

CELL = (
    "suite",
    "agent",
    "treatment",
    "networks",
    "density",
    "block_size",
    "ticket",
)  # what tells cells of a table apart
MINIGRID, MT10 = Config(timesteps=400_000), Config(suite="mt10", agent="mtsac", timesteps=2_000_000)  # the paper's
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


@dataclass(frozen=True)
class Report:
    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("bench/results/rl"),)
    """Folders to look for runs in, at any depth."""
    plots: Path | None = None
    """Draw learning curves and metrics into this folder, a PNG per suite and agent."""


@dataclass(frozen=True)
class Cell:
    """The finished runs of one experiment, one per seed."""

    config: Config
    runs: list[Run]

    @property
    def seeds(self) -> list[int]:
        return [run.config.seed for run in self.runs]

    @property
    def scores(self) -> np.ndarray:
        """Scores of the final evaluation, [runs, tasks]: normalised return, on MT10 success."""
        return np.array([run.evaluated.iloc[-1][[f"score/{task}" for task in self.tasks]] for run in self.runs], float)

    @property
    def tasks(self) -> list[str]:
        return [task.name for task in SUITES[self.config.suite]]

    @property
    def name(self) -> str:
        """The treatment, and its options that are not the paper's defaults."""
        options = [f"density {self.config.density:g}"] * (self.config.density != Config.density)
        options += [f"block {self.config.block_size}"] * (self.config.block_size != Config.block_size)
        options += [f"{self.config.networks} only"] * (self.config.networks != Config.networks)
        if self.config.treatment == "set":
            options += [f"initial {self.config.set.initial}"] * (self.config.set.initial != SETConfig.initial)
        return ", ".join([self.config.treatment, *options])

    def typical(self, metric: str) -> float:
        """Of times, which other work on the machine disturbs: median over evaluations, mean over runs; 0 of what never
        happened, as a rewire in a run that is evaluated only at its end."""
        return np.mean([run.evaluated[metric].median() if metric in run.evaluated else 0 for run in self.runs])

    def last(self, metric: str) -> float:
        """Mean over runs, at the final evaluation; NaN where it is not taken."""
        return np.mean([run.evaluated[metric].iloc[-1] if metric in run.evaluated else np.nan for run in self.runs])

    @property
    def core_minutes(self) -> float:
        """Time of one run, from what its parts typically took."""
        config, steps = self.config, self.config.timesteps * len(self.tasks)
        evaluation = (self.typical("time/evaluate_ms") + self.typical("time/metrics_ms")) / 1e3
        seconds = steps / self.typical("time/steps_per_second") + len(self.runs[0].evaluated) * evaluation
        if config.algorithm != "sac":  # whose steps per second count the updates in
            fit = (self.typical("time/update_ms") + self.typical("time/rewire_ms")) / 1e3
            seconds += config.timesteps / getattr(config, config.algorithm).rollout_steps * fit
        return seconds / 60


def main() -> None:
    report = tyro.cli(Report, description=__doc__, prog="python rl/report.py")
    runs = find(report.runs)
    for run in runs:
        if not run.finished:
            print(f"left out, at timestep {run.clock:,} of {run.config.timesteps:,}: {run.folder}")
    tables = by_protocol(run for run in runs if run.finished)
    if not tables:
        sys.exit(f"report.py: no finished run in {', '.join(map(str, report.runs))}")
    for number, (protocol, cells) in enumerate(tables.items(), 1):
        show(protocol, cells)
        if report.plots:
            for file in draw(protocol, cells, report.plots, number):
                print(file)


def by_protocol(runs: Iterable[Run]) -> dict[Config, list[Cell]]:
    """Cells under what they have in common; a run that is there twice counts once."""
    found = {identity(run.config): run for run in runs}
    cells = defaultdict(list)
    for config in sorted(found, key=lambda config: (config.suite, config.agent, order(config), config.seed)):
        cells[replace(config, seed=0)].append(found[config])
    tables = defaultdict(list)
    for config, of_cell in cells.items():
        common = replace(config, **{name: getattr(of_paper(config), name) for name in CELL})
        common = replace(common, set=replace(common.set, initial=SETConfig.initial))
        tables[common].append(Cell(config, of_cell))
    return dict(tables)


def of_paper(config: Config) -> Config:
    """The paper's protocol for runs like this one."""
    return MT10 if config.suite == "mt10" else MINIGRID


def papers_seeds(config: Config) -> int:
    return 10 if of_paper(config) is MT10 else 30


def order(config: Config) -> tuple:
    """Treatments as the command line lists them."""
    treatments = Config.__dataclass_fields__["treatment"].type.__args__
    return treatments.index(config.treatment), -config.density, config.block_size, config.networks, config.set.initial


def describe(protocol: Config) -> str:
    """What the runs of a table have in common, as far as it is not the paper's."""
    length = f"{protocol.timesteps:,} timesteps"
    if of_paper(protocol) is MT10:
        length += f" ({protocol.timesteps * len(SUITES['mt10']):,} environment steps)"
    changed = settings(protocol).items() - settings(identity(of_paper(protocol))).items()
    changes = ", ".join(f"{name} {value}" for name, value in sorted(changed) if name != "timesteps")
    shorter = f"; not the paper's protocol{': ' if changes else ''}{changes}"
    return length + (shorter if changed else ", the paper's protocol")


def settings(config: Config) -> dict[str, object]:
    """By name, as on the command line."""
    values = asdict(config)
    parts = {f"{name}.{option}": value for name in PARTS for option, value in values.pop(name).items()}
    return values | parts


def differs(name: str, protocol: Config) -> bool:
    return getattr(protocol, name) != getattr(identity(of_paper(protocol)), name)


def show(protocol: Config, cells: list[Cell]) -> None:
    """Print scores beside the paper's, then what the networks were like and what a run cost."""
    from rich.console import Console

    comparable = not any(differs(f.name, protocol) for f in fields(Config))
    mt10 = of_paper(protocol) is MT10
    scores = Table("suite", "agent", "treatment", "seeds", "IQM of runs", "IQM of runs x tasks")
    scores.add_column(f"paper, {papers_seeds(protocol)} seeds")
    scores.title = f"{'success' if mt10 else 'normalised score'} after {describe(protocol)}"
    scores.caption = (
        "IQM [95% bootstrap interval]; of runs: of each run's mean over tasks, which the paper's numbers fit"
    )
    metrics = Table("suite", "agent", "treatment", "dormant actor", "critic", "rank actor", "critic", "Fisher")
    metrics.title, metrics.caption = "networks at the final evaluation", "means over seeds"
    costs = Table("suite", "agent", "treatment", "live / dense", "update ms", "acting ms", "steps/s", "core-minutes")
    costs.title, costs.caption = (
        "cost",
        "medians over a run, means over seeds; update and acting of one rollout (mtsac: timestep)",
    )
    for cell in cells:
        config, by_task = cell.config, cell.scores
        head = (config.suite, config.agent, cell.name)
        paper = reference(cell) if comparable else None
        scores.add_row(
            *head,
            ", ".join(map(str, cell.seeds)),
            with_interval(by_task.mean(1, keepdims=True)),
            with_interval(by_task),
            f"{paper.iqm:.2f} [{paper.low:.2f}, {paper.high:.2f}]" if paper else "",
        )
        dormant = [f"{cell.last(f'dormant/{network}'):.1%}".replace("nan%", "") for network in ("actor", "critic")]
        ranks = [f"{cell.last(f'rank/{network}'):.0f}".replace("nan", "") for network in ("actor", "critic")]
        metrics.add_row(*head, *dormant, *ranks, f"{cell.last('fisher/actor'):.3g}")
        times = [f"{cell.typical(f'time/{name}'):,.2f}" for name in ("update_ms", "acting_ms")]
        times.append(f"{cell.typical('time/steps_per_second'):,.0f}")
        costs.add_row(*head, f"{cell.last('sparse/density'):.3f}", *times, f"{cell.core_minutes:.1f}")
    for suite, alone in single_task(cells).items():
        scores.add_row(
            suite,
            "single-task",
            "dense",
            f"{len(alone)} of each",
            with_interval(alone.mean(1, keepdims=True)),
            with_interval(alone),
        )
    console = Console(width=None if sys.stdout.isatty() else 130)
    for table in (scores, *task_tables(cells), metrics, costs):
        console.print(table)
    for line in orderings(cells) if comparable else paper_elsewhere(protocol):
        console.print(line)


def task_tables(cells: list[Cell]) -> Iterator[Table]:
    """What each task of a suite earned, in a table per suite and agent."""
    for (suite, agent), of_group in groups(cells).items():
        table = Table(
            "task", *(cell.name for cell in of_group), title=f"{suite}, {agent}: score by task, mean of seeds"
        )
        for number, task in enumerate(of_group[0].tasks):
            table.add_row(task, *(f"{cell.scores[:, number].mean():.2f}" for cell in of_group))
        yield table


def groups(cells: list[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """Cells by suite and agent."""
    found = defaultdict(list)
    for cell in cells:
        found[cell.config.suite, cell.config.agent].append(cell)
    return found


def paper_elsewhere(protocol: Config) -> Iterator[str]:
    """The paper's table of MT10 in words, for runs that follow another protocol and are not comparable with it."""
    if of_paper(protocol) is MT10:
        scores = (f"{name} {score.iqm:.2f} [{score.low:.2f}, {score.high:.2f}]" for name, score in TABLE_MT10.items())
        yield f"Not comparable, for scale: the paper's mtsac after {MT10.timesteps:,} timesteps: {', '.join(scores)}"


def single_task(cells: list[Cell]) -> dict[str, np.ndarray]:
    """The reference line: scores [runs, tasks] of networks trained on one task each, for suites that have them all."""
    of_task = {cell.config.suite: cell.scores for cell in cells if cell.config.treatment == "dense"}
    lines = {}
    for suite in ("mt3", "mt5", "mt7"):
        parts = [of_task.get(task.name) for task in SUITES[suite]]
        if all(part is not None for part in parts):
            runs = min(map(len, parts))
            lines[suite] = np.hstack([part[:runs] for part in parts])
    return lines


def with_interval(scores: np.ndarray) -> str:
    """The IQM of scores [runs, strata] and, of more than one run, its interval."""
    value = f"{iqm(scores.flatten()):.3f}"
    if len(scores) == 1:
        return value
    low, high = interval(scores)
    return f"{value} [{low:.3f}, {high:.3f}]"


def reference(cell: Cell) -> Score | None:
    """The paper's score of this cell, if it has one."""
    config = cell.config
    if config.agent == "mtsac":
        names, score = ("treatment", "networks"), TABLE_MT10.get(cell.name)
    else:
        names, score = (
            ("suite", "agent", "treatment", "ticket"),
            TABLE.get((config.agent, config.suite, config.treatment)),
        )
    standard = replace(of_paper(config), **{name: getattr(config, name) for name in names})
    return score if identity(standard) == config else None


def orderings(cells: list[Cell]) -> list[str]:
    """Where the paper's order of a treatment and the dense network appears in these runs, and where not."""
    dense = {(c.config.suite, c.config.agent): c for c in cells if c.config.treatment == "dense"}
    lines = []
    for cell in cells:
        base, paper = dense.get((cell.config.suite, cell.config.agent)), reference(cell)
        if cell is base or base is None or paper is None:
            continue
        ours = iqm(cell.scores.mean(1)) - iqm(base.scores.mean(1))
        theirs = paper.iqm - reference(base).iqm
        if theirs == 0:
            verdict = "the paper sees no difference"
        else:
            verdict = "the paper's order appears" if ours * theirs > 0 else "the paper's order does not appear"
        lines.append(
            f"{cell.config.suite} {cell.config.agent}: {cell.name} - dense = {ours:+.3f}, paper {theirs:+.2f}: "
            f"{verdict} ({len(cell.runs)} and {len(base.runs)} seeds{apart(cell, base)})"
        )
    fewest = min(len(cell.runs) for cell in cells)
    if lines and fewest < 10:
        lines.append(
            f"Some cells have {fewest} seed{'s' * (fewest > 1)}, the paper {papers_seeds(cells[0].config)}: "
            "none of this proves anything by itself."
        )
    return lines


def apart(one: Cell, other: Cell) -> str:
    """Whether the intervals of two cells overlap, in words; nothing where a single run has no interval."""
    if min(len(one.runs), len(other.runs)) == 1:
        return ""
    (low1, high1), (low2, high2) = (interval(cell.scores.mean(1, keepdims=True)) for cell in (one, other))
    return ", intervals overlap" if low1 <= high2 and low2 <= high1 else ", intervals are apart"


def draw(protocol: Config, cells: list[Cell], folder: Path, number: int) -> list[Path]:
    """Draw the curves of every suite and agent: a line per treatment, the mean of its seeds; their range is shaded.

    Files are named by the number of the protocol among those reported.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for (suite, agent), of_group in groups(cells).items():
        figure, axes = pyplot.subplots(2, 4, figsize=(20, 8), sharex=True, layout="constrained")
        for axis, (metric, label) in zip(axes.flat, CURVES.items(), strict=True):
            for cell in of_group:
                if metric not in cell.runs[0].evaluated:
                    continue
                curves = np.array([run.evaluated[metric].to_numpy() for run in cell.runs])
                steps = cell.runs[0].evaluated.index / 1000
                seeds = f"{len(cell.runs)} seed{'s' * (len(cell.runs) > 1)}"
                (line,) = axis.plot(steps, curves.mean(0), marker=".", label=f"{cell.name} ({seeds})")
                axis.fill_between(steps, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
            axis.set_title(label)
            axis.grid(alpha=0.3)
        for axis in axes[1]:
            axis.set_xlabel("thousand timesteps")
        axes[1, 2].set_yscale("log")
        axes[0, 0].legend()
        figure.suptitle(
            f"{suite.upper()}, {agent.upper()}: {describe(protocol)}. Line: mean of seeds; shaded: their range"
        )
        written.append(folder / f"{number}-{suite}-{agent}.png")
        figure.savefig(written[-1], dpi=80)
        pyplot.close(figure)
    return written


if __name__ == "__main__":
    main()
