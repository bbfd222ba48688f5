"""The vendor's dense GEMM between copies: what answers where dense is faster, and blocks that no kernel takes.

A dense matrix lives for the length of a product, so the memory of weights, gradients and optimiser state stays that of
the live blocks. At few tokens, where the copy takes longest beside the product, the matrix of a forward is kept for the
backward's product with the same weight: see `is_kept`. No operation waits for a GPU, ragged groups included.
"""

import torch
from torch import Tensor

from sparsekern.backends import cpu, reference, triton
from sparsekern.layout import Layout

# With more tokens a product hides the copy: 17 of 174 microseconds, as the model of an H200 has them at 4096 x 4096.
MOST_TOKENS_TO_KEEP = 4096
OPERATIONS = ("dds", "sdd", "block_norms", "add_block_norms", "densify", "gather")


def unavailable() -> None:
    """The dense path runs everywhere."""


def refusal(x: Tensor, layout: Layout) -> None:
    """It takes every operand."""


def densify(weight: Tensor, layout: Layout) -> Tensor:
    """As `reference.densify`, by whoever copies fastest here."""
    return _copies(weight).densify(weight, layout)


def gather(dense: Tensor, layout: Layout) -> Tensor:
    """As `reference.gather`, by whoever copies fastest here."""
    return _copies(dense).gather(dense, layout)


def dds(
    x: Tensor,
    weight: Tensor,
    layout: Layout,
    bias: Tensor | None = None,
    transpose: bool = False,
    token_offsets: Tensor | None = None,
) -> Tensor:
    """As `reference.dds`."""
    return multiply(x, densify(weight, layout), layout, bias, transpose, token_offsets)


def is_kept(x: Tensor) -> bool:
    """Whether a training step that takes this path keeps the dense matrices of the forward's x W or x Wᵀ.

    The backward then copies no blocks for the gradient of x, and frees the matrices. Until then each such layer holds
    its dense weights, groups and padding included: 1 / density times its blocks' elements. Of all layers together that
    is the weights of the dense model at most. Registered operators, as under torch.compile, keep nothing.
    """
    return len(x) <= MOST_TOKENS_TO_KEEP


def multiply(
    x: Tensor, matrices: Tensor, layout: Layout, bias: Tensor | None, transpose: bool, token_offsets: Tensor | None
) -> Tensor:
    """`dds` with the dense matrices of its weight."""
    if _host_knows(x, token_offsets):
        return reference.multiply(x, matrices, bias, transpose, token_offsets)
    # every token is multiplied by the matrices of all groups, and keeps the result of its own
    stacked = matrices.flatten(0, 1).t() if transpose else matrices.transpose(0, 1).flatten(1)
    every = x @ stacked if bias is None else torch.addmm(bias, x, stacked)
    every = every.view(len(x), layout.groups, -1)
    return every[torch.arange(len(x), device=x.device), _group_of_tokens(x, token_offsets)]


def sdd(dy: Tensor, x: Tensor, layout: Layout, token_offsets: Tensor | None = None) -> Tensor:
    """As `reference.sdd`."""
    return _copies(x).gather(_outer(dy, x, layout.groups, token_offsets), layout)


def block_norms(dy: Tensor, x: Tensor, layout: Layout, rows: slice, token_offsets: Tensor | None = None) -> Tensor:
    """As `reference.block_norms`."""
    return reference.block_norms(dy, x, layout, rows, token_offsets, multiply=_outer)


def add_block_norms(
    dy: Tensor, x: Tensor, layout: Layout, norms: Tensor, armed: Tensor, token_offsets: Tensor | None = None
) -> None:
    """As `reference.add_block_norms`."""
    reference.add_block_norms(dy, x, layout, norms, armed, token_offsets, multiply=_outer)


def _outer(dy: Tensor, x: Tensor, groups: int, token_offsets: Tensor | None) -> Tensor:
    """As `reference.outer`."""
    if _host_knows(x, token_offsets):
        return reference.outer(dy, x, groups, token_offsets)
    wide = dy.new_zeros(len(dy), groups, dy.shape[1])
    wide[torch.arange(len(x), device=x.device), _group_of_tokens(x, token_offsets)] = dy
    return (wide.flatten(1).t() @ x).view(groups, -1, x.shape[1])


def _host_knows(x: Tensor, token_offsets: Tensor | None) -> bool:
    """Whether the sizes of all GEMMs can be read without waiting for a GPU."""
    return token_offsets is None or x.device.type == "cpu"


def _group_of_tokens(x: Tensor, token_offsets: Tensor) -> Tensor:
    return torch.searchsorted(token_offsets[1:], torch.arange(len(x), device=x.device), right=True)


def _copies(x: Tensor):
    """The backend that copies blocks fastest where x is: the one use that a backend makes of others."""
    fastest = {"cpu": cpu, "cuda": triton}.get(x.device.type, reference)
    moves = fastest is not cpu or x.element_size() in (2, 4)  # C++ moves elements of these sizes only
    return fastest if moves and not fastest.unavailable() else reference
