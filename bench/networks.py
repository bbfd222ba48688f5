"""Partners of a sparse network: the same function as mask x dense, and whether two networks are the same function."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import sparsekern as sk


def masked(network: nn.Module) -> nn.Module:
    """A dense copy that multiplies each weight with its mask in every forward, by torch's own pruning tools."""
    dense = sk.densify(deepcopy(network))
    for name, layer in network.named_modules():
        if isinstance(layer, sk.SparseLinear):
            prune.custom_from_mask(dense.get_submodule(name), "weight", layer.to_dense() != 0)
    return dense


def check_same(network: nn.Module, other: nn.Module, x: Tensor) -> None:
    """Compare the outputs of two networks, the gradients of their inputs and of their biases."""
    outputs, gradients = [], []
    for each in (network, other):
        own = x.clone().requires_grad_()
        y = each(own)
        y.square().mean().backward()
        outputs.append(y.detach())
        gradients.append([own.grad, *(p.grad for p in each.parameters() if p.dim() == 1)])
        each.zero_grad()
    for got, want in zip([outputs[0], *gradients[0]], [outputs[1], *gradients[1]], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def training_bytes(training) -> int:
    """Weights, gradients, Adam's state, indices and masks after a step."""
    training.step()
    training.forward_backward()
    count = sk.summary(training.layer, training.optimizer).total.total
    training.optimizer.zero_grad()
    return count
