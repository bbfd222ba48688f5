"""Cells: the finished runs of one experiment, sorted into tables of runs that may be compared."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from rl.config import Config, GMPConfig, SETConfig, identity, settings
from rl.envs import SUITES
from rl.reporting.paper import TABLE, TABLE_MT10, Score
from rl.reporting.runs import Run

# what tells cells of a table apart, besides options of a treatment that have a part of the name
CELL = ("suite", "agent", "treatment", "networks", "density", "block_size", "ticket")
MINIGRID, MT10 = Config(timesteps=400_000), Config(suite="mt10", agent="mtsac", timesteps=2_000_000)  # the paper's


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
    def by_run(self) -> np.ndarray:
        """Mean over tasks of each run's scores, [runs, 1]: what the paper's numbers fit."""
        return self.scores.mean(1, keepdims=True)

    @property
    def score(self) -> str:
        """What the scores are."""
        return "success" if of_paper(self.config) is MT10 else "normalised score"

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
        if self.config.prunes:
            every = self.config.gmp.update_every
            options += [f"every {every}"] * (every != self.config.papers_gmp_update_every)
        return ", ".join([self.config.treatment, *options])

    @property
    def label(self) -> str:
        """In a figure."""
        return f"{self.name} ({len(self.runs)} seed{'s' * (len(self.runs) > 1)})"

    def typical(self, metric: str) -> float:
        """Of times, which other work on the machine disturbs: median over evaluations, mean over runs; 0 of what never
        happened, as a rewire in a run that is evaluated only at its end."""
        return np.mean([run.evaluated[metric].median() if metric in run.evaluated else 0 for run in self.runs])

    def last(self, metric: str) -> float:
        """Mean over runs, at the final evaluation; NaN where it is not taken."""
        return np.mean([run.evaluated[metric].iloc[-1] if metric in run.evaluated else np.nan for run in self.runs])

    @property
    def core_minutes(self) -> float:
        """Time of one run, from what its parts typically took, times its threads; processes that step environments or
        play evaluations come on top."""
        config, steps = self.config, self.config.timesteps * len(self.tasks)
        evaluation = (self.typical("time/evaluate_ms") + self.typical("time/metrics_ms")) / 1e3
        seconds = steps / self.typical("time/steps_per_second") + len(self.runs[0].evaluated) * evaluation
        if config.algorithm != "sac":  # whose steps per second count the updates in
            fit = (self.typical("time/update_ms") + self.typical("time/rewire_ms")) / 1e3
            seconds += config.timesteps / getattr(config, config.algorithm).rollout_steps * fit
        return seconds / 60 * np.mean([run.config.threads for run in self.runs])


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
        common = replace(common, gmp=replace(common.gmp, update_every=GMPConfig.update_every))
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


def protocol_title(protocol: Config) -> str:
    """What the runs of a table have in common, as far as it is not the paper's."""
    length = f"{protocol.timesteps:,} timesteps"
    if of_paper(protocol) is MT10:
        length += f" ({protocol.timesteps * len(SUITES['mt10']):,} environment steps)"
    changed = settings(protocol).items() - settings(identity(of_paper(protocol))).items()
    changes = ", ".join(f"{name} {value}" for name, value in sorted(changed) if name != "timesteps")
    shorter = f"; not the paper's protocol{': ' if changes else ''}{changes}"
    return length + (shorter if changed else ", the paper's protocol")


def differs(name: str, protocol: Config) -> bool:
    return getattr(protocol, name) != getattr(identity(of_paper(protocol)), name)


def groups(cells: list[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """Cells by suite and agent."""
    found = defaultdict(list)
    for cell in cells:
        found[cell.config.suite, cell.config.agent].append(cell)
    return found


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
