"""MOORE: a mixture of experts whose outputs are orthonormal for every observation."""

import torch
from torch import Tensor

from rl.agents.moe import MoE

EPSILON = 1e-8  # added to norms: an expert that was pruned away has the output zero


class MOORE(MoE):
    def experts(self, observations: Tensor) -> Tensor:
        return orthonormalise(self.encoder(observations))


def orthonormalise(vectors: Tensor) -> Tensor:
    """Gram-Schmidt on the k vectors of each sample, [N, k, D], in their order.

    This is the stable ("modified") form: each finished vector is taken out of all later ones at once.
    """
    basis, rest = [], vectors
    while rest.shape[1]:
        first, rest = rest[:, :1], rest[:, 1:]
        basis.append(first / (first.norm(dim=-1, keepdim=True) + EPSILON))
        rest = rest - (rest * basis[-1]).sum(-1, keepdim=True) * basis[-1]
    return torch.cat(basis, dim=1)
