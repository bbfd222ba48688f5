"""The vendor's dense GEMM between copies: what answers where dense is faster, and blocks that no kernel takes.

A dense matrix lives for the length of a product, so the memory of weights, gradients and optimiser state stays that of
the live blocks.
"""

import torch
from torch import Tensor

from sparsekern.backends import cpu, reference, triton
from sparsekern.topology import Layout


def dds(
    x: Tensor,
    weight: Tensor,
    layout: Layout,
    bias: Tensor | None = None,
    transpose: bool = False,
    token_offsets: Tensor | None = None,
) -> Tensor:
    """As `reference.dds`."""
    dense = _copies(x).densify(weight, layout)
    if _host_knows(x, token_offsets):
        return reference.multiply(x, dense, bias, transpose, token_offsets)
    # every token is multiplied by the matrices of all groups, and keeps the result of its own
    stacked = dense.flatten(0, 1).t() if transpose else dense.transpose(0, 1).flatten(1)
    every = x @ stacked if bias is None else torch.addmm(bias, x, stacked)
    every = every.view(len(x), layout.groups, -1)
    return every[torch.arange(len(x), device=x.device), _group_of_tokens(x, token_offsets)]


def sdd(dy: Tensor, x: Tensor, layout: Layout, token_offsets: Tensor | None = None) -> Tensor:
    """As `reference.sdd`."""
    if _host_knows(x, token_offsets):
        return _copies(x).gather(reference.outer(dy, x, layout.groups, token_offsets), layout)
    wide = dy.new_zeros(len(dy), layout.groups, dy.shape[1])
    wide[torch.arange(len(x), device=x.device), _group_of_tokens(x, token_offsets)] = dy
    dense = wide.flatten(1).t() @ x
    return _copies(x).gather(dense.view(layout.groups, -1, x.shape[1]), layout)


def _host_knows(x: Tensor, token_offsets: Tensor | None) -> bool:
    """Whether the sizes of all GEMMs can be read without waiting for a GPU."""
    return token_offsets is None or x.device.type == "cpu"


def _group_of_tokens(x: Tensor, token_offsets: Tensor) -> Tensor:
    return torch.searchsorted(token_offsets[1:], torch.arange(len(x), device=x.device), right=True)


def _copies(x: Tensor):
    """The backend that copies blocks fastest where x is."""
    fastest = {"cpu": cpu, "cuda": triton}.get(x.device.type, reference)
    return reference if fastest.unavailable() else fastest
