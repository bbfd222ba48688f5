"""Scores that rank blocks for dropping: the L1 norm, and integers that sort as floats do."""

import torch
from torch import Tensor

from sparsekern.layer import SparseLayer


def block_l1(layer: SparseLayer, mean: bool = False) -> Tensor:
    """float32 [num_slots]: sum of |w| of each block, or its mean over its elements where layers are compared.

    Padding and dead slots stand for no weight and count nothing, whatever a user's code has written there.
    """
    lanes, weight = layer.lanes(), layer.weight.detach()  # [num_slots, B, B]; [num_slots, 1, 1] without padding
    padded = lanes.shape == weight.shape and layer.block_size > 1
    if padded:  # where, not a product: NaN times zero is NaN
        weight = torch.where(lanes, weight, 0)
    norms = weight.abs().sum(dim=(1, 2), dtype=torch.float32)
    if not padded:
        norms.masked_fill_(~lanes.view(-1), 0)
    if mean:
        norms /= lanes.sum(dim=(1, 2)).clamp(min=1) if padded else layer.block_size**2
    return norms


def sortable(scores: Tensor) -> Tensor:
    """int32 that order as float32 scores do, NaN lowest: sorting integers takes a CPU a tenth of the time."""
    bits = (torch.where(scores.isnan(), -torch.inf, scores) + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
