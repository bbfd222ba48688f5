"""MTSAC: the networks of multi-task, multi-head soft actor-critic on Meta-World (paper.md: MTMH-SAC)."""

import torch
from torch import Tensor, nn

from rl.agents.encoder import StateEncoder
from rl.agents.heads import TaskHeads, heads_for


class MTSACActor(nn.Module):
    """Observations [N, in_features] to [N, 2 * actions]: means and log standard deviations, before squashing.

    Task ids are None where every task has the same number of rows, in the order of tasks.
    """

    def __init__(self, num_tasks: int, in_features: int, actions: int, block_size: int, encoder=StateEncoder):
        super().__init__()
        self.encoder = encoder(in_features=in_features)
        self.activation = nn.ReLU()
        self.heads = heads_for(self.encoder, num_tasks, 2 * actions, block_size)

    def forward(self, observations: Tensor, task: Tensor | None = None) -> Tensor:
        return self.heads(self.activation(self.encoder(observations).squeeze(1)), task)


class MTSACCritics(nn.Module):
    """Two critics, side by side as groups: observations with actions [N, in_features] to values [N, 2]."""

    CRITICS = 2

    def __init__(self, num_tasks: int, in_features: int, block_size: int, encoder=StateEncoder):
        super().__init__()
        self.num_tasks = num_tasks
        self.encoder = encoder(self.CRITICS, in_features=in_features, block_size=block_size)
        self.activation = nn.ReLU()
        self.heads = TaskHeads(self.CRITICS * num_tasks, self.encoder.features, 1, block_size, hidden=None, bound=3e-3)

    def forward(self, observations: Tensor, task: Tensor | None = None) -> Tensor:
        features = self.activation(self.encoder(observations)).transpose(0, 1).flatten(0, 1)  # a critic after the other
        if task is not None:
            task = torch.cat([task + critic * self.num_tasks for critic in range(self.CRITICS)])
        return self.heads(features, task).view(self.CRITICS, -1).T
