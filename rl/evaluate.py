"""Evaluate a trained agent: python rl/evaluate.py RUN --episodes 100.

The agent is that of the run's last checkpoint. With the number of episodes and the seed of the run, which are the
defaults, it plays the episodes of the run's own evaluation again. A checkpoint is taken after the rewire that follows
an evaluation, so the agent of a run that is not finished may earn something else than that evaluation says.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # started as a script: the checkout is where `rl` is


@dataclass(frozen=True)
class Evaluation:
    run: tyro.conf.Positional[Path]
    """The folder of the run."""
    episodes: int | None = None
    """Of each task; if not given, as many as the run's own evaluations have."""
    seed: int | None = None
    """Decides which episodes are played; if not given, the run's."""


def main() -> None:
    chosen = tyro.cli(Evaluation, description=__doc__, prog="python rl/evaluate.py")
    from rl.envs import SUITES
    from rl.run import trained

    try:
        asked = {"episodes": chosen.episodes, "seed": chosen.seed}
        with trained(chosen.run, **{name: value for name, value in asked.items() if value is not None}) as trainer:
            returns, solved = trainer.play(trainer.policy())
    except (ValueError, RuntimeError) as error:  # about what was typed, or is missing: the sentence is enough
        sys.exit(f"rl/evaluate.py: {error}")
    show(SUITES[trainer.config.suite], returns, solved, trainer.clock)


def show(tasks: Sequence, returns: np.ndarray, solved: np.ndarray, clock: int) -> None:
    """Print what was earned [num_tasks, episodes], with intervals of 95% over the episodes that might be played."""
    from rich.console import Console
    from rich.table import Table

    episodes = returns.shape[1]
    scored = hasattr(tasks[0], "score")  # on MT10 the score is the success
    table = Table("task", "return", title=f"after {clock:,} timesteps, {episodes} episodes of each task")
    for kind in ("normalised",) * scored + ("success",):
        table.add_column(kind)
        table.add_column("95%", no_wrap=True)
    for task, of_task, of_solved in zip(tasks, returns, solved, strict=True):
        cells = [task.name, f"{of_task.mean():.3f}"]
        if scored:
            scores = np.array([task.score(r) for r in of_task])
            cells += [f"{scores.mean():.3f}", between(*interval_of_mean(scores))]
        table.add_row(*cells, f"{of_solved.mean():.3f}", between(*interval_of_share(of_solved)))
    table.add_section()
    means = [np.mean([task.score(r.mean()) for task, r in zip(tasks, returns, strict=True)])] if scored else []
    table.add_row("mean", "", *(cell for mean in [*means, solved.mean()] for cell in (f"{mean:.3f}", "")))
    for column in table.columns[1:]:
        column.justify = "right"
    Console().print(table)


def between(low: float, high: float) -> str:
    return "" if np.isnan(low) else f"{low:.2f} - {high:.2f}"


def interval_of_share(solved: np.ndarray) -> tuple[float, float]:
    """Wilson's interval of 95% of the chance of which these are draws; also of none and of all it says something."""
    n, share, z = len(solved), solved.mean(), 1.96
    middle, half = share + z**2 / (2 * n), z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return tuple(float(np.clip((middle + side * half) / (1 + z**2 / n), 0, 1)) for side in (-1, 1))


def interval_of_mean(values: np.ndarray) -> tuple[float, float]:
    """The normal interval of 95% of the mean of which these are draws; NaN of a single one."""
    if len(values) < 2:
        return np.nan, np.nan
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    return values.mean() - half, values.mean() + half


if __name__ == "__main__":
    main()
