"""Training: a layer alone, with Adam and random data, trained as an inner layer is; and whether it is right."""

import torch
from torch import nn
from torch.nn import functional as F

import sparsekern as sk
from bench.case import Case
from bench.measure import rotated
from sparsekern.backends.reference import densify

ELEMENT = torch.finfo(torch.float32).bits // 8


class Training:
    """Both gradients are wanted, of the weight and of the input."""

    def __init__(self, layer: nn.Module, case: Case):
        # fused: torch's fastest Adam, by up to ten times, so that the products show; the default also takes the square
        # root of zeros, which dead slots have, ten times slower than that of other numbers
        self.layer, self.optimizer = layer, torch.optim.Adam(layer.parameters(), fused=True)
        self.inputs = rotated(case.tokens, case.in_features)
        self.gradients = rotated(case.tokens, case.out_features)

    @torch.no_grad()
    def forward(self):
        self.layer(next(self.inputs))

    def forward_backward(self):
        x = next(self.inputs).detach().requires_grad_()
        self.layer(x).backward(next(self.gradients))

    def step(self):
        self.forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def dense_training(case: Case) -> Training:
    return Training(nn.Linear(case.in_features, case.out_features), case)


def sparse_training(case: Case) -> Training:
    layer = sk.SparseLinear(
        case.in_features, case.out_features, density=float(case.density), block_size=case.block_size
    )
    check(layer, case.tokens)
    return Training(layer, case)


def check(layer: sk.SparseLinear, tokens: int) -> None:
    """Compare output and gradients of a sparse layer with those of its dense matrix."""
    dense = layer.to_dense().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    x, dy = torch.randn(tokens, layer.in_features), torch.randn(tokens, layer.out_features)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(ours), F.linear(theirs, dense, bias)
    y.backward(dy)
    expected.backward(dy)
    weight_gradient = densify(layer.weight.grad, layer.topology.layout)[0]
    alive = (layer.topology.block_rows >= 0)[:, None, None].expand_as(layer.weight).float()
    live = densify(alive, layer.topology.layout)[0]
    for got, want in (
        (y, expected),
        (ours.grad, theirs.grad),
        (layer.bias.grad, bias.grad),
        (weight_gradient, dense.grad * live),
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.detach().abs().max()))
    layer.zero_grad()


def work(case: Case, products: int) -> dict[str, float]:
    """Floating-point operations on live weights, and bytes that must move, in so many of the three products."""
    live = case.density * case.out_features * case.in_features
    activations = case.tokens * (case.out_features + case.in_features)
    return {"flop": 2 * products * case.tokens * live, "bytes": ELEMENT * products * (live + activations)}
