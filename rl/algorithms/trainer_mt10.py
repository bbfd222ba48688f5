"""MT10Trainer: what the trainings on MT10 have in common: the environments, and how a policy is played there."""

from functools import partial

import numpy as np
from torch import nn

from rl.algorithms.trainer import Metrics, Trainer
from rl.envs.metaworld import MT10, make_mt10
from rl.episodes import evaluate_mt10, mt10_metrics
from rl.evaluators import Act, mt10_evaluators


class MT10Trainer(Trainer):
    """A subclass calls `start_processes` at the end of its __init__: whatever fails before that leaves no process."""

    def start_processes(self, best: Act) -> None:
        """Start those that step the environments and those that play evaluations, in which `best` takes the actions."""
        self._best = best
        self.envs = make_mt10(self.config.seed, self.config.workers)
        self.evaluators = mt10_evaluators(self.config, best)

    def play(self, policy: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        best = partial(self._best, policy)
        return evaluate_mt10(self.envs, best, self.config.episodes, self.config.seed, self.clock)

    def act(self, observation: np.ndarray, task: int, generator: np.random.Generator) -> np.ndarray:
        rows = np.tile(observation, (len(MT10), 1))  # of which one is of its task
        return self._best(self.learners["actor"].network, rows)[task]

    def metrics(self, returns: np.ndarray, solved: np.ndarray) -> Metrics:
        return mt10_metrics([task.name for task in MT10], returns, solved)

    def close(self) -> None:
        super().close()
        self.envs.close()
