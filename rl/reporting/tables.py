"""Tables: what runs earned, beside the paper's numbers, what their networks are like and what they cost."""

import sys
from collections.abc import Iterator
from dataclasses import fields

import numpy as np
from rich.table import Table

from rl.config import Config
from rl.envs import SUITES
from rl.reporting.cells import (
    MT10,
    Cell,
    differs,
    groups,
    of_paper,
    papers_seeds,
    protocol_title,
    reference,
)
from rl.reporting.iqm import interval, iqm
from rl.reporting.paper import TABLE_MT10

SEEDS = 10  # of a cell, at least, before it is set against the paper's order


def show(protocol: Config, cells: list[Cell]) -> None:
    """Print scores beside the paper's, then what the networks were like and what a run cost."""
    from rich.console import Console

    comparable = not any(differs(f.name, protocol) for f in fields(Config))
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
            "task",
            *(cell.name for cell in of_group),
            title=f"{suite}, {agent}: {of_group[0].score} by task, mean of seeds",
        )
        for number, task in enumerate(of_group[0].tasks):
            table.add_row(task, *(f"{cell.scores[:, number].mean():.2f}" for cell in of_group))
        yield table


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
    """The IQM of scores [runs, strata], by its name, and, of more than one run, its interval."""
    name = "IQM" if scores.size >= 4 else "mean"  # a quarter of fewer than four is none
    value = f"{name} {iqm(scores.flatten()):.3f}"
    if len(scores) == 1:
        return value
    low, high = interval(scores)
    return f"{value} [{low:.3f}, {high:.3f}]"


def orderings(cells: list[Cell]) -> list[str]:
    """Where the paper's order of a treatment and the dense network appears in these runs, and where not.

    Cells of too few seeds are named, and not compared.
    """
    few = [cell for cell in cells if len(cell.runs) < SEEDS]
    enough = [cell for cell in cells if len(cell.runs) >= SEEDS]
    dense = {(c.config.suite, c.config.agent): c for c in enough if c.config.treatment == "dense"}
    lines = []
    for cell in enough:
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
            f"{verdict} ({len(cell.runs)} and {len(base.runs)} seeds, {apart(cell, base)})"
        )
    if few:
        names = (f"{c.config.suite} {c.config.agent} {c.name} ({len(c.runs)})" for c in few)
        lines.append(f"Fewer than {SEEDS} seeds, and so no statement about treatments: {'; '.join(names)}")
    return lines


def apart(one: Cell, other: Cell) -> str:
    """Whether the intervals of two cells overlap, in words."""
    (low1, high1), (low2, high2) = (interval(cell.scores.mean(1, keepdims=True)) for cell in (one, other))
    return "intervals overlap" if low1 <= high2 and low2 <= high1 else "intervals are apart"
