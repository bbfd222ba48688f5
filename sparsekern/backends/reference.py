"""The products in plain torch: scatter the live blocks to a dense matrix, multiply, gather.

The truth in tests, on any device and for any block size; also the path of the vendor's GEMM that the chooser takes
where dense is faster. A full store of block size 1 is the dense matrix already, so nothing is copied.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsekern.layout import Layout

OPERATIONS = ("dds", "sdd", "block_norms", "add_block_norms", "densify", "gather")
# Elements of a gradient that are held at once while blocks are scored: 1 MB, about a core's cache.
STRIP = 2**18


def unavailable() -> None:
    """The reference runs everywhere."""


def refusal(x: Tensor, layout: Layout) -> None:
    """It takes every operand."""


def densify(weight: Tensor, layout: Layout) -> Tensor:
    """Scatter the blocks into dense matrices [groups, out_per_group, in_per_group], padded; dead places are zero."""
    g, r, c, b = layout.groups, layout.num_rows // layout.groups, layout.num_cols // layout.groups, layout.block_size
    if layout.full:
        blocks = weight
    else:
        blocks = weight.new_zeros(g * r * c + 1, b, b).index_copy_(0, layout.positions(), weight)[:-1]
    return blocks.view(g, r, c, b, b).transpose(2, 3).reshape(g, r * b, c * b)


def gather(dense: Tensor, layout: Layout) -> Tensor:
    """Collect the blocks [num_slots, B, B] of dense matrices [groups, out_per_group, in_per_group]; dead ones are 0."""
    g, r, c, b = layout.groups, layout.num_rows // layout.groups, layout.num_cols // layout.groups, layout.block_size
    blocks = dense.view(g, r, b, c, b).transpose(2, 3).reshape(g * r * c, b, b)
    if not layout.full:
        blocks = blocks[layout.positions().clamp(max=g * r * c - 1)]
    return layout.clear_dead(blocks)


def dds(
    x: Tensor,
    weight: Tensor,
    layout: Layout,
    bias: Tensor | None = None,
    transpose: bool = False,
    token_offsets: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias if `transpose`, else y = x W. See `sparsekern.products.dds`; here x is 2-D and padded."""
    return multiply(x, densify(weight, layout), bias, transpose, token_offsets)


def sdd(dy: Tensor, x: Tensor, layout: Layout, token_offsets: Tensor | None = None) -> Tensor:
    """The live blocks of dyᵀx, [num_slots, B, B]. See `sparsekern.products.sdd`; here both are 2-D and padded."""
    return gather(outer(dy, x, layout.groups, token_offsets), layout)


def block_norms(
    dy: Tensor, x: Tensor, layout: Layout, rows: slice, token_offsets: Tensor | None = None, multiply=None
) -> Tensor:
    """Squared norms, float32 [groups, rows, cols], of the blocks of dyᵀx in some block rows of every group.

    `multiply` computes dyᵀx in the place of `outer`.
    """
    b, per_group = layout.block_size, layout.num_rows // layout.groups
    strip = dy.unflatten(1, (dy.shape[1] // (per_group * b), per_group, b))[:, :, rows].flatten(1)
    dense = (multiply or outer)(strip, x, layout.groups, token_offsets)
    squares = dense.float().square_()
    return squares.view(layout.groups, -1, b, squares.shape[2] // b, b).sum(dim=(2, 4))


def add_block_norms(
    dy: Tensor,
    x: Tensor,
    layout: Layout,
    norms: Tensor,
    armed: Tensor,
    token_offsets: Tensor | None = None,
    multiply=None,
) -> None:
    """Add the squared norms of all blocks to `norms`, float32 [groups, rows, cols], where `armed`; below 0 counts as 0.

    Strip by strip of block rows, so that a dense gradient is never held.
    """
    height = max(1, STRIP // (layout.num_cols * layout.block_size**2))
    for top in range(0, norms.shape[1], height):
        strip = slice(top, min(top + height, norms.shape[1]))
        held = norms[:, strip]
        added = block_norms(dy, x, layout, strip, token_offsets, multiply) + torch.where(held < 0, 0, held)
        held.copy_(torch.where(armed, added, held))


def multiply(x: Tensor, dense: Tensor, bias: Tensor | None, transpose: bool, token_offsets: Tensor | None) -> Tensor:
    """x D, or x Dᵀ + bias, for the dense matrices D [groups, out_per_group, in_per_group] of a layer."""
    groups = len(dense)
    if token_offsets is not None:
        biases = groups * (None,) if bias is None else bias.view(groups, -1)
        parts = [
            F.linear(x[a:b], dense[group] if transpose else dense[group].t(), biases[group])
            for group, (a, b) in enumerate(_spans(token_offsets))
            if a < b  # of few tokens, most groups have none
        ]
        return torch.cat(parts) if parts else x.new_empty(0, dense.shape[1 if transpose else 2])
    if groups == 1:
        return F.linear(x, dense[0] if transpose else dense[0].t(), bias)
    matrices = dense.transpose(1, 2) if transpose else dense
    x = _split(x, groups)
    y = torch.bmm(x, matrices) if bias is None else torch.baddbmm(bias.view(groups, 1, -1), x, matrices)
    return y.transpose(0, 1).flatten(1)


def outer(dy: Tensor, x: Tensor, groups: int, token_offsets: Tensor | None) -> Tensor:
    """dyᵀx of every group, [groups, out_per_group, in_per_group]."""
    if token_offsets is not None:
        return torch.stack([dy[a:b].t() @ x[a:b] for a, b in _spans(token_offsets)])
    if groups == 1:
        return (dy.t() @ x)[None]
    return torch.bmm(_split(dy, groups).transpose(1, 2), _split(x, groups))


def _split(x: Tensor, groups: int) -> Tensor:
    """[tokens, groups * features] as [groups, tokens, features]."""
    return x.unflatten(1, (groups, x.shape[1] // groups)).transpose(0, 1)


def _spans(token_offsets: Tensor) -> list[tuple[int, int]]:
    ends = token_offsets.tolist()
    return list(zip(ends[:-1], ends[1:], strict=True))
