"""Blocks to dense matrices on a GPU in one pass, for the dense path: live blocks and zeros, each place written once.

Clearing the matrix and scattering the blocks afterwards are two launches, write a live place twice, and look every
element's coordinates up. Here a program writes a tile, and looks once for every block of it whether it is live.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.backends.triton import copies
from sparsekern.layout import Layout

TILE = 4096  # elements of a program: 16 bytes of 16-bit numbers, four times, by each of 128 threads
MOST_ROWS = 32  # of a tile, so that it is wide where blocks are large


@triton.jit(do_not_specialize=["num_slots", "group_rows", "group_cols"])
def fill_kernel(
    weight_ptr, dense_ptr, index_ptr,  # [num_slots, B, B], [groups, rows, cols]; int32: Layout.index, None if full
    num_slots, group_rows, group_cols,  # block rows and columns of one group
    B: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,  # a tile is ROWS rows of BLOCKS blocks side by side
    STEPS: tl.constexpr,  # that end a search among all pairs that a block row may have
):  # fmt: skip
    """Write one tile of the dense matrices; groups stand below each other, and block rows are counted through them."""
    PARTS: tl.constexpr = B // ROWS
    tiles = tl.cdiv(group_cols, BLOCKS)
    strip, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row, part = strip // PARTS, strip % PARTS
    col = tile * BLOCKS + tl.arange(0, BLOCKS)
    if index_ptr is None:
        slot = row.to(tl.int64) * group_cols + col
        live = col < group_cols
    else:
        offsets = index_ptr + 4 * num_slots.to(tl.int64) + row
        start, stop = tl.load(offsets), tl.load(offsets + 1)
        # every block looks for itself among the row's pairs, which are sorted by column
        wanted = row // group_rows * group_cols + col
        low, high = start + tl.zeros((BLOCKS,), tl.int32), stop + tl.zeros((BLOCKS,), tl.int32)
        for _ in range(STEPS):
            middle = (low + high) // 2
            found = tl.load(index_ptr + 2 * middle.to(tl.int64), mask=low < high, other=0)
            left = found < wanted
            low, high = tl.where((low < high) & left, middle + 1, low), tl.where((low < high) & ~left, middle, high)
        pair = index_ptr + 2 * low.to(tl.int64)
        live = tl.load(pair, mask=low < stop, other=-1) == wanted
        slot = tl.load(pair + 1, mask=live, other=0).to(tl.int64)
    i, j = part * ROWS + tl.arange(0, ROWS), tl.arange(0, B)
    within = i[:, None, None] * B + j[None, None, :]  # [ROWS, BLOCKS, B]
    blocks = tl.load(weight_ptr + (slot * B * B)[None, :, None] + within, mask=live[None, :, None], other=0.0)
    place = (row.to(tl.int64) * B + i)[:, None, None] * (group_cols * B) + (col * B)[None, :, None] + j[None, None, :]
    tl.store(dense_ptr + place, blocks, mask=(col < group_cols)[None, :, None])


def densify(weight: Tensor, layout: Layout) -> Tensor:
    """As `reference.densify`."""
    g, b = layout.groups, layout.block_size
    group_rows, group_cols = layout.num_rows // g, layout.num_cols // g
    shape = g, group_rows * b, group_cols * b
    if b == 1:  # the index of single weights has no offsets to look in
        return weight.view(shape) if layout.full else copies.scatter(weight, shape, layout)
    dense = weight.new_empty(shape)
    rows = min(b, MOST_ROWS)
    blocks = min(max(1, TILE // (rows * b)), triton.next_power_of_2(group_cols))
    programs = layout.num_rows * (b // rows) * triton.cdiv(group_cols, blocks)
    with torch.cuda.device_of(weight):
        fill_kernel[(programs,)](
            weight, dense, None if layout.full else layout.index, layout.num_slots, group_rows, group_cols,
            B=b, ROWS=rows, BLOCKS=blocks, STEPS=group_cols.bit_length(),
        )  # fmt: skip
    return dense
