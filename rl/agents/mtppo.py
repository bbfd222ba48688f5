"""MTPPO: one encoder shared by all tasks, one head per task."""

import torch
from torch import Tensor, nn

from rl.agents.encoder import FEATURES, Encoder
from rl.agents.heads import TaskHeads


class MTPPO(nn.Module):
    """Observations uint8 [N, 7, 7, 3] and task ids [N] to [N, out_features]: an actor's logits or a critic's value."""

    def __init__(self, num_tasks: int, out_features: int, block_size: int):
        super().__init__()
        self.encoder = Encoder()
        self.heads = TaskHeads(num_tasks, FEATURES, out_features, block_size)

    def forward(self, observations: Tensor, task: Tensor) -> Tensor:
        return self.heads(torch.tanh(self.encoder(observations)), task)
