"""Partners of a sparse network: the same function as mask x dense, and whether two networks are the same function."""

from copy import deepcopy

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
        gradients.append([own.grad, *(p.grad for name, p in each.named_parameters() if name.endswith("bias"))])
        each.zero_grad()
    check_close([outputs[0], *gradients[0]], [outputs[1], *gradients[1]])


def check_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """By norms: where a ReLU's input rounds to the other side of zero, single gradients differ altogether."""
    for got, want in zip(found, expected, strict=True):
        error = float((got - want).norm() / want.norm())
        assert error < 1e-3, f"relative error {error:.1e}"


def training_bytes(training) -> int:
    """Weights, gradients, Adam's state, indices and masks after a step."""
    training.step()
    training.forward_backward()
    count = sk.summary(training.layer, training.optimizer).total.total
    training.optimizer.zero_grad()
    return count
