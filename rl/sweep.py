"""Run a grid of experiments: python rl/sweep.py --suites mt5 --agents mtppo --treatments dense gmp set --seeds 0 1.

A run is one process on one core. What is finished, in the run folders or among the committed results, is not run again;
what was interrupted goes on from its checkpoint: give the same command again, once the first has ended. With --address,
the runs go to a Ray cluster instead, whose machines must share a disk that holds this checkout and the run folders.
"""

import itertools
import multiprocessing
import os
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # started as a script: the checkout is where `rl` is

from rl import checkpoint
from rl.config import Agent, BlockSize, Config, Networks, Suite, Treatment
from rl.run import CHECKOUT, new_folder
from rl.run import train as train_one
from rl.runs import Run, find, identity

POLL = 10  # seconds between two looks at how far the runs are


@dataclass(frozen=True)
class Sweep:
    """Every combination of the settings given; all others are the paper's."""

    suites: tuple[Suite, ...] = ("mt5",)
    agents: tuple[Agent, ...] = ("mtppo",)
    treatments: tuple[Treatment, ...] = ("dense", "gmp", "set")
    """A lottery ticket comes from the gmp run of its seed in the run folders; sweep gmp before it, or with it."""
    networks: tuple[Networks, ...] = ("both",)
    """Which networks are treated."""
    densities: tuple[float, ...] = (0.05,)
    """Of sparse treatments, as block sizes are; the others count once."""
    block_sizes: tuple[BlockSize, ...] = (1,)
    seeds: tuple[int, ...] = (0, 1)
    timesteps: int = 400_000
    """Length of each run."""
    runs: Path = Path("runs")
    """Where run folders are made, and found."""
    results: Path = Path("bench/results/rl")
    """Finished runs are copied here, without checkpoint and TensorBoard files and at evaluations only: to be committed.
    A run that is here counts as done."""
    workers: int = os.cpu_count() or 1
    """Runs at a time."""
    address: str | None = None
    """Of a Ray cluster (needs the extra `cluster`); "auto" is the one on this machine."""

    def cells(self) -> list[Config]:
        """The grid's runs, one seed of everything after the other: an interrupted sweep holds comparable runs."""
        names = ("seed", "suite", "agent", "treatment", "networks", "density", "block_size")
        grid = itertools.product(
            self.seeds, self.suites, self.agents, self.treatments, self.networks, self.densities, self.block_sizes
        )
        cells = {}
        for values in grid:
            settings = dict(zip(names, values, strict=True))
            ticket = Path() if settings["treatment"] == "lottery" else None  # with_ticket finds it
            cell = Config(**settings, timesteps=self.timesteps, runs=self.runs, ticket=ticket)
            cells.setdefault(identity(cell), cell)
        return list(cells.values())


def main() -> None:
    sweep = tyro.cli(Sweep, description=__doc__, prog="python rl/sweep.py")
    cells = sweep.cells()
    failures = run_all([c for c in cells if c.treatment != "lottery"], sweep)
    failures += run_all([c for c in cells if c.treatment == "lottery"], sweep)
    sys.exit(f"{failures} runs failed; the same command tries them again" if failures else 0)


def run_all(cells: list[Config], sweep: Sweep) -> int:
    """Bring these runs to their end, as many at a time as there are workers; returns how many failed."""
    from tqdm import tqdm

    todo = {identity(cell): cell for cell in cells}
    for run in find([sweep.results]):
        if run.finished:
            todo.pop(identity(run.config), None)
    started = {}
    for run in sorted(find([sweep.runs]), key=lambda run: run.clock):
        key = identity(run.config)
        if key in todo and run.finished:
            run.publish(sweep.results)
            del todo[key]
        elif key in todo:
            started[key] = run.folder
    if not cells:
        return 0
    print(f"{len(cells)} runs: {len(cells) - len(todo)} finished, {len(todo)} to do", flush=True)
    if not todo:
        return 0
    jobs = [(with_ticket(cell), started.get(key)) for key, cell in todo.items()]
    failures = 0
    total = sum(cell.timesteps for cell in todo.values())
    with (
        make_pool(sweep.address, min(sweep.workers, len(jobs))) as pool,
        tqdm(total=total, unit="timestep") as progress,
    ):
        finishing = pool.imap_unordered(train, jobs)
        while True:
            try:
                folder, error = finishing.next(timeout=POLL)
            except StopIteration:
                return failures
            except multiprocessing.TimeoutError:
                pass
            else:
                run = Run(folder, Config.load(folder))
                failures += bool(error)
                if error:
                    progress.write(f"{folder} failed:\n{error}")
                else:
                    run.publish(sweep.results)
                    progress.write(f"{folder}: normalised score {run.evaluated['score/mean'].iloc[-1]:.3f}")
            progress.n = sum(run.clock for run in find([sweep.runs]) if identity(run.config) in todo)
            progress.refresh()


def train(job: tuple[Config, Path | None]) -> tuple[Path, str]:
    """Train one run, in a new folder if it has none; returns the folder and, if the run failed, why."""
    config, folder = job
    folder = folder or new_folder(config)
    try:
        train_one(config, folder, quiet=True)
    except Exception:  # one run's error must not end the others
        return folder, traceback.format_exc()
    return folder, ""


def make_pool(address: str | None, workers: int):
    """A multiprocessing.Pool on this machine, or the one that Ray makes of a cluster; one process per run."""
    if address is None:
        return multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=1)
    try:
        import ray
        from ray.util.multiprocessing import Pool
    except ImportError:
        sys.exit("sweep.py: --address needs Ray: pip install 'sparsekern[cluster]'")
    ray.init(address, runtime_env={"env_vars": {"PYTHONPATH": str(CHECKOUT)}})
    return Pool(workers, maxtasksperchild=1)


def with_ticket(cell: Config) -> Config:
    """The same run; a lottery's with the ticket that the gmp run of its seed has drawn."""
    if cell.treatment != "lottery":
        return cell
    gmp = replace(cell, treatment="gmp", ticket=None)
    for run in find([cell.runs]):
        if identity(run.config) == identity(gmp) and run.finished and checkpoint.path(run.folder).exists():
            return replace(cell, ticket=run.folder)
    sys.exit(f"sweep.py: treatment lottery needs the finished run {gmp.experiment} of seed {cell.seed} in {cell.runs}")


if __name__ == "__main__":
    main()
