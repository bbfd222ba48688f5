"""One head per task, all in two layers: a batch of mixed tasks is one launch per layer, not a loop over tasks."""

from torch import Tensor, nn

import sparsekern as sk


class TaskHeads(nn.Module):
    """Per task Linear(in_features, hidden), Tanh, Linear(hidden, out_features).

    The layers start with every block live, which makes them the dense network; a treatment may make them sparse. A
    layer that blocks of block_size would pad by over 25% gets blocks of 1.
    """

    def __init__(self, num_tasks: int, in_features: int, out_features: int, block_size: int, hidden: int = 128):
        super().__init__()

        def per_task(features_in: int, features_out: int) -> sk.SparseLinear:
            return sk.SparseLinear(
                num_tasks * features_in,
                num_tasks * features_out,
                density=1.0,
                block_size=block_size if -features_out % block_size <= features_out / 4 else 1,
                groups=num_tasks,
            )

        self.hidden = per_task(in_features, hidden)
        self.activation = nn.Tanh()
        self.output = per_task(hidden, out_features)

    def forward(self, features: Tensor, task: Tensor) -> Tensor:
        """Features [N, in_features] and task ids int64 [N], in any order and unequal numbers, to [N, out_features]."""
        return self.output(self.activation(self.hidden(features, group=task)), group=task)
