"""Conclusions: what the runs say about the paper's order of treatments, and where they are too few to say anything."""

from collections.abc import Iterator
from itertools import combinations

from rl.config import Config
from rl.reporting.cells import MT10, Cell, groups, of_paper, reference
from rl.reporting.paper import TABLE_MT10
from rl.reporting.statistics import improvement, iqm

SEEDS = 10  # of a cell, at least, before it is compared with another
IQM_RUNS = 4  # a quarter of fewer is none: their IQM is their mean, and is named so


def pairs(cells: list[Cell]) -> list[tuple[Cell, Cell]]:
    """Cells of one suite and agent that may be compared, each with those before it."""
    enough = ([cell for cell in of_group if len(cell.runs) >= SEEDS] for of_group in groups(cells).values())
    return [(cell, before) for of_group in enough for before, cell in combinations(of_group, 2)]


def conclusions(cells: list[Cell]) -> Iterator[str]:
    """A sentence on each pair of cells, beside the paper's; cells of too few seeds are named, and not compared."""
    for cell, before in pairs(cells):
        chance, low, high = improvement(cell.by_run, before.by_run)
        ours = iqm(cell.by_run[:, 0]) - iqm(before.by_run[:, 0])
        by_task, lowest, highest = improvement(cell.scores, before.scores)
        line = (
            f"{cell.config.suite} {cell.config.agent}: {cell.name} - {before.name} = {ours:+.3f} "
            f"({len(cell.runs)} and {len(before.runs)} seeds). A run of {cell.name} scores higher than one of "
            f"{before.name} with probability {chance:.2f} [{low:.2f}, {high:.2f}], "
            f"task by task {by_task:.2f} [{lowest:.2f}, {highest:.2f}]"
        )
        theirs, other = reference(cell), reference(before)
        if theirs and other:
            difference = round(theirs.iqm - other.iqm, 2)
            yield f"{line}. Paper {difference:+.2f}: {verdict(low, high, difference)}"
        else:
            yield f"{line}: {'undecided' if low <= 0.5 <= high else 'a difference'}. The paper has no such pair"
    few = [cell for cell in cells if len(cell.runs) < SEEDS]
    if few:
        names = (f"{c.config.suite} {c.config.agent} {c.name} ({len(c.runs)})" for c in few)
        yield f"Fewer than {SEEDS} seeds, and so no statement about treatments: {'; '.join(names)}"


def verdict(low: float, high: float, difference: float) -> str:
    """On the paper's difference between two cells, from the interval of our probability of improvement."""
    if low <= 0.5 <= high:
        return "undecided, since the interval holds one half"
    if difference == 0:
        return "the paper sees no difference"
    return (
        "the paper's order appears" if (low > 0.5) == (difference > 0) else "the opposite of the paper's order appears"
    )


def paper_elsewhere(protocol: Config) -> Iterator[str]:
    """The paper's table of MT10 in words, for runs that follow another protocol and are not comparable with it."""
    if of_paper(protocol) is MT10:
        scores = (f"{name} {score.iqm:.2f} [{score.low:.2f}, {score.high:.2f}]" for name, score in TABLE_MT10.items())
        yield f"Not comparable, for scale: the paper's mtsac after {MT10.timesteps:,} timesteps: {', '.join(scores)}"
