"""Tables: what runs earned, beside the paper's numbers, what their networks are like and what they cost."""

import sys
from collections.abc import Iterator
from dataclasses import fields

import numpy as np
from rich.table import Table

from rl.config import Config
from rl.envs import SUITES
from rl.reporting.cells import (
    Cell,
    differs,
    groups,
    papers_seeds,
    protocol_title,
    reference,
)
from rl.reporting.conclusions import IQM_RUNS, conclusions, paper_elsewhere
from rl.reporting.statistics import interval, iqm


def show(protocol: Config, cells: list[Cell]) -> None:
    """Print the tables, and what may be concluded."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 130)
    for table in tables(protocol, cells):
        console.print(table)
    for line in lines(protocol, cells):
        console.print(line)


def lines(protocol: Config, cells: list[Cell]) -> list[str]:
    """What may be concluded."""
    return list(conclusions(cells) if comparable(protocol) else paper_elsewhere(protocol))


def comparable(protocol: Config) -> bool:
    """Whether it is the paper's."""
    return not any(differs(f.name, protocol) for f in fields(Config))


def tables(protocol: Config, cells: list[Cell]) -> list[Table]:
    """Scores beside the paper's, tasks' scores, what the networks were like and what a run cost."""
    scores = Table("suite", "agent", "treatment", "seeds", "of runs", "of runs x tasks")
    scores.add_column(f"paper's IQM, {papers_seeds(protocol)} seeds")
    scores.title = f"{cells[0].score} after {protocol_title(protocol)}"
    scores.caption = (
        "IQM [95% bootstrap interval]; the IQM of fewer than four numbers is their mean, and is named so. "
        "Of runs: of each run's mean over tasks, which the paper's numbers fit"
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
        paper = reference(cell) if comparable(protocol) else None
        scores.add_row(
            *head,
            ", ".join(map(str, cell.seeds)),
            with_interval(cell.by_run),
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
    return [scores, *task_tables(cells), metrics, costs]


def task_tables(cells: list[Cell]) -> Iterator[Table]:
    """What each task of a suite earned, in a table per suite and agent."""
    for (suite, agent), of_group in groups(cells).items():
        table = Table(
            "task",
            *(cell.name for cell in of_group),
            title=f"{suite}, {agent}: {of_group[0].score} by task, mean of seeds",
        )
        for number, task in enumerate(of_group[0].tasks):
            table.add_row(task, *(f"{cell.scores[:, number].mean():.2f}" for cell in of_group))
        yield table


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
    """The IQM of scores [runs, strata], by its name, and, of more than one run, its interval."""
    name = "IQM" if scores.size >= IQM_RUNS else "mean"
    value = f"{name} {iqm(scores.flatten()):.3f}"
    if len(scores) == 1:
        return value
    low, high = interval(scores)
    return f"{value} [{low:.3f}, {high:.3f}]"
