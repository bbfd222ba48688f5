"""The launchers of the products: csrc/cuda/dds.cu and sdd.cu, for blocks of 16 and 8 of bfloat16 and float16.

A launcher allocates the output, launches, returns. None of them synchronises with the device, and no grid depends on
which blocks are live.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.backends import cuda
from sparsekern.layout import Layout

NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
"""Of dtypes, in the names of kernels."""
# As in csrc/cuda/ring.h, and in dds.cu and sdd.cu; a test compares what is said here of the kernels with their source.
NUM_WARPS = 11  # of a program, that multiply; one more copies
THREADS = 32 * (NUM_WARPS + 1)
MOST_STAGES = 8
PACK_THREADS = SUM_THREADS = 256
SDD_BARRIER_BYTES = 4096  # at most, of barriers and lists beside the stages


class DdsShape(NamedTuple):
    """A tile of dds: 64 tokens by block rows of the outputs, of which each of eleven warps has `rows`."""

    name: str
    rows: int
    block_size: int

    @property
    def outputs(self) -> int:
        return NUM_WARPS * self.rows * self.block_size

    @property
    def stage_bytes(self) -> int:
        """Of x, and of the numbers of units in whole 16 bytes."""
        return TILE_TOKENS * (2 * CHUNK + 16) + self.count_bytes

    @property
    def count_bytes(self) -> int:
        return -(-NUM_WARPS * self.rows // 16) * 16

    @property
    def unit_bytes(self) -> int:
        return 16 + 32 * self.block_size

    @property
    def ring_bytes(self) -> int:
        """Of units in shared memory, all warps together."""
        return NUM_WARPS * RING_UNITS[self.block_size] * self.unit_bytes


DDS_SHAPES = {b: (DdsShape("many", 48 // b, b), DdsShape("few", 16 // b, b)) for b in (16, 8)}
"""By block size, as in csrc/cuda/dds.cu: the more outputs, the less is read; the fewer, the more programs there are."""
TILE_TOKENS, CHUNK = 64, 256  # tokens of a tile, features of a stage
RING_UNITS = {16: 16, 8: 32}  # of a warp; a fourth of them is copied at once
DDS_BARRIER_BYTES = 512
STREAMS = ("units", "counts", "rows", "first_units")
START_TILES = 0.5  # how many tiles a program could make until its first stage is full: assumed


class DdsPlan(NamedTuple):
    """How the work of a dds is dealt out; nothing of it depends on which blocks are live."""

    shape: DdsShape
    outputs: int  # blocks, all groups together
    inputs: int
    groups: int
    programs: int  # that share the tokens of a tile's outputs

    @property
    def tiles_of_group(self) -> int:
        return -(-self.outputs // self.groups * self.shape.block_size // self.shape.outputs)

    @property
    def tiles(self) -> int:
        return self.groups * self.tiles_of_group

    @property
    def pack_bytes(self) -> int:
        """Of dynamic shared memory in dds_pack: of every row the pairs and the units before each chunk."""
        return 2 * 4 * NUM_WARPS * self.shape.rows * (self.chunks + 1)

    @property
    def chunks(self) -> int:
        return -(-self.inputs // self.groups * self.shape.block_size // CHUNK)


def dds(
    x: Tensor,
    weight: Tensor,
    layout: Layout,
    bias: Tensor | None = None,
    transpose: bool = False,
    token_offsets: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias if `transpose`, else y = x W. See `sparsekern.products.dds`; here x is 2-D and padded."""
    layout, x = layout.indexed(), _aligned(x)
    b, groups, ragged = layout.block_size, layout.groups, token_offsets is not None
    outputs, inputs = (layout.num_rows, layout.num_cols) if transpose else (layout.num_cols, layout.num_rows)
    y = x.new_empty(len(x), outputs * b // (groups if ragged else 1))
    if not len(x):
        return y
    num_sms = _num_sms(x.device)
    plan = dds_plan(b, outputs, inputs, groups, layout.num_slots, len(x), ragged, num_sms)
    shape = plan.shape
    parts = max(1, 2 * num_sms // plan.tiles)  # two programs are on a multiprocessor at once
    pack = cuda.prepare(
        "dds", f"pack_{b}", plan.tiles * parts, PACK_THREADS,
        ("weight", "index", *STREAMS, layout.num_slots, layout.num_rows, layout.num_cols, groups, int(transpose),
         shape.rows, parts),
        x.device, plan.pack_bytes,
    )  # fmt: skip
    stages = _stages(shape.stage_bytes, x.device, DDS_BARRIER_BYTES + shape.ring_bytes)
    multiply = cuda.prepare(
        "dds", f"{b}_{NAMES[x.dtype]}_{shape.name}", plan.tiles * plan.programs, THREADS,
        ("x", "bias", "y", *STREAMS, "token_offsets", _offset_bytes(token_offsets), "x_stride", "y_stride",
         "num_tokens", outputs, inputs, groups, plan.tiles_of_group, stages),
        x.device, stages * shape.stage_bytes + shape.ring_bytes,
    )  # fmt: skip
    streams = _streams(plan, layout.num_slots, x.device)
    with cuda.current(x.device) as stream:
        pack(tokens=0, stream=stream, weight=weight, index=layout.index, **streams)
        multiply(tokens=len(x), stream=stream, x=x, bias=bias, y=y, **streams, token_offsets=token_offsets)
    return y


@functools.lru_cache(maxsize=4096)
def dds_plan(
    block_size: int, outputs: int, inputs: int, groups: int, num_slots: int, num_tokens: int, ragged: bool, num_sms: int
) -> DdsPlan:
    """Which tiles, and how many programs share the tokens of one: those that read the least, wave after wave."""
    density = num_slots * groups / (outputs * inputs)
    token_tiles = -(-num_tokens // TILE_TOKENS)
    best, least = None, math.inf
    for shape in DDS_SHAPES[block_size]:
        plan = DdsPlan(shape, outputs, inputs, groups, 1)
        if ragged:  # one group may have all tokens, and then its programs alone are to fill the device
            numbers = [-(-num_sms // plan.tiles_of_group)]
        else:
            numbers = [waves * num_sms // plan.tiles for waves in range(1, 9)]
        for number in numbers:
            plan = plan._replace(programs=max(1, min(number, token_tiles)))
            waves = -(-plan.tiles * plan.programs // num_sms)
            tiles = -(-token_tiles // (plan.programs * (groups if ragged else 1))) + START_TILES
            reads = waves * tiles * (TILE_TOKENS + shape.outputs * density)
            if reads < least:
                best, least = plan, reads
    return best


def _streams(plan: DdsPlan, num_slots: int, device: torch.device) -> dict[str, Tensor]:
    """Memory for what dds_pack leaves to dds, by the names of STREAMS."""
    shape, tiles = plan.shape, plan.tiles
    # two blocks of 8 are a unit, and the last of a row and chunk may be alone; the last group is copied as a whole
    units = num_slots if shape.block_size == 16 else (num_slots + plan.outputs * plan.chunks) // 2
    sizes = (
        (units + RING_UNITS[shape.block_size] // 4) * shape.unit_bytes,
        tiles * plan.chunks * shape.count_bytes,
        4 * tiles * NUM_WARPS * shape.rows,
        4 * tiles * (NUM_WARPS + 1),
    )
    sizes = [-(-size // 128) * 128 for size in sizes]
    parts = torch.empty(sum(sizes), dtype=torch.uint8, device=device).split(sizes)
    return dict(zip(STREAMS, parts, strict=True))


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
SDD_UNITS = {16: NUM_WARPS * 13, 8: NUM_WARPS * 24}
"""Units that the warps of a program hold, by block size; a tile with more of them is streamed twice."""
SPLIT_TOKENS = 256  # that a part of an sdd has at least
PARTS_PER_OPERANDS = 0.5  # bytes of all float32 parts, which are written and read once more


def sdd(dy: Tensor, x: Tensor, layout: Layout, token_offsets: Tensor | None = None) -> Tensor:
    """The live blocks of dyᵀx, [num_slots, B, B]. See `sparsekern.products.sdd`; here both are 2-D and padded."""
    layout, dy, x = layout.indexed(), _aligned(dy), _aligned(x)
    b, num_slots, name = layout.block_size, layout.num_slots, NAMES[x.dtype]
    grad = x.new_empty(num_slots, b, b)
    if not num_slots:
        return grad
    shape = sdd_shape(layout)
    tiles, stages = shape.tiles(layout), _stages(shape.stage_bytes, x.device, SDD_BARRIER_BYTES)
    splits = sdd_splits(tiles, x.shape[0], (dy.shape[1] + x.shape[1]) * 2, num_slots * b * b, _num_sms(x.device))
    parts = grad if splits == 1 else x.new_empty(splits, num_slots, b, b, dtype=torch.float32)
    multiply = cuda.prepare(
        "sdd", f"{b}_{name}_{shape.rows}x{shape.cols}", tiles * splits, THREADS,
        ("dy", "x", "parts", "index", "token_offsets", _offset_bytes(token_offsets), "dy_stride", "x_stride",
         "num_tokens", num_slots, layout.num_rows, layout.num_cols, layout.groups, splits, stages),
        x.device, stages * shape.stage_bytes,
    )  # fmt: skip
    with cuda.current(x.device) as stream:
        multiply(tokens=len(x), stream=stream, dy=dy, x=x, parts=parts, index=layout.index, token_offsets=token_offsets)
        if splits > 1:
            quads = num_slots * b * b // 4
            total = cuda.prepare(
                "sdd", f"sum_{name}", -(-quads // SUM_THREADS), SUM_THREADS, ("parts", "grad", quads, splits), x.device
            )
            total(tokens=0, stream=stream, parts=parts, grad=grad)
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


def _aligned(x: Tensor) -> Tensor:
    """Rows that the kernels can copy: they begin at multiples of 16 bytes, and their elements lie side by side."""
    usual = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if usual else x.clone(memory_format=torch.contiguous_format)


def _offset_bytes(token_offsets: Tensor | None) -> int:
    return 0 if token_offsets is None else token_offsets.element_size()


def _stages(stage_bytes: int, device: torch.device, beside: int) -> int:
    """How many a program has room for, next to so many bytes."""
    return min(MOST_STAGES, (cuda.shared_bytes(device) - beside) // stage_bytes)


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
