"""How long a product takes on a GPU, by a roofline model, and the density at which the vendor's GEMM becomes faster.

Scattered blocks are limited by the traffic from the L2 cache to the multiprocessors, as every block fetches its own
slice of the activations; also by device memory, arithmetic and the launch. The vendor's GEMM is limited by arithmetic
and device memory, and needs the blocks copied to a dense matrix or back. Break-evens that `python -m bench.tune`
measured on a device take the model's place, which then says only how they change with the shape.
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
COPY_LAUNCHES = {"dds": 2, "sdd": 1}  # clear and scatter the dense matrix; gather the live blocks
DENSE_TILES = ((128, 256, 1.0), (128, 128, 0.88), (128, 64, 0.75), (64, 64, 0.55))  # rows, columns, share of the peak


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
    """Lower bound of `dds` or `sdd` on a layer [out, into], before `reach`."""
    name, b, arithmetic, out, into, tokens, device = product
    element, live = ELEMENT[arithmetic], density * out * into
    if name == "dds":
        tiles = math.ceil(tokens / TOKENS)
        programs = tiles * out / b
        gathered = live / b * tiles * (TOKENS + b)
        memory = tokens * (out + into) + live
    else:
        side = min(SIDE, max(1, density * into / b) * b)
        programs = max(live / b / side, devices.known(device)["num_sms"])  # few programs are split over the tokens
        gathered = live / b / side * tokens * (side + b)
        memory = tokens * (out + into) + 2 * live
    facts = devices.known(device)
    busy = min(1, programs / facts["num_sms"])
    # the tensor cores take b / 2 clocks for m64 n{b} k16, reading its operands from shared memory 16 + b / 4
    share = 1 if arithmetic == "ieee" else min(1, (b / 2) / (16 + b / 4))
    return facts["launch_s"] + max(
        element * gathered / (facts["l2_bytes_per_s"] * busy),
        element * memory / facts["hbm_bytes_per_s"],
        2 * tokens * live / (share * busy * facts["gemm_flops"][arithmetic]),
    )


def gemm_seconds(arithmetic: str, m: int, n: int, k: int, device: str) -> float:
    """The vendor's [m, k] @ [k, n]: whole waves of tiles, K split where there are few."""
    facts, element, best = devices.known(device), ELEMENT[arithmetic], math.inf
    memory = element * (m * k + k * n + m * n) / facts["hbm_bytes_per_s"]
    for rows, columns, share in DENSE_TILES:
        for split in (1, 2, 4, 8, 16):
            waves = math.ceil(math.ceil(m / rows) * math.ceil(n / columns) * split / facts["num_sms"])
            one = 2 * rows * columns * k / split / (share * facts["gemm_flops"][arithmetic] / facts["num_sms"])
            sums = 0 if split == 1 else 8 * split * m * n / facts["l2_bytes_per_s"]
            best = min(best, max(waves * one, memory) + sums)
    return best + facts["launch_s"]


def dense_seconds(product: Product, density: float) -> float:
    """The vendor's GEMM and the copy between blocks and a dense matrix."""
    name, _, arithmetic, out, into, tokens, device = product
    facts, element = devices.known(device), ELEMENT[arithmetic]
    sizes = (tokens, out, into) if name == "dds" else (out, into, tokens)
    copied = element * out * into * ((name == "dds") + 2 * density)
    copy = copied / facts["hbm_bytes_per_s"] + COPY_LAUNCHES[name] * facts["launch_s"]
    return gemm_seconds(arithmetic, *sizes, device) + copy


@functools.lru_cache(maxsize=4096)
def break_even(product: Product) -> float:
    """Density up to which the Triton kernel is the faster one, in [0, 1]."""
    here = _modelled(product)
    kind = {"product": product.name, "block_size": product.block_size, "arithmetic": product.arithmetic}
    measured = [row for row in devices.known(product.device)["break_even"] if kind.items() <= row.items()]
    if not measured:
        return here

    def distance(row: dict) -> float:
        area = row["out_features"] * row["in_features"]
        near_tokens = abs(math.log(row["tokens"] / max(product.tokens, 1)))
        return near_tokens + abs(math.log(area / (product.out * product.into)))

    near = min(measured, key=distance)
    there = product._replace(out=near["out_features"], into=near["in_features"], tokens=near["tokens"])
    return min(1.0, near["density"] * here / _modelled(there))


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
