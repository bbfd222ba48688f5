"""The tiles of the Triton kernels: a table that compilation suggested, and what was measured on a device."""

import functools
from typing import NamedTuple

import torch

from sparsekern import devices


class Tile(NamedTuple):
    """How one program of a kernel is shaped, by product:

    dds    `m` tokens on the M side, `k` elements of K in a turn: parts of a block, or several blocks side by side
    sdd    `m` elements on the M side, the columns of m // B blocks (with descriptors 1); `k` tokens in a turn
    norms  `m` x `m` elements of the dense gradient, `k` tokens in a turn
    """

    m: int
    k: int
    warps: int
    stages: int
    descriptors: bool = False
    """Whether tensor descriptors load the operands (TMA), from compute capability 9.0 on."""


# By (product, block size, arithmetic): "half" is bfloat16 and float16, "tf32" float32 with tensor cores, "ieee" float32
# without. Of several tiles, a launch takes the first with PROGRAMS_PER_SM programs for a multiprocessor, or the last.
# Chosen by ahead-of-time compilation for sm_90 (`python tests/helpers/aot.py` prints it): no spills and, where it can
# be had, room for two programs on a multiprocessor, so that one computes while the other starts or ends.
DEFAULT: dict[tuple[str, int, str], tuple[Tile, ...]] = {
    ("dds", 16, "half"): (Tile(128, 64, 4, 3), Tile(64, 64, 4, 4)),
    ("dds", 32, "half"): (Tile(128, 64, 4, 3), Tile(64, 64, 4, 4)),
    ("dds", 64, "half"): (Tile(256, 32, 8, 4), Tile(128, 64, 4, 3), Tile(64, 64, 4, 4)),
    ("dds", 128, "half"): (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    ("dds", 16, "tf32"): (Tile(128, 32, 4, 3), Tile(64, 32, 4, 4)),
    ("dds", 32, "tf32"): (Tile(128, 32, 4, 3), Tile(64, 32, 4, 4)),
    ("dds", 64, "tf32"): (Tile(128, 32, 4, 3), Tile(64, 32, 4, 3)),
    ("dds", 128, "tf32"): (Tile(128, 32, 8, 3), Tile(64, 32, 4, 3)),
    ("dds", 16, "ieee"): (Tile(64, 32, 4, 3),),
    ("dds", 32, "ieee"): (Tile(128, 32, 4, 3),),
    ("dds", 64, "ieee"): (Tile(64, 32, 4, 3),),
    ("dds", 128, "ieee"): (Tile(64, 32, 8, 3),),
    ("sdd", 16, "half"): (Tile(128, 64, 4, 3),),
    ("sdd", 32, "half"): (Tile(128, 64, 4, 3),),
    ("sdd", 64, "half"): (Tile(128, 64, 4, 3),),
    ("sdd", 128, "half"): (Tile(128, 64, 8, 3),),
    ("sdd", 16, "tf32"): (Tile(128, 32, 4, 3),),
    ("sdd", 32, "tf32"): (Tile(128, 32, 8, 3),),
    ("sdd", 64, "tf32"): (Tile(128, 32, 8, 3),),
    ("sdd", 128, "tf32"): (Tile(128, 32, 8, 3),),
    ("sdd", 16, "ieee"): (Tile(64, 32, 4, 3),),
    ("sdd", 32, "ieee"): (Tile(64, 32, 4, 3),),
    ("sdd", 64, "ieee"): (Tile(128, 16, 4, 3),),
    ("sdd", 128, "ieee"): (Tile(128, 16, 8, 3),),
}
for _block_size in (16, 32, 64, 128):  # the tile of a dense product, whatever blocks its norms are taken of
    DEFAULT["norms", _block_size, "half"] = (Tile(128, 64, 8, 3),)
    DEFAULT["norms", _block_size, "tf32"] = DEFAULT["norms", _block_size, "ieee"] = (Tile(128, 32, 8, 3),)

# With tensor descriptors, only where a device's file lists them: a tuner's candidates. Fastest of those tried in a
# prototype of the kernels on an H200 (4096 x 4096, 16384 tokens, density .1), as landed without descriptors -> with
# them, in us: dds 128: 129 -> 121, 64: 171 -> 150, 32: 276 -> 242 (back 133 -> 122, 151, 240); sdd 128: 142 -> 123,
# 64: 201 -> 180. Block 16 gained nothing. These kernels themselves have not been measured.
DESCRIPTORS: dict[tuple[str, int, str], tuple[Tile, ...]] = {
    ("dds", 32, "half"): (Tile(256, 32, 4, 5, True),),
    ("dds", 64, "half"): (Tile(128, 64, 4, 4, True),),
    ("dds", 128, "half"): (Tile(256, 64, 8, 4, True),),
    ("sdd", 64, "half"): (Tile(64, 64, 4, 4, True), Tile(64, 128, 4, 4, True), Tile(64, 64, 4, 6, True)),
    ("sdd", 128, "half"): (Tile(128, 64, 8, 3, True),),
}


@functools.cache
def of(device: torch.device) -> dict[tuple[str, int, str], tuple[Tile, ...]]:
    """The table of a device; the same dictionary at every call, which a tuner may write into.

    What `python -m bench.tune` found on this GPU, or on one like it, takes the place of the default.
    """
    table = dict(DEFAULT)
    if device.type == "cuda":
        for key, tiles in devices.known(devices.name_of(device))["tiles"].items():
            product, block_size, arithmetic = key.split()
            table[product, int(block_size), arithmetic] = tuple(Tile(*tile) for tile in tiles)
    return table
