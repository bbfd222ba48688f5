"""One head per task, all in one launch per layer: a batch of mixed tasks is no loop over tasks."""

import torch
from torch import Tensor, nn

import sparsekern as sk
from rl.agents.encoder import Encoder


class TaskHeads(nn.Module):
    """Per task Linear(in_features, hidden), Tanh, Linear(hidden, out_features), or without `hidden` the last alone.

    The layers start with every block live, which makes them the dense network; a treatment may make them sparse. A
    layer that blocks of block_size would pad by over 25% gets blocks of 1.

    Args:
        bound: the last layer's first weights are uniform within it and its biases zero; None: as in nn.Linear.
    """

    def __init__(
        self,
        num_tasks: int,
        in_features: int,
        out_features: int,
        block_size: int,
        hidden: int | None,
        bound: float | None = None,
    ):
        super().__init__()
        self._bound = bound

        def per_task(features_in: int, features_out: int) -> sk.SparseLinear:
            return sk.SparseLinear(
                num_tasks * features_in,
                num_tasks * features_out,
                density=1.0,
                block_size=block_size if -features_out % block_size <= features_out / 4 else 1,
                groups=num_tasks,
            )

        self.hidden = per_task(in_features, hidden) if hidden else None
        self.activation = nn.Tanh() if hidden else None
        self.output = per_task(hidden or in_features, out_features)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw first values, where they are not those of SparseLinear."""
        if self._bound is not None:
            self.output.weight.uniform_(-self._bound, self._bound).mul_(self.output.lanes())  # padding stays zero
            self.output.bias.zero_()

    def reset_output(self) -> None:
        """Draw the last layer anew."""
        self.output.reset_parameters()
        self.initialise()

    def forward(self, features: Tensor, task: Tensor | None) -> Tensor:
        """Features [N, in_features] to [N, out_features].

        Args:
            task: int64 [N], in any order and unequal numbers; None: features are [M, num_tasks, in_features], which
                needs no sorting, and so are outputs.
        """
        if task is None:
            features = features.flatten(1)  # a token is a row of every task
        if self.hidden is not None:
            features = self.activation(self.hidden(features, group=task))
        outputs = self.output(features, group=task)
        return outputs.unflatten(1, (self.output.groups, -1)) if task is None else outputs


def heads_for(encoder: Encoder, num_tasks: int, out_features: int, block_size: int) -> TaskHeads:
    """The heads that read this encoder's features, as it wants them."""
    hidden, bound = encoder.head_hidden, encoder.head_bound
    return TaskHeads(num_tasks, encoder.features, out_features, block_size, hidden, bound)
