"""Acting with an actor of discrete actions."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn


class Policy:
    """An actor whose weights rest, and which is therefore asked only once about what a task sees again and again.

    In thousands of timesteps a task shows some hundred distinct observations. Each is a row of `observations`, `tasks`
    and `logits`, in the order in which they were met.
    """

    def __init__(self, actor: nn.Module):
        self._actor = actor
        self._row_of: dict[bytes, int] = {}
        self.observations: list[np.ndarray] = []
        self.tasks: list[int] = []
        self.logits: list[np.ndarray] = []

    @torch.no_grad()
    def rows(self, observations: np.ndarray, tasks: Sequence[int]) -> list[int]:
        """Find the row of each of these N observations, with one call of the actor for those not met before."""
        keys = [bytes((task,)) + o.tobytes() for o, task in zip(observations, tasks, strict=True)]
        new = {key: i for i, key in enumerate(keys) if key not in self._row_of}
        if new:
            met, of = observations[list(new.values())], [tasks[i] for i in new.values()]
            self.logits += [*self._actor(torch.from_numpy(met), torch.tensor(of)).numpy()]
            self.observations += [*met]
            self.tasks += of
            self._row_of |= zip(new, range(len(self._row_of), len(self.tasks)), strict=True)
        return [self._row_of[key] for key in keys]

    def act(self, rows: Sequence[int], generator: np.random.Generator) -> np.ndarray:
        """Draw an action for each row: int64 [N]."""
        logits = np.stack([self.logits[row] for row in rows])
        return (logits + generator.gumbel(size=logits.shape)).argmax(-1)  # Gumbel's trick: a draw from softmax(logits)
