"""Case: on what something is measured; how large the problems of a GPU are; cases that several suites share."""

from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch

# All threads of the machine: what torch takes by itself.
ALL_THREADS = torch.get_num_threads()
THREADS = sorted({1, ALL_THREADS})
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
SQUARE, HEAD, TINY = (1024, 1024), (128, 1024), (32, 48)
# What the cases of a GPU run on. Without a GPU they are a rehearsal: the same calls on a CPU, in Triton's interpreter.
GPU = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    out_features: int
    in_features: int
    tokens: int
    density: float
    block_size: int
    threads: int
    device: str = field(default="cpu", kw_only=True)
    arithmetic: str = field(default="float32", kw_only=True)
    """The dtype, or "tf32": float32 that tensor cores round."""

    def __str__(self):
        return (
            f"{self.out_features}x{self.in_features}-{self.tokens}tokens-density{self.density}"
            f"-block{self.block_size}-{self.threads}threads-{self.arithmetic}"
        )

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.arithmetic == "tf32" else getattr(torch, self.arithmetic)

    @property
    def kind(self) -> str:
        """The arithmetic in the words of `sparsekern.choose.cost`."""
        return {"tf32": "tf32", "float32": "ieee"}.get(self.arithmetic, "half")


KEYS = [each.name for each in fields(Case)]


def grid(shapes, tokens, densities, block_sizes, threads=(1,)) -> list[Case]:
    """Every combination; the cheap cases come first, so that a failure shows early."""
    return [
        Case(*shape, count, density, block_size, number)
        for count in tokens
        for shape in shapes
        for number in threads
        for block_size in block_sizes
        for density in densities
    ]


# The first table of a CPU: a wide layer, a layer with few tokens, unstructured sparsity, and a task head.
HEADLINES = [
    case
    for number in THREADS
    for case in (
        Case(*SQUARE, 2048, 0.1, 16, number),
        Case(*SQUARE, 2048, 0.1, 32, number),
        Case(*SQUARE, 256, 0.1, 16, number),
        Case(*SQUARE, 2048, 0.05, 1, number),
        Case(*HEAD, 256, 0.05, 1, number),
    )
]
SMOKE = grid([TINY], [16], [0.5], [1, 16])


class Sizes(NamedTuple):
    """How large the problems of a GPU are, the most important first."""

    half: str  # 16 bits; Triton's interpreter multiplies no bfloat16
    single: tuple[tuple[str, int, float], ...]  # arithmetic, tokens and density of float32
    block_sizes: tuple[int, ...]
    width: int
    tokens: tuple[int, ...]
    densities: tuple[float, ...]
    widths: tuple[int, ...]  # of other layers
    wide: int  # a layer that is rewired and whose memory is measured
    gemm: int  # the vendor's best GEMM
    elements: int  # of an array in device memory, far beyond the caches
    rotated_bytes: int  # of the buffers of one shape: more than the L2 cache of any GPU of today


# The vendor's float32 without tensor cores is too slow for 16384 tokens.
_SINGLE = (("tf32", 16384, 0.1), ("float32", 4096, 0.1), ("tf32", 16384, 0.2))
_BLOCKS, _TOKENS, _DENSITIES = (64, 128, 32, 16), (16384, 4096, 256), (0.1, 0.2, 0.05, 0.5, 0.02)
# fmt: off
SIZES = {
    "full": Sizes("bfloat16", _SINGLE, _BLOCKS, 4096, _TOKENS, _DENSITIES, (1024, 8192), 8192, 8192, 2**28, 2**27),
    "quick": Sizes("bfloat16", _SINGLE[:1], _BLOCKS, 4096, (16384,), (0.1,), (1024,), 8192, 8192, 2**28, 2**27),
    "smoke": Sizes("float16", (("float32", 32, 0.5),), (16,), 64, (32,), (0.5,), (), 64, 64, 2**14, 2**12),
}
# fmt: on


def on_gpu(width: int, tokens: int, density: float, block_size: int, arithmetic: str) -> Case:
    return Case(width, width, tokens, density, block_size, 1, device=GPU, arithmetic=arithmetic)


def main_cases(sizes: Sizes) -> list[Case]:
    """16 bits: all tokens, densities and block sizes of one width."""
    return [
        on_gpu(sizes.width, tokens, density, block_size, sizes.half)
        for tokens in sizes.tokens
        for density in sizes.densities
        for block_size in sizes.block_sizes
    ]


def float32_cases(sizes: Sizes) -> list[Case]:
    return [
        on_gpu(sizes.width, tokens, density, block_size, arithmetic)
        for arithmetic, tokens, density in sizes.single
        for block_size in sizes.block_sizes
    ]


def size_cases(sizes: Sizes) -> list[Case]:
    """Other widths, with some tokens fewer."""
    return [
        on_gpu(width, tokens, sizes.densities[0], block_size, sizes.half)
        for width in sizes.widths
        for tokens in sizes.tokens[1:] or sizes.tokens
        for block_size in sizes.block_sizes
    ]


def wide_cases(sizes: Sizes) -> list[Case]:
    """One wide layer, as training meets it."""
    block_sizes = sorted({sizes.block_sizes[-1], *sizes.block_sizes[:2]})
    return [
        on_gpu(sizes.wide, sizes.tokens[len(sizes.tokens) // 2], sizes.densities[0], b, sizes.half) for b in block_sizes
    ]
