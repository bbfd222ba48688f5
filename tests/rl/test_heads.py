"""rl/agents/heads.py: the grouped heads are per-task nn.Linear's."""

import pytest
import torch
from torch import nn

from rl.agents.heads import TaskHeads


@pytest.mark.parametrize(
    "task",
    [[2, 0, 0, 1, 2, 2, 0], [1, 1, 1], [0, 1, 2, 0, 1, 2], []],
    ids=["unequal", "two empty", "in order", "no tokens"],
)
def test_heads_and_their_gradients_equal_one_network_per_task(task):
    torch.manual_seed(0)
    task = torch.tensor(task, dtype=torch.int64)
    heads = TaskHeads(num_tasks=3, in_features=10, out_features=4, block_size=1, hidden=6)
    features = torch.randn(len(task), 10, requires_grad=True)
    y = heads(features, task)
    y.square().sum().backward()

    separate = []
    for i in range(3):
        first, last = nn.Linear(10, 6), nn.Linear(6, 4)
        for linear, layer in ((first, heads.hidden), (last, heads.output)):
            rows, cols = linear.weight.shape
            with torch.no_grad():
                linear.weight.copy_(layer.to_dense()[i * rows : (i + 1) * rows, i * cols : (i + 1) * cols])
                linear.bias.copy_(layer.bias[i * rows : (i + 1) * rows])
        separate.append(nn.Sequential(first, nn.Tanh(), last))
    again = features.detach().clone().requires_grad_()
    rows = [separate[i](x) for i, x in zip(task.tolist(), again, strict=True)]
    expected = torch.stack(rows) if rows else torch.empty(0, 4)
    torch.testing.assert_close(y, expected)
    expected.square().sum().backward() if rows else None
    torch.testing.assert_close(features.grad, again.grad if rows else torch.zeros(0, 10))
    for i, (first, _, last) in enumerate(separate):
        for linear, layer in ((first, heads.hidden), (last, heads.output)):
            bias = linear.bias.grad if linear.bias.grad is not None else torch.zeros_like(linear.bias)
            torch.testing.assert_close(layer.bias.grad.view(3, -1)[i], bias)
            weight = linear.weight.grad if linear.weight.grad is not None else torch.zeros_like(linear.weight)
            torch.testing.assert_close(layer.weight.grad.view(3, *linear.weight.shape)[i], weight)
