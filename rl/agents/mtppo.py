"""MTPPO: one encoder shared by all tasks, one head per task."""

from collections.abc import Callable

from torch import Tensor, nn

from rl.agents.encoder import Encoder, ImageEncoder
from rl.agents.heads import heads_for


class MTPPO(nn.Module):
    """Observations [N, ...] and task ids [N] to [N, out_features]: what an actor's policy or a critic's value needs.

    With one task this is the network of single-task PPO.

    Args:
        encoder: makes the encoder of so many experts.
    """

    def __init__(
        self, num_tasks: int, out_features: int, block_size: int, encoder: Callable[[int], Encoder] = ImageEncoder
    ):
        super().__init__()
        self.encoder = encoder(1)
        self.activation = nn.Tanh()
        self.heads = heads_for(self.encoder, num_tasks, out_features, block_size)

    def forward(self, observations: Tensor, task: Tensor) -> Tensor:
        return self.heads(self.activation(self.encoder(observations).squeeze(1)), task)
