"""One head per task, all in two layers: a batch of mixed tasks is one launch per layer, not a loop over tasks."""

import torch
from torch import Tensor, nn

import sparsekern as sk


class TaskHeads(nn.Module):
    """Per task Linear(in_features, hidden), Tanh, Linear(hidden, out_features).

    The layers start with every block live, which makes them the dense network; a treatment may make them sparse.
    """

    def __init__(self, num_tasks: int, in_features: int, out_features: int, hidden: int = 128):
        super().__init__()

        def per_task(features_in: int, features_out: int) -> sk.SparseLinear:
            return sk.SparseLinear(
                num_tasks * features_in, num_tasks * features_out, density=1.0, block_size=1, groups=num_tasks
            )

        self.out_features = out_features
        self.hidden = per_task(in_features, hidden)
        self.output = per_task(hidden, out_features)

    def forward(self, features: Tensor, task: Tensor | None = None) -> Tensor:
        """Send each row to the head of its task.

        Args:
            features: float [N, in_features].
            task: int64 [N], in any order and unequal numbers; None means lock-step: row i is of task i % num_tasks; no
                sorting then, which halves the cost of a small batch.
        Returns:
            float [N, out_features].
        """
        if task is not None:
            return self.output(torch.tanh(self.hidden(features, group=task)), group=task)
        rounds = features.reshape(-1, self.hidden.in_features)  # all tasks side by side
        return self.output(torch.tanh(self.hidden(rounds))).reshape(-1, self.out_features)
