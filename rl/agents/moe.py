"""MoE: several encoders, mixed by weights that each task learns; one head per task."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from rl.agents.encoder import Encoder, ImageEncoder
from rl.agents.heads import heads_for


class MoE(nn.Module):
    """As MTPPO, on Tanh(sum_j w_j e_j) of the experts' outputs e_j; w = task_encoder(one-hot of the task), of any sign.

    There are (num_tasks + 1) // 2 experts, but at most 4: 2, 3 and 4 for MT3, MT5 and MT7, 4 for MT10.
    """

    def __init__(
        self, num_tasks: int, out_features: int, block_size: int, encoder: Callable[[int], Encoder] = ImageEncoder
    ):
        super().__init__()
        self.num_tasks, num_experts = num_tasks, min((num_tasks + 1) // 2, 4)
        self.encoder = encoder(num_experts)
        self.task_encoder = nn.Linear(num_tasks, num_experts, bias=False)
        self.activation = nn.Tanh()
        self.heads = heads_for(self.encoder, num_tasks, out_features, block_size)

    def experts(self, observations: Tensor) -> Tensor:
        """What is mixed: [N, num_experts, features]."""
        return self.encoder(observations)

    def forward(self, observations: Tensor, task: Tensor) -> Tensor:
        weights = self.task_encoder(F.one_hot(task, self.num_tasks).float())
        mixed = (weights.unsqueeze(1) @ self.experts(observations)).squeeze(1)
        return self.heads(self.activation(mixed), task)
