"""The plasticity buffer: the latest training observations, on which metrics and ReDo look at the networks."""

import torch
from torch import Tensor

CAPACITY = 100_000  # observations of all tasks together
BATCH = 1024


class PlasticityBuffer:
    """First in, first out; as tensors of one length: `observations` [n, *shape] and `tasks` int64 [n].

    Args:
        shape, dtype: of an observation; MiniGrid's, if not given.
    """

    def __init__(self, shape: tuple[int, ...] = (7, 7, 3), dtype: torch.dtype = torch.uint8):
        self.observations = torch.empty(0, *shape, dtype=dtype)
        self.tasks = torch.empty(0, dtype=torch.int64)

    def add(self, observations: Tensor, tasks: Tensor) -> None:
        self.observations = torch.cat((self.observations, observations))[-CAPACITY:]
        self.tasks = torch.cat((self.tasks, tasks))[-CAPACITY:]

    def sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Up to 1024 different entries: observations and tasks."""
        rows = torch.randperm(len(self.tasks), generator=generator)[:BATCH]
        return self.observations[rows], self.tasks[rows]

    def state_dict(self) -> dict:
        return {"observations": self.observations.clone(), "tasks": self.tasks.to(torch.uint8)}

    def load_state_dict(self, state: dict) -> None:
        self.observations, self.tasks = state["observations"], state["tasks"].long()
