"""The launchers of the Triton kernels.

A launcher allocates the output, launches, returns: `products` has checked shapes, dtypes and devices. None of them
synchronises with the device, and no grid depends on which blocks are live. They run at every product, so they count
in plain integers (`triton.cdiv` takes a microsecond), and launch what `prepare` has made of an earlier launch.
"""

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sparsekern.backends.triton import kernels, tiles
from sparsekern.backends.triton.prepare import current_device, current_stream, prepare
from sparsekern.backends.triton.tiles import Tile
from sparsekern.layout import Layout

PROGRAMS_PER_SM = 2
# An sdd with fewer than this many programs per multiprocessor is split over tokens, while every part has SPLIT_TOKENS.
SPLITS_PER_SM = 4
SPLIT_TOKENS = 256
# Of small blocks it is also split where its programs take more than one wave and its operands do not fit L2: programs
# drift apart then, and each reads from memory what another has read before. On an H200 (60 MB of L2), 4096 x 4096 in
# bfloat16, 16384 tokens (268 MB) took 6.3 times as long as 4096 tokens (67 MB) at block 16 (densities .1 to .5) and
# 6.3 at block 32 (.5), but 3.9 in one wave (block 32, .1) and at most 4.1 at blocks 64 and 128. In four parts, each
# like the 4096 tokens that were measured, 900 us are predicted at block 16 and density .1, in place of 1425.
L2_BLOCKS = (16, 32)
OPERANDS_PER_L2 = 1.25  # bytes of one part; 1.07 is the most that was measured to be no slower than it should be
PARTS_PER_OPERANDS = 0.5  # bytes of all float32 parts, which are written and read once more

# Prepared launches by all that they depend on. Their numbers are few: kernels, tiles and layouts of a model.
_prepared: dict[tuple, Callable[..., bool]] = {}


def dds(
    x: Tensor,
    weight: Tensor,
    layout: Layout,
    bias: Tensor | None = None,
    transpose: bool = False,
    token_offsets: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias if `transpose`, else y = x W. See `sparsekern.products.dds`; here x is 2-D and padded."""
    layout = layout.indexed()  # the chooser sends a full store to the vendor's GEMM; who forces this backend gets one
    arithmetic, b = _arithmetic(x), layout.block_size
    groups = 1 if token_offsets is None else layout.groups
    out_blocks, in_blocks = layout.num_rows // groups, layout.num_cols // groups
    if not transpose:
        out_blocks, in_blocks = in_blocks, out_blocks
    k_major = transpose
    if arithmetic == "tf32" and not transpose:
        # Hopper's tf32 instruction reads K-major operands only: transposing the blocks once takes the place of 4-byte
        # copies in every program
        weight, k_major = weight.transpose(1, 2).contiguous(), True
    num_tokens = x.shape[0]
    y = x.new_empty(num_tokens, out_blocks * b)
    if not num_tokens:
        return y
    usable = _tiles("dds", b, arithmetic, token_offsets, x, weight)
    tile, device = _dds_tile(usable, num_tokens, groups, out_blocks, x.device), x.get_device()
    key = _dds_key(tile, arithmetic, device, layout, transpose, x, bias, token_offsets)
    if tile.descriptors:
        _dds_by_descriptors(key, tile, x, weight, layout, bias, y, transpose)
        return y
    launch = _prepared.get(key)
    if launch is None or device != current_device() or not launch(
        tokens=num_tokens, stream=current_stream(device),
        x=x, weight=weight, bias=bias, y=y, index=layout.index, token_offsets=token_offsets,
    ):  # fmt: skip
        numbers = num_tokens, groups, out_blocks, in_blocks, *_walk(layout, transpose)
        _launch(
            key, kernels.dds_kernel, tile, (tile.m, groups - 1, out_blocks, 1), num_tokens,
            (x, weight, bias, y, layout.index, token_offsets), numbers, (x.stride(0), y.stride(0)),
            B=b, BLOCK_T=tile.m, BLOCK_K=tile.k, K_MAJOR=k_major,
            GROUPS=1 << (groups - 1).bit_length(), PRECISION="tf32" if arithmetic == "tf32" else "ieee",
        )  # fmt: skip
    return y


def sdd(dy: Tensor, x: Tensor, layout: Layout, token_offsets: Tensor | None = None) -> Tensor:
    """The live blocks of dyᵀx, [num_slots, B, B]. See `sparsekern.products.sdd`; here both are 2-D and padded."""
    layout = layout.indexed()  # the chooser sends a full store to the vendor's GEMM; who forces this backend gets one
    arithmetic, b, num_slots = _arithmetic(x), layout.block_size, layout.num_slots
    tile, *_ = _tiles("sdd", b, arithmetic, token_offsets, x, dy)
    blocks = max(1, tile.m // b)
    num_tokens, device = x.shape[0], x.get_device()
    splits = _splits(layout, blocks, num_tokens, x, token_offsets is not None)
    grad = x.new_empty(num_slots, b, b)
    parts = grad if splits == 1 else x.new_empty(splits, num_slots, b, b, dtype=torch.float32)
    key = _sdd_key(tile, splits, arithmetic, device, layout, x, token_offsets)
    if tile.descriptors:
        _sdd_by_descriptors(key, tile, dy, x, layout, parts, splits)
        if splits > 1:
            _sum_splits(parts, grad, splits)
        return grad
    launch = _prepared.get(key)
    if launch is None or device != current_device() or not launch(
        tokens=num_tokens, stream=current_stream(device),
        dy=dy, x=x, grad=parts, index=layout.index, token_offsets=token_offsets,
    ):  # fmt: skip
        groups = 1 if token_offsets is None else layout.groups
        _launch(
            key, kernels.sdd_kernel, tile, (0, num_slots // blocks + layout.num_rows + 1, 1, splits), num_tokens,
            (dy, x, parts, layout.index, token_offsets),
            (num_tokens, groups, layout.num_rows, layout.num_cols, num_slots), (dy.stride(0), x.stride(0)),
            B=b, BLOCKS=blocks, BLOCK_T=tile.k, SPLITS=splits, PRECISION=_outer_precision(arithmetic),
        )  # fmt: skip
    if splits > 1:
        _sum_splits(parts, grad, splits)
    return grad


def _dds_by_descriptors(
    key: tuple, tile: Tile, x: Tensor, weight: Tensor, layout: Layout, bias: Tensor | None, y: Tensor, transpose: bool
) -> None:
    b, num_tokens, device = layout.block_size, x.shape[0], x.get_device()
    launch = _prepared.get(key)
    if launch is None or device != current_device() or not launch(
        tokens=num_tokens, stream=current_stream(device), x=x, weight=weight, bias=bias, y=y, index=layout.index
    ):  # fmt: skip
        out_blocks = y.shape[1] // b
        _launch(
            key, kernels.dds_descriptors_kernel, tile, (tile.m, 0, out_blocks, 1), num_tokens,
            (x, weight, bias, y, layout.index), (num_tokens, out_blocks, *_walk(layout, transpose)), (y.stride(0),),
            ((tile.m, tile.k), (b, tile.k) if transpose else (tile.k, b)),
            B=b, BLOCK_T=tile.m, BLOCK_K=tile.k, K_MAJOR=transpose,
        )  # fmt: skip


def _sdd_by_descriptors(
    key: tuple, tile: Tile, dy: Tensor, x: Tensor, layout: Layout, parts: Tensor, splits: int
) -> None:
    b, num_slots, num_tokens, device = layout.block_size, layout.num_slots, x.shape[0], x.get_device()
    launch = _prepared.get(key)
    if launch is None or device != current_device() or not launch(
        tokens=num_tokens, stream=current_stream(device),
        dy=dy, x=x, grad=parts, index=layout.index, block_rows=layout.block_rows,
    ):  # fmt: skip
        _launch(
            key, kernels.sdd_descriptors_kernel, tile, (0, num_slots, 1, splits), num_tokens,
            (dy, x, parts, layout.index, layout.block_rows), (num_tokens, num_slots), (), 2 * ((tile.k, b),),
            B=b, BLOCK_T=tile.k, SPLITS=splits,
        )  # fmt: skip


def _sum_splits(parts: Tensor, total: Tensor, splits: int) -> None:
    size, device = total.numel(), total.get_device()
    key = _sum_key(splits, size, device, total.dtype)
    launch = _prepared.get(key)
    if (
        launch is None
        or device != current_device()
        or not launch(tokens=0, stream=current_stream(device), parts=parts, total=total)
    ):
        grid = (0, -(-size // 1024), 1, 1)
        _launch(key, kernels.sum_splits_kernel, None, grid, 0, (parts, total), (size,), (), SPLITS=splits, BLOCK=1024)


def quick_dds(x: Tensor, weight: Tensor, layout: Layout, bias: Tensor | None, transpose: bool) -> tuple | None:
    """What `dds` of such operands launches, for `sparsekern.quick`: (launch, 1, None); None if not prepared."""
    arithmetic, b, num_tokens, device = _arithmetic(x), layout.block_size, x.shape[0], x.get_device()
    if layout.full or (arithmetic == "tf32" and not transpose):
        return None
    out_blocks = layout.num_rows if transpose else layout.num_cols
    tile = _dds_tile(_tiles("dds", b, arithmetic, None, x, weight), num_tokens, 1, out_blocks, x.device)
    launch = _prepared.get(_dds_key(tile, arithmetic, device, layout, transpose, x, bias, None))
    return (launch, 1, None) if launch else None


def quick_sdd(dy: Tensor, x: Tensor, layout: Layout) -> tuple | None:
    """Likewise for `sdd`: (launch, parts of the tokens, launch that sums the parts or None)."""
    arithmetic, b, device = _arithmetic(x), layout.block_size, x.get_device()
    if layout.full:
        return None
    tile, *_ = _tiles("sdd", b, arithmetic, None, x, dy)
    splits = _splits(layout, max(1, tile.m // b), x.shape[0], x, ragged=False)
    launch = _prepared.get(_sdd_key(tile, splits, arithmetic, device, layout, x, None))
    sums = _prepared.get(_sum_key(splits, layout.num_slots * b * b, device, x.dtype))
    if launch is None or (splits > 1 and sums is None):
        return None
    return launch, splits, sums if splits > 1 else None


def _dds_key(tile, arithmetic, device, layout, transpose, x, bias, token_offsets) -> tuple:
    dtypes = (None if bias is None else bias.dtype, None if token_offsets is None else token_offsets.dtype)
    return "dds", tile, arithmetic, device, layout.num_slots, layout[3:], transpose, x.dtype, *dtypes


def _sdd_key(tile, splits, arithmetic, device, layout, x, token_offsets) -> tuple:
    offsets = None if token_offsets is None else token_offsets.dtype
    dtypes = x.dtype, offsets, layout.block_rows.dtype
    return "sdd", tile, splits, arithmetic, device, layout.num_slots, layout[3:], *dtypes


def _sum_key(splits: int, size: int, device: int, dtype: torch.dtype) -> tuple:
    return "sum_splits", splits, size, device, dtype


def _tiles(product: str, b: int, arithmetic: str, token_offsets: Tensor | None, *operands: Tensor) -> tuple[Tile, ...]:
    """Those of the table that can be used; where all want descriptors and these cannot, those without a measurement."""
    listed = tiles.of(operands[0].device)[product, b, arithmetic]
    if not any(tile.descriptors for tile in listed):
        return listed
    if token_offsets is None and all(map(_can_be_described, operands)):
        return listed
    return tuple(tile for tile in listed if not tile.descriptors) or tiles.DEFAULT[product, b, arithmetic]


def _can_be_described(x: Tensor) -> bool:
    """Whether a tensor descriptor takes x: its rows must begin at multiples of 16 bytes and not overlap."""
    row = x.stride(0)
    aligned = x.data_ptr() % 16 == 0 and row * x.element_size() % 16 == 0
    return aligned and x.stride(-1) == 1 and row >= x.shape[-1] and x.numel() > 0


def _dds_tile(usable: tuple[Tile, ...], num_tokens: int, groups: int, out_blocks: int, device: torch.device) -> Tile:
    """Of the tokens, their highest bit decides, so that a prepared product needs one launch for each."""
    num_tokens = 1 << num_tokens.bit_length() - 1
    for tile in usable:
        # every group may end in a tile of its own
        programs = (-(-num_tokens // tile.m) + groups - 1) * out_blocks
        if programs >= PROGRAMS_PER_SM * _num_sms(device):
            break
    return tile


def _launch(
    key: tuple, kernel, tile: Tile | None, grid: tuple[int, int, int, int], num_tokens: int,
    tensors: tuple[Tensor | None, ...], numbers: tuple[int, ...], strides: tuple[int, ...],
    boxes: tuple[tuple[int, int], ...] = (), **constants,
) -> None:  # fmt: skip
    """Launch by way of Triton, and keep what it compiled as `_prepared[key]`; `grid` as `prepare` takes it.

    Descriptors load the first tensors, [tokens, features] or blocks one below the other, in these boxes.
    """
    tokens_per_program, more, outputs, along_y = grid
    along_x = ((-(-num_tokens // tokens_per_program) if tokens_per_program else 0) + more) * outputs
    options = {} if tile is None else {"num_warps": tile.warps, "num_stages": tile.stages}
    described = tensors[: len(boxes)]
    matrices = [tensor.flatten(0, -2) for tensor in described]
    descriptors = [TensorDescriptor.from_tensor(m, list(box)) for m, box in zip(matrices, boxes, strict=True)]
    with _on_device(tensors[0]):
        compiled = kernel[(along_x, along_y, 1)](
            *descriptors, *tensors[len(boxes) :], *numbers, *strides, **constants, **options
        )
        values = (*strides, *(t.data_ptr() for t in tensors if t is not None))
        usual = all(value % 16 == 0 for value in values) and max(numbers) < 2**31
        if usual and compiled is not None:  # the interpreter compiles nothing
            names = kernel.arg_names[len(tensors) : len(tensors) + len(numbers)]
            known = {name: n for name, n in zip(names, numbers, strict=True) if name != "num_tokens"}
            shapes = [(0, t.shape[1]) if t.dim() == 2 else m.shape for t, m in zip(described, matrices, strict=True)]
            if launch := prepare(compiled, known, grid, shapes):
                _prepared[key] = launch


def add_block_norms(
    dy: Tensor, x: Tensor, layout: Layout, norms: Tensor, armed: Tensor, token_offsets: Tensor | None = None
) -> None:
    """Add the squared norms of the blocks of dyᵀx to float32 `norms` [groups, rows, cols] if `armed` is set."""
    arithmetic, b = _arithmetic(x), layout.block_size
    (tile,) = tiles.of(x.device)["norms", b, arithmetic]
    groups, rows, cols = norms.shape
    with _on_device(x):
        kernels.block_norms_kernel[(-(-cols * b // tile.m), -(-rows * b // tile.m), groups)](
            dy, x, norms, armed, token_offsets, x.shape[0], rows, cols, dy.stride(0), x.stride(0),
            B=b, SIDE=tile.m, BLOCK_T=tile.k, PRECISION=_outer_precision(arithmetic),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def _arithmetic(x: Tensor) -> str:
    """The third word of a table of tiles, for operands like x."""
    if x.dtype != torch.float32:
        return "half"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _outer_precision(arithmetic: str) -> str:
    """Precision of dyᵀx. Both factors have K, the tokens, in the wrong place for Hopper's tf32 instruction.

    Three bfloat16 products take K in either place and are more accurate than tf32. They cost nothing where copies are
    the limit.
    """
    return "bf16x3" if arithmetic == "tf32" else "ieee"


def _walk(layout: Layout, by_rows: bool) -> tuple[int, int, int]:
    """Where Layout.index holds pairs (counted in int64), offsets and order by rows or columns (counted in int32)."""
    offsets = 4 * layout.num_slots
    order = offsets + layout.num_rows + layout.num_cols + 2
    if by_rows:
        return 0, offsets, order
    return layout.num_slots, offsets + layout.num_rows + 1, order + layout.num_rows


def _splits(layout: Layout, blocks: int, num_tokens: int, x: Tensor, ragged: bool) -> int:
    """Into how many parts to split the tokens of an sdd with so many blocks to a program, for operands like x.

    It is a power of two, as every number is a kernel of its own. Of the tokens, their highest bit decides, as for
    `_dds_tile`. Programs are handed out along x first, so those of one part run before those of the next.
    """
    num_slots, b, device = layout.num_slots, layout.block_size, x.device
    full_wave = SPLITS_PER_SM * _num_sms(device)
    most = min(full_wave // max(num_slots // blocks, 1), num_tokens // SPLIT_TOKENS, 32)
    to_fill = 1 << max(most, 1).bit_length() - 1
    # the last program of a block row is half full on average
    if b not in L2_BLOCKS or num_slots // blocks + layout.num_rows // 2 <= full_wave:
        return to_fill
    features = (layout.num_rows + layout.num_cols) * b // (layout.groups if ragged else 1)
    return max(to_fill, l2_splits(num_tokens, features * x.element_size(), num_slots * b * b, _l2_bytes(device)))


def l2_splits(num_tokens: int, token_bytes: int, num_weights: int, l2_bytes: int) -> int:
    """Into how many parts to split so many tokens, of so many bytes in x and dy together, for L2 to hold one part."""
    if not num_tokens:
        return 1
    operands = (1 << num_tokens.bit_length() - 1) * token_bytes
    wanted = math.ceil(operands / (OPERANDS_PER_L2 * l2_bytes))
    affordable = int(min(PARTS_PER_OPERANDS * operands / (4 * num_weights), num_tokens / SPLIT_TOKENS, 32))
    return min(1 << (wanted - 1).bit_length(), 1 << max(affordable, 1).bit_length() - 1)


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 60 << 20


def _on_device(x: Tensor):
    """Triton launches on the current device, which may be another one than x's."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
