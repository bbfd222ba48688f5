"""Case: on what something is measured, and the lists of cases that several suites share."""

from dataclasses import dataclass, field, fields

import torch

# All threads of the machine: what torch takes by itself.
ALL_THREADS = torch.get_num_threads()
THREADS = sorted({1, ALL_THREADS})
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
SQUARE, HEAD, TINY = (1024, 1024), (128, 1024), (32, 48)


@dataclass(frozen=True)
class Case:
    out_features: int
    in_features: int
    tokens: int
    density: float
    block_size: int
    threads: int
    dtype: str = field(default="float32", kw_only=True)

    def __str__(self):
        return (
            f"{self.out_features}x{self.in_features}-{self.tokens}tokens-density{self.density}"
            f"-block{self.block_size}-{self.threads}threads-{self.dtype}"
        )


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


# The README's first table: a wide layer, a layer with few tokens, unstructured sparsity, and a task head.
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
