"""Runs on disk: sweep.py and report.py find them again by what they did."""

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas

from rl.config import CONFIG, ENVIRONMENT, Config, deviations
from rl.reporting.logger import CSV


@dataclass(frozen=True)
class Run:
    """A run folder: its settings and what has been logged so far."""

    folder: Path
    config: Config

    @cached_property
    def metrics(self) -> pandas.DataFrame:
        """One row per logged timestep, one column per metric; NaN where it was not taken."""
        file = self.folder / CSV
        table = pandas.read_csv(file) if file.exists() else pandas.DataFrame(columns=["step", "name", "value"])
        return table.pivot_table(index="step", columns="name", values="value", aggfunc="last")

    @property
    def commit(self) -> str:
        """Of the code that ran."""
        file = self.folder / ENVIRONMENT
        found = file.exists() and re.search(r"^commit: (.*)$", file.read_text(), flags=re.MULTILINE)
        return found[1] if found else "unknown"

    @property
    def command(self) -> str:
        """What makes the same run again: its settings as options, as far as they are not defaults."""
        named = {
            name: getattr(self.config, name) for name in ("suite", "agent", "treatment", "ticket", "seed", "timesteps")
        }
        options = ["python rl/run.py"]
        for name, value in (named | deviations(self.config)).items():
            part, dot, option = name.replace("_", "-").rpartition(".")
            if isinstance(value, bool):
                options.append(f"--{part}{dot}{'' if value else 'no-'}{option}")
            elif name != "ticket" or value:
                options.append(f"--{part}{dot}{option} {value}")
        return " ".join(options)

    @property
    def clock(self) -> int:
        """The last timestep that was logged."""
        file = self.folder / CSV
        lines = file.read_bytes()[-1000:].splitlines() if file.exists() else []
        step = lines[-1].partition(b",")[0] if lines else b""
        return int(step) if step.isdigit() else 0

    @property
    def finished(self) -> bool:
        """Whether the policy was evaluated at the end."""
        file, evaluation = self.folder / CSV, f"\n{self.config.timesteps},score/mean,"
        return file.exists() and evaluation in file.read_text()

    def publish(self, results: Path) -> None:
        """Copy into `results` what is worth committing: settings, machine, and the metrics at evaluations."""
        folder = results / self.config.experiment / f"{self.config.seed}-{self.config.timesteps}"
        folder.mkdir(parents=True, exist_ok=True)
        about = (self.folder / ENVIRONMENT).read_text()
        (folder / ENVIRONMENT).write_text(re.sub(r"^command: .*\n| at /.*$", "", about, flags=re.MULTILINE))
        steps = {str(step) for step in self.evaluated.index}
        header, *rows = (self.folder / CSV).read_text().splitlines(keepends=True)
        (folder / CSV).write_text(header + "".join(row for row in rows if row.partition(",")[0] in steps))
        replace(self.config, runs=Config.runs, wandb=False, ticket=self.config.ticket and Path()).save(folder)

    @property
    def evaluated(self) -> pandas.DataFrame:
        """The rows of `metrics` at which the policy was evaluated; none before the first evaluation."""
        metrics = self.metrics
        return metrics[metrics["score/mean"].notna()] if "score/mean" in metrics else metrics.iloc[:0]


def find(folders: Iterable[Path]) -> list[Run]:
    """All runs in these folders, at any depth. Warns of settings that cannot be read, and leaves their runs out."""
    runs = []
    for path in sorted(path for folder in folders for path in folder.rglob(CONFIG)):
        try:
            runs.append(Run(path.parent, Config.load(path.parent)))
        except ValueError as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
    return runs
