"""Layer norm, with learned scale and shift, on what every hidden layer computes, before its activation.

Each sample is normalised by itself; each expert's and each head's share of a layer is a layer of its own.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rl.treatments.context import Context


def prepare(context: Context) -> None:
    encoder, heads = context.network.encoder, context.network.heads
    for i, neurons, positions in zip((0, 2, 4), encoder.neurons, encoder.positions, strict=True):
        encoder[i] = Normalised(encoder[i], LayerNorm(encoder.experts, neurons * positions))
    if heads.hidden is not None:
        tasks, hidden = heads.hidden.groups, heads.hidden.out_features
        heads.hidden = Normalised(heads.hidden, LayerNorm(tasks, hidden // tasks))


class LayerNorm(nn.Module):
    """nn.LayerNorm for `groups` layers of `features` features each, side by side, or by group id as in SparseLinear."""

    def __init__(self, groups: int, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(groups, features))
        self.bias = nn.Parameter(torch.zeros(groups, features))

    def normalised(self, x: Tensor) -> Tensor:
        """[N, ...] to mean 0 and variance 1 per sample and group: [N, groups, features], or [N, 1, features]."""
        features = self.weight.shape[1]
        return F.layer_norm(x.reshape(len(x), -1, features), (features,))

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        if group is None:
            weight, bias = self.weight, self.bias
        else:
            weight, bias = self.weight[group].unsqueeze(1), self.bias[group].unsqueeze(1)
        return (self.normalised(x) * weight + bias).view_as(x)


class Normalised(nn.Module):
    """A layer and the normalisation of what it computes."""

    def __init__(self, layer: nn.Module, norm: LayerNorm):
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor, **group: Tensor) -> Tensor:
        return self.norm(self.layer(x, **group), **group)
