"""MTPPO: one encoder shared by all tasks, one head per task."""

from torch import Tensor, nn

from rl.agents.encoder import FEATURES, Encoder
from rl.agents.heads import TaskHeads


class MTPPO(nn.Module):
    """Observations uint8 [N, 7, 7, 3] and task ids [N] to [N, out_features]: an actor's logits or a critic's value.

    With one task this is the network of single-task PPO.
    """

    def __init__(self, num_tasks: int, out_features: int, block_size: int):
        super().__init__()
        self.encoder = Encoder()
        self.activation = nn.Tanh()
        self.heads = TaskHeads(num_tasks, FEATURES, out_features, block_size)

    def forward(self, observations: Tensor, task: Tensor) -> Tensor:
        return self.heads(self.activation(self.encoder(observations).squeeze(1)), task)
