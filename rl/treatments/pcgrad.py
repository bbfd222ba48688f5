"""PCGrad (arXiv 2001.06782): where two tasks' gradients of shared weights conflict, the conflict is removed.

Each task's gradient is that of its own mean loss. Shared weights get the mean of the tasks' projected gradients; a
head, which only one task trains, that task's gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector


def backward(
    network: nn.Module, loss: Callable[[Tensor], Tensor], rows: Tensor, tasks: Tensor, generator: torch.Generator
) -> None:
    of_heads = set(network.heads.parameters())
    shared = [p for p in network.parameters() if p not in of_heads]
    gradients = []
    for task in tasks.unique():
        loss(rows[tasks == task]).backward()
        gradients.append(parameters_to_vector([p.grad for p in shared]))
        for p in shared:
            p.grad = None
    merged = project(torch.stack(gradients), generator).mean(0)
    for p, gradient in zip(shared, merged.split([p.numel() for p in shared]), strict=True):
        p.grad = gradient.view_as(p)


def project(gradients: Tensor, generator: torch.Generator) -> Tensor:
    """Take out of each of n gradients [n, D], in random order, what points against another one as it was."""
    projected = gradients.clone()
    for i, gradient in enumerate(projected):
        for j in torch.randperm(len(gradients), generator=generator, device=generator.device).tolist():
            other = gradients[j]
            if j != i:
                gradient -= (gradient @ other).clamp(max=0) / (other @ other + 1e-12) * other
    return projected
