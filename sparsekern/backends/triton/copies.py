"""Copies between the blocks of a layer and dense matrices, on a GPU, for any block size and dtype.

The dense path of the chooser stands or falls with them: in torch operations they are ten launches and three passes.
Blocks larger than single weights go to dense matrices by `fill`, which needs no clear.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.layout import Layout

BLOCK = 2048  # elements of a program


@triton.jit(do_not_specialize=["num_elements", "group_cols"])
def copy_kernel(
    blocks_ptr, dense_ptr,  # [num_slots, B, B], [groups, rows, cols]
    rows_ptr, cols_ptr, dead_ptr,  # int [num_slots] twice; None of a full store, which has the bits of its dead slots
    num_elements, group_cols,  # of all blocks; block columns of one group
    B: tl.constexpr, TO_BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy all live blocks into the dense matrices, or out of them; what goes into dead slots is zero."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < num_elements
    slot = e // (B * B)
    if rows_ptr is None:
        row, col = tl.where(inside, slot // group_cols, -1), slot % group_cols
        if dead_ptr is not None:
            bits = tl.load(dead_ptr + slot // 32, mask=inside, other=0)
            row = tl.where((bits >> (slot % 32).to(tl.int32)) & 1 == 0, row, -1)
    else:
        row = tl.load(rows_ptr + slot, mask=inside, other=-1).to(tl.int64)
        col = tl.load(cols_ptr + slot, mask=inside, other=0).to(tl.int64) % group_cols
    # groups stand below each other, and block rows are counted through them
    place = (row * B + e // B % B) * (group_cols * B) + col * B + e % B
    if TO_BLOCKS:
        tl.store(blocks_ptr + e, tl.load(dense_ptr + place, mask=row >= 0, other=0), mask=inside)
    else:
        tl.store(dense_ptr + place, tl.load(blocks_ptr + e, mask=row >= 0), mask=row >= 0)


def scatter(weight: Tensor, shape: tuple[int, int, int], layout: Layout) -> Tensor:
    """Clear dense matrices of this shape, then copy the live blocks into them."""
    dense = weight.new_zeros(shape)
    _copy(weight, dense, layout, to_blocks=False)
    return dense


def gather(dense: Tensor, layout: Layout) -> Tensor:
    """As `reference.gather`."""
    if layout.full and layout.block_size == 1:
        return layout.clear_dead(dense.reshape(-1, 1, 1))
    weight = dense.new_empty(layout.num_slots, layout.block_size, layout.block_size)
    _copy(weight, dense.contiguous(), layout, to_blocks=True)
    return weight


def _copy(weight: Tensor, dense: Tensor, layout: Layout, to_blocks: bool) -> None:
    rows, cols, index = (tensor if tensor.numel() else None for tensor in layout.tensors)
    with torch.cuda.device_of(weight):
        copy_kernel[(triton.cdiv(weight.numel(), BLOCK),)](
            weight, dense, rows, cols, index if layout.full else None, weight.numel(), layout.num_cols // layout.groups,
            B=layout.block_size, TO_BLOCKS=to_blocks, BLOCK=BLOCK,
        )  # fmt: skip
