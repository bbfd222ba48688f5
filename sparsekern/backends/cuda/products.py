"""The launchers of the products: csrc/cuda/sdd.cu, for blocks of 16 and 8 of bfloat16 and float16.

A launcher allocates the output, launches, returns. None of them synchronises with the device, and no grid depends on
which blocks are live.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.backends import cuda
from sparsekern.topology import Layout, build_index

NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
"""Of dtypes, in the names of kernels."""
WARPS = 12  # of a program: eleven multiply, and one copies
MOST_STAGES = 8
BARRIER_BYTES = 4096  # at most, of barriers and lists beside the stages
SHARED_BYTES = 232448  # that a program may have on Hopper, where no device says so


class SddShape(NamedTuple):
    """A macro tile of sdd: features of dy and x, tokens of a stage; as in csrc/cuda/sdd.cu."""

    rows: int
    cols: int
    tokens: int

    @property
    def stage_bytes(self) -> int:
        return self.tokens * (2 * self.rows + 16 + 2 * self.cols + 16)

    def tiles(self, layout: Layout) -> int:
        sides = layout.num_rows // layout.groups, layout.num_cols // layout.groups
        down, across = (-(-blocks * layout.block_size // side) for blocks, side in zip(sides, self[:2], strict=True))
        return layout.groups * down * across


SDD_SHAPES = (SddShape(512, 1024, 16), SddShape(512, 512, 32), SddShape(512, 256, 32))
"""The widest first: it reads the least."""
SDD_UNITS = {16: 11 * 13, 8: 11 * 24}
"""Units that the warps of a program hold, by block size; a tile with more of them is streamed twice."""
SPLIT_TOKENS = 256  # that a part of an sdd has at least
PARTS_PER_OPERANDS = 0.5  # bytes of all float32 parts, which are written and read once more


def sdd(dy: Tensor, x: Tensor, layout: Layout, token_offsets: Tensor | None = None) -> Tensor:
    """The live blocks of dyᵀx, [num_slots, B, B]. See `sparsekern.products.sdd`; here both are 2-D and padded."""
    layout, dy, x = _indexed(layout), _aligned(dy), _aligned(x)
    b, num_slots, name = layout.block_size, layout.num_slots, NAMES[x.dtype]
    grad = x.new_empty(num_slots, b, b)
    if not num_slots:
        return grad
    shape = sdd_shape(layout)
    tiles, stages = shape.tiles(layout), _stages(shape.stage_bytes, x.device)
    splits = sdd_splits(tiles, x.shape[0], (dy.shape[1] + x.shape[1]) * 2, num_slots * b * b, _num_sms(x.device))
    parts = grad if splits == 1 else x.new_empty(splits, num_slots, b, b, dtype=torch.float32)
    cuda.launch(
        "sdd", f"{b}_{name}_{shape.rows}x{shape.cols}", tiles * splits, 32 * WARPS,
        (dy.data_ptr(), x.data_ptr(), parts.data_ptr(), layout.index.data_ptr(), *_offsets(token_offsets), dy.stride(0),
         x.stride(0), x.shape[0], num_slots, layout.num_rows, layout.num_cols, layout.groups, splits, stages),
        x.device, stages * shape.stage_bytes,
    )  # fmt: skip
    if splits > 1:
        quads = num_slots * b * b // 4
        addresses = parts.data_ptr(), grad.data_ptr(), quads, splits
        cuda.launch("sdd", f"sum_{name}", -(-quads // 256), 256, addresses, x.device)
    return grad


def sdd_shape(layout: Layout) -> SddShape:
    """The widest tile whose units the warps of a program most likely hold, at this density of slots."""
    b = layout.block_size
    places = layout.num_rows * layout.num_cols // layout.groups
    density = layout.num_slots / places
    for shape in SDD_SHAPES:
        rows, cols = shape.rows // b, shape.cols // b
        # blocks of 8 go in pairs of one column, of which the last is half empty every second time
        units = rows * cols * density if b == 16 else cols * (rows * density + 0.5) / 2
        if units + 2 * math.sqrt(units) <= SDD_UNITS[b]:
            break
    return shape


def sdd_splits(tiles: int, num_tokens: int, token_bytes: int, num_weights: int, num_sms: int) -> int:
    """Into how many parts to split the tokens of so many tiles: the number whose programs end the soonest."""
    affordable = PARTS_PER_OPERANDS * num_tokens * token_bytes / (4 * num_weights)
    most = max(1, int(min(affordable, num_tokens / SPLIT_TOKENS, max(num_sms // tiles, 4))))
    # all programs of one turn of the multiprocessors take as long as one
    return min(range(1, most + 1), key=lambda splits: (-(-tiles * splits // num_sms) / splits, splits))


def _indexed(layout: Layout) -> Layout:
    """A full store has no index, as the chooser sends it to the vendor's GEMM; who forces this backend gets one."""
    if not layout.full:
        return layout
    layout = layout._replace(full=False)
    return layout._replace(index=build_index(layout))


def _aligned(x: Tensor) -> Tensor:
    """Rows that the kernels can copy: they begin at multiples of 16 bytes, and their elements lie side by side."""
    usual = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if usual else x.clone(memory_format=torch.contiguous_format)


def _offsets(token_offsets: Tensor | None) -> tuple[int, int]:
    """Address and bytes of an element, as the kernels take them."""
    return (0, 0) if token_offsets is None else (token_offsets.data_ptr(), token_offsets.element_size())


def _stages(stage_bytes: int, device: torch.device) -> int:
    return min(MOST_STAGES, (_shared_bytes(device) - BARRIER_BYTES) // stage_bytes)


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """That a program may have."""
    if device.type != "cuda":
        return SHARED_BYTES
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
