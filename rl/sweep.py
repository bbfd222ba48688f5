"""Run a grid of experiments: python rl/sweep.py --suites mt5 --agents mtppo --treatments dense gmp set --seeds 0 1.

A run is one process on one core. What is finished, in the run folders or among the committed results, is not run again;
what was interrupted goes on from its checkpoint: give the same command again, once the first has ended. --show prints
what has become of every run, also while another process runs the sweep. With --address,
the runs go to a Ray cluster instead, whose machines must share a disk that holds this checkout and the run folders.

Any option of rl/run.py can be varied too: --vary set.drop-fraction=0.1,0.3 sac.warmup=500.
"""

import itertools
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import tyro

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # started as a script: the checkout is where `rl` is

from rl import checkpoint
from rl.config import CONFIG, Agent, BlockSize, Config, Networks, Suite, Treatment, identity
from rl.reporting.logger import CSV
from rl.reporting.runs import Run, find
from rl.run import CHECKOUT, new_folder
from rl.run import train as train_one

OWN_OPTIONS = (
    "suite", "agent", "treatment", "networks", "density", "block_size", "seed", "timesteps", "runs", "workers", "wandb",
    "ticket",
)  # fmt: skip
FAILURE = "failure.txt"  # in the folder of a run that failed: why
POLL = 10  # seconds between two looks at how far the runs are


@dataclass(frozen=True)
class Sweep:
    """Every combination of the settings given; all others are the paper's."""

    suites: tuple[Suite, ...] = ("mt5",)
    agents: tuple[Agent, ...] = ("mtppo",)
    treatments: tuple[Treatment, ...] = ("dense", "gmp", "set")
    """A lottery ticket is the checkpoint of the gmp run of its seed, which runs first if the run folders lack it."""
    networks: tuple[Networks, ...] = ("both",)
    """Which networks are treated."""
    densities: tuple[float, ...] = (0.05,)
    """Of sparse treatments, as block sizes are; the others count once."""
    block_sizes: tuple[BlockSize, ...] = (1,)
    seeds: tuple[int, ...] = (0, 1)
    vary: tuple[str, ...] = ()
    """OPTION=VALUE,VALUE: values of other options of rl/run.py, named as there but without dashes in front."""
    timesteps: int | None = None
    """Length of each run; if not given, the paper's 400,000, on mt10 2,000,000."""
    runs: Path = Path("runs")
    """Where run folders are made, and found."""
    results: Path = Path("bench/results/rl")
    """Finished runs are copied here, without checkpoint and TensorBoard files and at evaluations only: to be committed.
    A run that is here counts as done."""
    parallel: int = os.cpu_count() or 1
    """Runs at a time on this machine; a cluster runs as many as it has cores."""
    workers: int = 1
    """Of each run, as in rl/run.py: processes that step the environments of mt10."""
    wandb: bool = False
    """Of each run, as in rl/run.py."""
    show: bool = False
    """Run nothing; print a table of all runs: done, failed and why, begun, or still to do."""
    address: str | None = None
    """Of a Ray cluster (needs the extra `cluster`); "auto" is the one on this machine."""

    def cells(self) -> list[Config]:
        """The grid's runs, one seed of everything after the other: an interrupted sweep holds comparable runs."""
        names = ("seed", "suite", "agent", "treatment", "networks", "density", "block_size")
        grid = itertools.product(
            self.seeds, self.suites, self.agents, self.treatments, self.networks, self.densities, self.block_sizes
        )
        if self.workers > 1 and "mt10" not in self.suites:
            raise ValueError(
                f"--workers are of mt10's runs; --parallel is the number of runs, got {self.workers} workers"
            )
        varied = list(itertools.product(*map(values_of, self.vary)))
        cells = {}
        for values, options in itertools.product(grid, varied):
            settings = dict(zip(names, values, strict=True))
            settings["ticket"] = Path() if settings["treatment"] == "lottery" else None  # with_ticket finds it
            # absolute: a process on a cluster starts in another folder
            settings |= {
                "wandb": self.wandb,
                "runs": self.runs.absolute(),
                "workers": self.workers if settings["suite"] == "mt10" else 1,
            }
            cell = Config(**settings)
            cell = replace(cell, timesteps=cell.papers_timesteps if self.timesteps is None else self.timesteps)
            if options:
                cell = tyro.cli(Config, args=options, default=cell, prog="python rl/sweep.py --vary")
            cells.setdefault(identity(cell), cell)
        return list(cells.values())


def values_of(option: str) -> list[str]:
    """The arguments of rl/run.py that one entry of --vary stands for: "--set.drop-fraction=0.1", one for each value.

    Raises:
        ValueError: it is not like OPTION=VALUE,VALUE, or the option has a place of its own in a sweep.
    """
    name, equals, values = option.partition("=")
    if not (name and equals and values) or name.startswith("-"):
        raise ValueError(f"--vary takes OPTION=VALUE,VALUE, as in set.drop-fraction=0.1,0.3, got {option!r}")
    if name.replace("-", "_") in OWN_OPTIONS:
        raise ValueError(f"--vary takes options that a sweep has no other place for, got {option!r}")
    return [f"--{name}={value}" for value in values.split(",")]


def main() -> None:
    sweep = tyro.cli(Sweep, description=__doc__, prog="python rl/sweep.py")
    try:
        cells = sweep.cells()
    except ValueError as error:  # about what was typed: the sentence is enough
        sys.exit(f"rl/sweep.py: {error}")
    lotteries = [cell for cell in cells if cell.treatment == "lottery"]
    tickets = {identity(ticket): ticket for ticket in map(ticket_of, lotteries)}
    first = [*({identity(cell): cell for cell in cells if cell.treatment != "lottery"} | tickets).values()]
    cells = first + lotteries
    if sweep.show:
        show(cells, sweep, tickets)
        return
    try:
        failures = run_all(first, sweep, tickets)
        failures += run_all(lotteries, sweep)
    except KeyboardInterrupt:
        show(cells, sweep, tickets)
        sys.exit("stopped; the same command goes on from the runs' last evaluations")
    show(cells, sweep, tickets)
    sys.exit(f"{failures} runs failed; the same command tries them again" if failures else 0)


def run_all(cells: list[Config], sweep: Sweep, tickets: Collection[Config] = ()) -> int:
    """Bring these runs to their end, as many at a time as there are workers; returns how many failed.

    Args:
        cells: the runs.
        sweep: where they are found and made.
        tickets: identities of those that count as finished only where their checkpoint is kept.
    """
    from tqdm import tqdm

    if not cells:
        return 0
    found = furthest(sweep, tickets)
    published = {identity(run.config) for run in find([sweep.results]) if run.finished}
    todo = {}
    for cell in cells:
        run = found.get(identity(cell))
        if run is None or not run.finished:
            todo[identity(cell)] = cell
        elif identity(cell) not in published:
            run.publish(sweep.results)
    print(f"{len(cells)} runs: {len(cells) - len(todo)} finished, {len(todo)} to do", flush=True)
    if not todo:
        return 0
    jobs, failures = [], 0
    for key, cell in todo.items():
        try:
            jobs.append(((with_ticket(cell, sweep), found[key].folder if key in found else None), cell))
        except ValueError as error:  # its gmp run failed
            failures += 1
            print(f"{cell.experiment}, seed {cell.seed} failed:\n{error}", file=sys.stderr)
    total = sum(cell.timesteps for cell in todo.values())
    with launching(sweep.address, sweep.parallel) as launch, tqdm(total=total, unit="timestep") as progress:
        running = {launch(job): cell for job, cell in jobs}
        while running:
            for ended in wait(running, timeout=POLL, return_when=FIRST_COMPLETED).done:
                cell = running.pop(ended)
                try:
                    folder, error = ended.result()
                except Exception as death:  # of the process: of memory, say
                    folder, error = f"{cell.experiment}, seed {cell.seed}", str(death)
                    if identity(cell) in (left := furthest(sweep)):
                        (left[identity(cell)].folder / FAILURE).write_text(f"{error}\n")
                if error:
                    failures += 1
                    progress.write(f"{folder} failed:\n{error}", file=sys.stderr)
                else:
                    run = Run(folder, Config.load(folder))
                    if identity(cell) not in published:  # a ticket's may be
                        run.publish(sweep.results)
                    progress.write(f"{folder}: score {run.evaluated['score/mean'].iloc[-1]:.3f}")
            progress.n = sum(run.clock for run in find([sweep.runs]) if identity(run.config) in todo)
            progress.refresh()
    return failures


def furthest(sweep: Sweep, tickets: Collection[Config] = ()) -> dict[Config, Run]:
    """By identity, the run that came furthest; a finished one among the results before one in the run folders. Of
    those that are tickets a finished run without its checkpoint is none."""
    found = {}
    runs = find([sweep.runs]) + [run for run in find([sweep.results]) if run.finished]
    for run in sorted(runs, key=lambda run: (run.finished, run.clock)):
        key = identity(run.config)
        if key not in tickets or not run.finished or checkpoint.path(run.folder).exists():
            found[key] = run
    return found


def show(cells: list[Config], sweep: Sweep, tickets: Collection[Config] = ()) -> None:
    """Print what has become of every run; arguments as in `run_all`."""
    from rich.console import Console
    from rich.table import Table

    found = furthest(sweep, tickets)
    table = Table("experiment", "seed", "state", "timesteps", "score", "last sign of life")
    for cell in sorted(cells, key=lambda cell: (cell.experiment, cell.seed)):
        table.add_row(cell.experiment, str(cell.seed), *state(found.get(identity(cell))))
    for column in ("seed", "timesteps", "score"):
        next(c for c in table.columns if c.header == column).justify = "right"
    console = Console()
    console.width = console.width if console.is_terminal else 140  # a file's lines may be long
    console.print(table)


def state(run: Run | None) -> tuple[str, ...]:
    """A run's state, how far it came, its last score, and when it last wrote or why it failed."""
    if run is None:
        return "to do", "", "", ""
    evaluated = run.evaluated
    reached = f"{run.clock:,}", f"{evaluated['score/mean'].iloc[-1]:.3f}" if len(evaluated) else ""
    if run.finished:
        return "done", *reached, ""
    if (run.folder / FAILURE).exists():
        return "failed", *reached, (run.folder / FAILURE).read_text().strip().splitlines()[-1]
    written = max(path.stat().st_mtime for path in (run.folder / CSV, run.folder / CONFIG) if path.exists())
    return "begun", *reached, f"{timedelta(seconds=round(time.time() - written))} ago"


def train(job: tuple[Config, Path | None]) -> tuple[Path, str]:
    """Train one run, in a new folder if it has none; returns the folder and, if the run failed, why."""
    config, folder = job
    folder = folder or new_folder(config)
    (folder / FAILURE).unlink(missing_ok=True)
    try:
        train_one(config, folder, quiet=True)
    except Exception:  # one run's error must not end the others
        (folder / FAILURE).write_text(traceback.format_exc())
        return folder, traceback.format_exc()
    return folder, ""


@contextmanager
def launching(address: str | None, parallel: int) -> Iterator[Callable[[tuple], Future]]:
    """Gives a function that has a job trained in a process of its own, on this machine or on a Ray cluster."""
    if address is None:
        with ThreadPoolExecutor(parallel) as threads:
            try:
                yield lambda job: threads.submit(in_own_process, train, job)
            finally:  # interrupted: begin no other run
                threads.shutdown(wait=False, cancel_futures=True)
        return
    try:
        import ray
    except ModuleNotFoundError as missing:
        if missing.name != "ray":  # a module that Ray itself lacks
            raise
        sys.exit("sweep.py: --address needs Ray: pip install 'sparsekern[cluster]'")
    path = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    with ray.init(address, runtime_env={"env_vars": {"PYTHONPATH": path}}):
        remote = ray.remote(num_cpus=1, max_calls=1, max_retries=0)(train)
        yield lambda job: remote.remote(job).future()


def in_own_process(function: Callable, *args):
    """Call it in a fresh process; raises BrokenProcessPool if that is killed, where multiprocessing.Pool would wait."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def ticket_of(lottery: Config) -> Config:
    """The gmp run that draws this lottery's ticket."""
    return replace(lottery, treatment="gmp", ticket=None)


def with_ticket(cell: Config, sweep: Sweep) -> Config:
    """The same run; a lottery's with the ticket that the gmp run of its seed has drawn."""
    if cell.treatment != "lottery":
        return cell
    gmp = ticket_of(cell)
    run = furthest(sweep, {identity(gmp)}).get(identity(gmp))
    if run is None or not run.finished:
        raise ValueError(f"lottery needs the finished run {gmp.experiment} of seed {cell.seed} in {cell.runs}")
    return replace(cell, ticket=run.folder)


if __name__ == "__main__":
    main()
