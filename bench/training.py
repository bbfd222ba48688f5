"""Training: a layer alone, with Adam and random data, trained as an inner layer is; and whether it is right."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekern as sk
from bench.case import Case
from bench.measure import ROTATED_BYTES, rotated
from bench.problem import BOUND
from sparsekern.backends.reference import densify

ROTATED_ON_GPU = 2**27  # bytes: more than the L2 cache of any GPU of today


class Training:
    """Both gradients are wanted, of the weight and of the input."""

    def __init__(self, layer: nn.Module, case: Case):
        # fused: torch's fastest Adam, by up to ten times, so that the products show; the default also takes the square
        # root of zeros, which dead slots have, ten times slower than that of other numbers
        on_gpu = case.device == "cuda"
        self.layer = layer
        self.optimizer = torch.optim.Adam(layer.parameters(), fused=True, capturable=on_gpu)
        self.inputs, self.gradients = (
            rotated(case.tokens, features, case.dtype, case.device, ROTATED_ON_GPU if on_gpu else ROTATED_BYTES)
            for features in (case.in_features, case.out_features)
        )
        self.calls = min(len(self.inputs), len(self.gradients)) if on_gpu else 1
        """How many calls one timing of a GPU takes, so that each finds cold data."""

    @torch.no_grad()
    def forward(self):
        self.layer(next(self.inputs))

    def forward_with_gradients(self):
        """Of x and the parameters, which a backward could take; there is none."""
        self.layer(next(self.inputs).detach().requires_grad_())

    def forward_backward(self):
        x = next(self.inputs).detach().requires_grad_()
        self.layer(x).backward(next(self.gradients))

    def both_gradients(self):
        """Forward and backward that leave no gradient behind to be added to."""
        x = next(self.inputs).detach().requires_grad_()
        return torch.autograd.grad(self.layer(x), (x, *self.layer.parameters()), next(self.gradients))

    def step(self):
        self.forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def dense_training(case: Case, bias: bool = True) -> Training:
    layer = nn.Linear(case.in_features, case.out_features, bias, dtype=case.dtype, device=case.device)
    return Training(layer, case)


def sparse_training(case: Case, bias: bool = True) -> Training:
    layer = sparse_layer(case, bias)
    check(layer, case)
    return Training(layer, case)


def sparse_layer(case: Case, bias: bool = True) -> sk.SparseLinear:
    return sk.SparseLinear(
        case.in_features,
        case.out_features,
        bias,
        dtype=case.dtype,
        device=case.device,
        density=float(case.density),
        block_size=case.block_size,
    )


def check(layer: sk.SparseLinear, case: Case) -> None:
    """Compare output and gradients of a sparse layer with those of its dense matrix."""
    dense = layer.to_dense().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
    x, dy = (
        torch.randn(case.tokens, n, dtype=dense.dtype, device=dense.device)
        for n in (layer.in_features, layer.out_features)
    )
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(ours), F.linear(theirs, dense, bias)
    y.backward(dy)
    expected.backward(dy)
    pairs = [(y, expected), (ours.grad, theirs.grad)]
    pairs += [(blocks_to_dense(layer, layer.weight.grad), dense.grad * live_elements(layer))]
    if bias is not None:
        pairs += [(layer.bias.grad, bias.grad)]
    for got, want in pairs:
        check_elements(got, want, BOUND[case.arithmetic])
    layer.zero_grad()


def check_elements(got: Tensor, want: Tensor, bound: float) -> None:
    torch.testing.assert_close(got, want, rtol=10 * bound, atol=bound * float(want.detach().abs().max()))


def blocks_to_dense(layer: sk.SparseLinear, blocks: Tensor) -> Tensor:
    """Blocks [num_slots, B, B] in their places of a matrix [out, in]."""
    return torch.block_diag(*densify(blocks, layer.topology.layout))


def live_elements(layer: sk.SparseLinear) -> Tensor:
    """1 where a weight is live, else 0: [out, in]."""
    alive = (layer.topology.block_rows >= 0)[:, None, None].expand_as(layer.weight)
    return blocks_to_dense(layer, alive.to(layer.weight.dtype))


def work(layer: sk.SparseLinear, tokens: int, step: bool = True) -> dict[str, float]:
    """What one product, or the three of a training step, cannot do without.

    Returns:
        flop: floating-point operations on live weights.
        bytes: that must come from memory or go there, where no array is in a cache before and none is fetched twice.
            A step's are x, y and their gradients, and the weight, which is read twice, and its gradient.
    """
    live = layer.topology.num_live * layer.block_size**2
    activations = tokens * (layer.out_features + layer.in_features)
    flop, elements = (
        (6 * tokens * live, 3 * live + 2 * activations) if step else (2 * tokens * live, live + activations)
    )
    return {"flop": flop, "bytes": layer.weight.element_size() * elements}
