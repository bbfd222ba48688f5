"""Rows: what a run logs at each rollout, on its way to the logger in the order of timesteps."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rl.reporting.logger import Logger

Metrics = dict[str, float]


@dataclass
class Row:
    """The metrics at one clock, in three parts: of learning, of an evaluation if there was one, and of what followed.

    The evaluation may still go on, in other processes.
    """

    clock: int
    learned: Metrics
    evaluation: Metrics | Future[Metrics] = field(default_factory=dict)
    followed: Metrics = field(default_factory=dict)
    policy: nn.Module | None = None
    """What is evaluated."""

    @property
    def ready(self) -> bool:
        return not isinstance(self.evaluation, Future) or self.evaluation.done()

    def metrics(self) -> Metrics:
        """All three; waits for the evaluation, and raises what it raised."""
        evaluated = self.evaluation.result() if isinstance(self.evaluation, Future) else self.evaluation
        return self.learned | evaluated | self.followed

    def state_dict(self) -> dict[str, Any]:
        """All but the evaluation, which can be made again from it."""
        parts = ({name: float(value) for name, value in part.items()} for part in (self.learned, self.followed))
        return {"metrics": list(parts), "policy": self.policy.state_dict()}


class Rows:
    """Those not yet written: a row whose evaluation goes on, and what was added later.

    Args:
        report: is told the clock and the metrics of every row with an evaluation, when it is written.
    """

    def __init__(self, logger: Logger, report: Callable[[int, Metrics], None]):
        self._logger, self._report = logger, report
        self._rows: deque[Row] = deque()

    @property
    def first(self) -> Row | None:
        return self._rows[0] if self._rows else None

    def add(self, row: Row) -> None:
        self._rows.append(row)

    def write(self, wait: bool = False) -> None:
        """Write the rows up to the first whose evaluation goes on; all, if they are to be waited for."""
        while self._rows and (wait or self._rows[0].ready):
            row = self._rows[0]
            metrics = row.metrics()
            self._logger.record(row.clock, metrics)
            self._rows.popleft()
            if row.policy:
                self._report(row.clock, metrics)
