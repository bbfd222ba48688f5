"""Train one agent: python rl/run.py --suite mt3 --agent mtppo --treatment set --density 0.05 --seed 0.

Imports of torch and the environments wait inside the functions, so that --help answers at once.
"""

import contextlib
import dataclasses
import importlib.util
import io
import platform
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # started as a script: the checkout is where `rl` is

from rl.config import ENVIRONMENT, Config

if TYPE_CHECKING:
    from rl.algorithms.trainer import Trainer

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
    except (ValueError, RuntimeError, OSError) as error:  # about what was typed, or is missing: the sentence is enough
        sys.exit(f"rl/run.py: {error}")
    print(folder, flush=True)

    try:
        train(config, folder)
    except KeyboardInterrupt:
        sys.exit(f"stopped; python rl/run.py --resume {folder} goes on from the last evaluation")
    show(folder)


def train(config: Config, folder: Path, quiet: bool = False) -> None:
    """Train in this run folder, from its last checkpoint where it has one; quiet: without a progress bar."""
    from rl.reporting.mirror import mirrored

    with mirrored(config, folder), contextlib.closing(trainer_of(config)(config, folder, quiet)) as trainer:
        trainer.train()


def trainer_of(config: Config) -> "type[Trainer]":
    """The kind of training that these settings ask for."""
    if config.algorithm == "sac":
        from rl.algorithms.train_sac import SACTrainer as Trainer
    elif config.algorithm == "ppo_mt10":
        from rl.algorithms.train_ppo_mt10 import MT10PPOTrainer as Trainer
    else:
        from rl.algorithms.train_ppo import PPOTrainer as Trainer
    return Trainer


@contextlib.contextmanager
def trained(folder: Path, **changes: object) -> "Iterator[Trainer]":
    """The training of this folder's run as its last checkpoint has it, to be looked at, with these settings changed."""
    from rl import checkpoint

    config = Config.load(folder)
    if not checkpoint.path(folder).exists():
        raise ValueError(f"{folder} has no checkpoint; a run has one from its first evaluation on")
    sac = dataclasses.replace(config.sac, device="auto")  # another machine, perhaps
    ticket = config.ticket and folder  # which keeps its weights' places too
    config = dataclasses.replace(config, evaluators=0, sac=sac, ticket=ticket, **changes)
    require(config)
    with contextlib.closing(trainer_of(config)(config, folder, quiet=True)) as trainer:
        trainer.resume()
        yield trainer


def chosen_run() -> tuple[Path, Config]:
    """Read the command line; returns the folder of a new run, or of the one to resume, and its settings."""
    arguments = tyro.cli(Arguments, description=Config.__doc__, prog="python rl/run.py")
    config = arguments.config
    if arguments.resume is not None:
        if config != Config():
            raise ValueError("--resume takes the run's own settings from its folder; give no other option with it")
        config = Config.load(arguments.resume)
        require_checkpoint(arguments.resume, config)
    if config.ticket is not None:
        from rl.treatments.lottery import require_ticket

        require_ticket(config)
    require(config)  # before there is a folder
    return arguments.resume or new_folder(config), config


def require_checkpoint(folder: Path, config: Config) -> None:
    """Raise ValueError if this run has evaluations and no checkpoint: to go on would begin anew and drop them."""
    from rl import checkpoint
    from rl.reporting.runs import Run

    if not checkpoint.path(folder).exists() and len(Run(folder, config).evaluated):
        raise ValueError(f"--resume {folder}: the run was evaluated, but has no checkpoint from which it could go on")


def require(config: Config) -> None:
    """Raise RuntimeError if this machine lacks what the run needs."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise RuntimeError("--wandb needs the package wandb: pip install wandb")
    if config.suite == "mt10":
        from rl.envs.metaworld import require_metaworld

        require_metaworld()
    if config.algorithm == "sac" and config.sac.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError(f"--sac.device cuda needs an NVIDIA GPU, but torch {torch.__version__} sees none")


def new_folder(config: Config) -> Path:
    """Make the folder of a new run, with its settings and a description of the machine."""
    folder = config.runs / config.experiment / f"{config.seed}-{datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True)
    (folder / ENVIRONMENT).write_text(environment())
    config.save(folder)  # last: from now on the run can be resumed
    return folder


def environment() -> str:
    """What a run depends on besides its settings: commit, packages, machine."""
    with contextlib.redirect_stdout(io.StringIO()) as report:
        runpy.run_module("sparsekern", run_name="__main__")
    git = ("git", "describe", "--always", "--dirty")
    commit = shutil.which("git") and subprocess.run(git, cwd=CHECKOUT, capture_output=True, text=True).stdout.strip()
    lines = [
        f"command: {' '.join(sys.argv)}",
        f"commit: {commit or 'unknown'}",
        f"system: {platform.platform()}",
        *(f"{package.name} {package.version}" for package in metadata.distributions() if package.name in SIMULATORS),
        report.getvalue(),
    ]
    return "\n".join(lines) + "\n"


def show(folder: Path) -> None:
    """Print the closing tables, all of it from the run's metrics.csv."""
    import pandas
    from rich.console import Console
    from rich.table import Table

    from rl.reporting.logger import CSV

    metrics = pandas.read_csv(folder / CSV)
    last = metrics.groupby("name")["value"].last()
    typical = metrics.groupby("name")["value"].median()  # of times, which other work on the machine disturbs

    kinds = {"return": "return", "score": "normalised", "success": "success"}
    if Config.load(folder).suite == "mt10":
        del kinds["score"]  # it is the success
    earned = Table("task", *kinds.values(), title=f"after {metrics['step'].max():,} timesteps")
    for name in last.index[last.index.str.startswith("return/")]:
        task = name.removeprefix("return/")
        values = (last[f"{kind}/{task}"] for kind in kinds)
        earned.add_row(task, *(f"{value:.3f}" for value in values))
    earned.add_section()
    earned.add_row("mean", *(f"{last[f'{kind}/mean']:.3f}" if kind != "return" else "" for kind in kinds))

    cost = Table("all networks", "this run", "dense", "ratio", title="cost")
    for label, name in (("live parameters", "parameters"), ("bytes: weights, gradients, Adam, index", "bytes")):
        own = last["sparse/live_parameters" if name == "parameters" else "sparse/bytes"]
        dense = last[f"sparse/dense_{name}"]
        cost.add_row(label, f"{own:,.0f}", f"{dense:,.0f}", f"{own / dense:.3f}")
    cost.add_section()
    off_policy = "time/waiting_ms" in last
    unit, counted = ("timestep", "acting and updates") if off_policy else ("rollout", "acting")
    cost.add_row(f"update on one {unit}, milliseconds", f"{typical['time/update_ms']:,.1f}")
    cost.add_row(f"acting in one {unit}, milliseconds", f"{typical['time/acting_ms']:,.1f}")
    if off_policy:
        cost.add_row("waiting for environments in one timestep, milliseconds", f"{typical['time/waiting_ms']:,.1f}")
    cost.add_row(f"environment steps per second, with {counted}", f"{typical['time/steps_per_second']:,.0f}")
    for table in (earned, cost):
        for column in table.columns[1:]:
            column.justify = "right"
        Console().print(table)


if __name__ == "__main__":
    main()
