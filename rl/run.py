"""Train one agent: python rl/run.py --suite mt3 --agent mtppo --treatment set --density 0.05 --seed 0.

Imports of torch and the environments wait inside the functions, so that --help answers at once.
"""

import dataclasses
import platform
import shutil
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated

import tyro

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # started as a script: the checkout is where `rl` is

from rl.config import ENVIRONMENT, Config

CHECKOUT = Path(__file__).resolve().parents[1]
SIMULATORS = ("gymnasium", "minigrid", "metaworld", "mujoco")


@dataclasses.dataclass(frozen=True)
class Arguments:
    config: Annotated[Config, tyro.conf.arg(name="")]  # without a default, which would settle what depends on the suite
    resume: Path | None = None
    """Go on with the run in this folder, with its settings, from its last checkpoint; no other option may be given."""


def main() -> None:
    try:
        folder, config = chosen_run()
    except ValueError as error:  # about what was typed: the sentence is enough
        sys.exit(f"rl/run.py: {error}")
    print(folder, flush=True)

    try:
        train(config, folder)
    except KeyboardInterrupt:
        sys.exit(f"stopped; python rl/run.py --resume {folder} goes on from the last evaluation")
    show(folder)


def train(config: Config, folder: Path, quiet: bool = False) -> None:
    """Train in this run folder, from its last checkpoint where it has one; quiet: without a progress bar."""
    if config.agent == "mtsac":
        from rl.train_sac import train
    elif config.suite == "mt10":
        from rl.train_ppo_mt10 import train
    else:
        from rl.train_ppo import train
    train(config, folder, quiet)


def chosen_run() -> tuple[Path, Config]:
    """Read the command line; returns the folder of a new run, or of the one to resume, and its settings."""
    arguments = tyro.cli(Arguments, description=Config.__doc__, prog="python rl/run.py")
    if arguments.resume is None:
        return new_folder(arguments.config), arguments.config
    if arguments.config != Config():
        raise ValueError("--resume takes the run's own settings from its folder; give no other option with it")
    return arguments.resume, Config.load(arguments.resume)


def new_folder(config: Config) -> Path:
    """Make the folder of a new run, with its settings and a description of the machine."""
    folder = config.runs / config.experiment / f"{config.seed}-{datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True)
    config.save(folder)
    (folder / ENVIRONMENT).write_text(environment())
    return folder


def environment() -> str:
    """What a run depends on besides its settings: commit, packages, machine."""

    def output(*command: str) -> str:
        return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True).stdout.strip()

    commit = output("git", "describe", "--always", "--dirty") if shutil.which("git") else ""
    lines = [
        f"command: {' '.join(sys.argv)}",
        f"commit: {commit or 'unknown'}",
        f"system: {platform.platform()}",
        *(f"{package.name} {package.version}" for package in metadata.distributions() if package.name in SIMULATORS),
        output(sys.executable, "-m", "sparsekern"),
    ]
    return "\n".join(lines) + "\n"


def show(folder: Path) -> None:
    """Print the closing tables, all of it from the run's metrics.csv."""
    import pandas
    from rich.console import Console
    from rich.table import Table

    from rl.logger import CSV

    metrics = pandas.read_csv(folder / CSV)
    last = metrics.groupby("name")["value"].last()
    typical = metrics.groupby("name")["value"].median()  # of times, which other work on the machine disturbs

    earned = Table("task", "return", "normalised", "success", title=f"after {metrics['step'].max():,} timesteps")
    for name in last.index[last.index.str.startswith("return/")]:
        task = name.removeprefix("return/")
        values = (last[f"{kind}/{task}"] for kind in ("return", "score", "success"))
        earned.add_row(task, *(f"{value:.3f}" for value in values))
    earned.add_section()
    earned.add_row("mean", "", f"{last['score/mean']:.3f}", f"{last['success/mean']:.3f}")

    cost = Table("all networks", "this run", "dense", "ratio", title="cost")
    for label, name in (("live parameters", "parameters"), ("bytes: weights, gradients, Adam, index", "bytes")):
        own = last["sparse/live_parameters" if name == "parameters" else "sparse/bytes"]
        dense = last[f"sparse/dense_{name}"]
        cost.add_row(label, f"{own:,.0f}", f"{dense:,.0f}", f"{own / dense:.3f}")
    cost.add_section()
    cost.add_row("update on one rollout, milliseconds", f"{typical['time/update_ms']:,.0f}")
    cost.add_row("acting in one rollout, milliseconds", f"{typical['time/acting_ms']:,.0f}")
    cost.add_row("environment steps per second, with acting", f"{typical['time/steps_per_second']:,.0f}")
    for table in (earned, cost):
        for column in table.columns[1:]:
            column.justify = "right"
        Console().print(table)


if __name__ == "__main__":
    main()
