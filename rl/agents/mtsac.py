"""MTSAC: the networks of multi-task, multi-head soft actor-critic on Meta-World (paper.md: MTMH-SAC)."""

import torch
from torch import Tensor, nn

from rl.agents.encoder import StateEncoder
from rl.agents.heads import TaskHeads, heads_for


class MTSACActor(nn.Module):
    """Observations [N, in_features] to [N, 2 * actions]: means and log standard deviations, before squashing.

    Task ids are None where observations are [M, num_tasks, in_features], and then outputs are shaped alike.
    """

    def __init__(self, num_tasks: int, in_features: int, actions: int, block_size: int, encoder=StateEncoder):
        super().__init__()
        self.encoder = encoder(in_features=in_features)
        self.activation = nn.ReLU()
        self.heads = heads_for(self.encoder, num_tasks, 2 * actions, block_size)

    def forward(self, observations: Tensor, task: Tensor | None = None) -> Tensor:
        rows = observations.flatten(0, 1) if task is None else observations
        features = self.activation(self.encoder(rows).squeeze(1))
        return self.heads(features if task is not None else features.unflatten(0, observations.shape[:2]), task)


class MTSACCritics(nn.Module):
    """Two critics, side by side as groups: observations with actions [N, in_features] to values [N, 2].

    Task ids are None where observations are [M, num_tasks, in_features]; then values are [M, 2, num_tasks].
    """

    CRITICS = 2

    def __init__(self, num_tasks: int, in_features: int, block_size: int, encoder=StateEncoder):
        super().__init__()
        self.num_tasks = num_tasks
        self.encoder = encoder(self.CRITICS, in_features=in_features, block_size=block_size)
        self.activation = nn.ReLU()
        self.heads = TaskHeads(self.CRITICS * num_tasks, self.encoder.features, 1, block_size, hidden=None, bound=3e-3)

    def forward(self, observations: Tensor, task: Tensor | None = None) -> Tensor:
        if task is None:
            features = self.activation(self.encoder(observations.flatten(0, 1)))  # [N, 2, features]
            features = features.unflatten(0, (-1, self.num_tasks)).transpose(1, 2)  # the heads of one critic, then ...
            return self.heads(features.flatten(1, 2), None).view(-1, self.CRITICS, self.num_tasks)
        features = self.activation(self.encoder(observations)).transpose(0, 1).flatten(0, 1)  # one critic, then ...
        task = torch.cat([task + critic * self.num_tasks for critic in range(self.CRITICS)])
        return self.heads(features, task).view(self.CRITICS, -1).T
