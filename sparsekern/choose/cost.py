"""How long a product takes on a GPU, by a roofline model, and the density at which the vendor's GEMM becomes faster.

Scattered blocks are limited by the traffic from the L2 cache to the multiprocessors, as every block fetches its own
slice of the activations; also by device memory, arithmetic and the launch. The vendor's GEMM is limited by arithmetic
and device memory, and needs the blocks copied to a dense matrix or back. Break-evens that `python -m bench.tune`
measured on a device take the model's place, which then says only how they change with the shape.

Rates of a device are in `sparsekern/devices`. The constants here were read off the products of one H200, which
`bench/results/nvidia-h200.json` holds; `python -m bench.cost_model` shows the model beside them.
"""

import functools
import math
from typing import NamedTuple

import torch

from sparsekern import devices

PRODUCTS = ("dds", "sdd")
ELEMENT = {"half": 2, "tf32": 4, "ieee": 4}  # bytes, by arithmetic
TOKENS = 128  # of a tile of dds; model: most tiles of the Triton backend
SIDE = 128  # columns that a tile of sdd gathers from blocks of one block row; model, likewise
SPLIT_PROGRAMS, SPLIT_TOKENS, MOST_SPLITS = 4, 256, 32  # when sdd splits the tokens; likewise
REQUEST = 64  # bytes of L2's time that a request takes, if it wants fewer: blocks of 16 move half of L2's rate
START_S = 2.2e-6  # from a program's start to its first product: four loads that wait for one another, of cold memory
THREEFOLD_SHARE = 0.27  # of the 16-bit rate that sdd reaches in tf32, where it makes three bfloat16 products of one
IEEE_SHARE = 0.67  # of the vendor's float32 without tensor cores: assumed, as no such product was measured
GATHER_SHARE = 0.38  # of device memory's rate that gathering the live blocks of a dense matrix reaches
FILL_STARTS = 2  # of a program that writes a dense matrix: its search loads as often again; predicted, not measured
DENSE_TILES = ((128, 256, 1.0), (128, 128, 0.88), (128, 64, 0.75), (64, 64, 0.55))  # rows, columns, share of the peak
PEAK_SIZE = 8192  # of the cube whose rate is a device's `gemm_flops`


class Product(NamedTuple):
    """A product whose time is asked for."""

    name: str  # dds or sdd
    block_size: int
    arithmetic: str
    out: int  # features, of all groups together
    into: int  # features of one group
    tokens: int
    device: str  # as torch names it


def arithmetic(dtype: torch.dtype) -> str:
    """ "half", or for float32 "tf32" or "ieee", as torch is set."""
    if dtype != torch.float32:
        return "half"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def sparse_seconds(product: Product, density: float) -> float:
    """Time of `dds` or `sdd` on a layer [out, into] if a kernel's limit is reached; `reach` of it is."""
    name, b, arithmetic, out, into, tokens, device = product
    facts, element, live = devices.known(device), ELEMENT[arithmetic], density * out * into
    row = _fetched(b * element, density)  # bytes of L2's time for a token's features of one block
    writes, sums = element * tokens * (out + into) / 2, 0.0
    if name == "dds":
        tiles = math.ceil(tokens / TOKENS)
        programs = tiles * out / b
        gathered = live / b**2 * tiles * (TOKENS * row + element * b * b)
        reads = element * (tokens * (out + into) / 2 + live)
    else:
        blocks = max(1, SIDE // b)
        programs = max(1, live / b**2 / blocks)
        most = min(SPLIT_PROGRAMS * facts["num_sms"] / programs, tokens / SPLIT_TOKENS, MOST_SPLITS)
        splits = 1 << int(max(most, 1)).bit_length() - 1
        side = min(blocks, max(1, density * into / b))  # blocks of a tile: a block row may have fewer than fit
        gathered = live / b**2 * tokens * (row + max(b * element, REQUEST) / side)
        reads = element * tokens * (out + into)
        writes, programs = element * live, programs * splits
        if splits > 1:  # parts of the tokens are written in float32, and summed by a second kernel
            parts = 4 * splits * live
            sums = facts["launch_s"] + START_S + (parts + writes) / facts["hbm_bytes_per_s"]
            writes = parts
    busy = min(1, programs / facts["num_sms"])
    # the tensor cores take b / 2 clocks for m64 n{b} k16, reading its operands from shared memory 16 + b / 4
    share = IEEE_SHARE if arithmetic == "ieee" else min(1, (b / 2) / (16 + b / 4))
    flop, rate = 2 * tokens * live, facts["gemm_flops"][arithmetic]
    if (name, arithmetic) == ("sdd", "tf32"):
        flop, rate = 3 * flop, THREEFOLD_SHARE * facts["gemm_flops"]["half"]
    # a program fetches ahead while it multiplies, but has multiplied everything when it writes
    longest = max(
        gathered / (facts["l2_bytes_per_s"] * busy),
        reads / facts["hbm_bytes_per_s"],
        flop / (share * busy * rate),
    )
    return facts["launch_s"] + START_S + longest + writes / facts["hbm_bytes_per_s"] + sums


def _fetched(width: int, density: float) -> float:
    """Bytes of L2's time for `width` bytes of a live block's row; live neighbours share a request."""
    neighbours = max(1, REQUEST // width)
    return max(width, REQUEST) * (1 - (1 - density) ** neighbours) / (neighbours * density) if density else width


def gemm_seconds(arithmetic: str, m: int, n: int, k: int, device: str) -> float:
    """The vendor's [m, k] @ [k, n]: whole waves of tiles, K split where there are few."""
    facts, element, best = devices.known(device), ELEMENT[arithmetic], math.inf
    memory = element * (m * k + k * n + m * n) / facts["hbm_bytes_per_s"]
    rate = _rate(arithmetic, device)
    for rows, columns, share in DENSE_TILES:
        for split in (1, 2, 4, 8, 16):
            waves = math.ceil(math.ceil(m / rows) * math.ceil(n / columns) * split / facts["num_sms"])
            one = START_S + 2 * rows * columns * k / split / (share * rate)
            sums = 0 if split == 1 else 8 * split * m * n / facts["l2_bytes_per_s"]
            best = min(best, max(waves * one, memory) + sums)
    return best + facts["launch_s"]


def _rate(arithmetic: str, device: str) -> float:
    """FLOP/s of one multiprocessor within a tile, such that the measured GEMM takes the time that was measured."""
    facts, (rows, columns, _) = devices.known(device), DENSE_TILES[0]
    seconds = 2 * PEAK_SIZE**3 / facts["gemm_flops"][arithmetic] - facts["launch_s"]
    waves = math.ceil(PEAK_SIZE**2 / (rows * columns) / facts["num_sms"])
    return 2 * rows * columns * PEAK_SIZE / (seconds / waves - START_S)


def dense_seconds(product: Product, density: float) -> float:
    """The vendor's GEMM and the copy between blocks and a dense matrix."""
    name, _, arithmetic, out, into, tokens, device = product
    facts, size = devices.known(device), ELEMENT[arithmetic] * out * into
    if name == "dds":
        sizes, moved, starts = (tokens, out, into), (1 + density) * size, FILL_STARTS
    else:
        sizes, moved, starts = (out, into, tokens), 2 * density * size / GATHER_SHARE, 1
    copy = facts["launch_s"] + starts * START_S + moved / facts["hbm_bytes_per_s"]
    return gemm_seconds(arithmetic, *sizes, device) + copy


@functools.lru_cache(maxsize=4096)
def break_even(product: Product) -> float:
    """Density up to which the Triton kernel is the faster one, in [0, 1]."""
    here = _modelled(product)
    kind = {"product": product.name, "block_size": product.block_size, "arithmetic": product.arithmetic}
    measured = [row for row in devices.known(product.device)["break_even"] if kind.items() <= row.items()]
    if not measured:
        return here
    near = min(measured, key=lambda row: _distance(row, product))
    there = product._replace(out=near["out_features"], into=near["in_features"], tokens=near["tokens"])
    return min(1.0, near["density"] * here / _modelled(there))


def is_for_cuda(product: Product, density: float) -> bool:
    """Whether the kernels of csrc/cuda were faster than the other paths at such a density.

    The nearest shapes count, all that are equally near, and none that differs by more than a factor of four.
    """
    kind = {"product": product.name, "block_size": product.block_size, "arithmetic": product.arithmetic}
    measured = [row for row in devices.known(product.device)["cuda"] if kind.items() <= row.items()]
    distances = [_distance(row, product) for row in measured]
    # tokens and widths are often powers of two, so many are equally near
    reach = min(distances, default=math.inf) + 1e-6
    if reach > math.log(4) + 1e-5:
        return False
    near = [row for row, distance in zip(measured, distances, strict=True) if distance <= reach]
    return all(row["from"] <= density <= row["to"] for row in near)


def _distance(row: dict, product: Product) -> float:
    """Between a measured shape and a product's, in the plane of the logarithms of tokens and area."""
    area = row["out_features"] * row["in_features"]
    tokens = row["tokens"] / max(product.tokens, 1)
    return math.hypot(math.log(tokens), math.log(area / (product.out * product.into)))


def _modelled(product: Product) -> float:
    """The density at which kernel and dense path take equal time. Both times grow with it, the kernel's faster."""
    reach, low, high = devices.known(product.device)["reach"], 0.0, 1.0
    for _ in range(12):
        density = (low + high) / 2
        if sparse_seconds(product, density) / reach < dense_seconds(product, density):
            low = density
        else:
            high = density
    return (low + high) / 2
