"""SparseLinear against nn.Linear: a whole training step (forward, backward, Adam)."""

from bench.case import BLOCK_SIZES, HEAD, HEADLINES, SMOKE, SQUARE, THREADS, Case, Sizes, grid, main_cases
from bench.training import dense_training, sparse_training, work

DENSITIES = (1, 0.5, 0.2, 0.1, 0.05, 0.02)
CASES = {
    "smoke": SMOKE,
    "quick": HEADLINES[:6],
    "full": [
        *grid([HEAD], [256], [0.1, 0.05], [1, 2, 4, 8, 16], THREADS),
        *grid([SQUARE], [256, 2048], DENSITIES, BLOCK_SIZES),
        *grid([SQUARE], [256, 2048], [0.1, 0.05], [1, 4, 16, 32], THREADS[1:]),
    ],
}


def gpu_cases(sizes: Sizes) -> list[Case]:
    return main_cases(sizes)[: len(sizes.block_sizes)]


def bench_step(compare, record, case):
    ours, dense = sparse_training(case), dense_training(case)
    found = compare(ours.step, dense.step, calls=ours.calls)
    record("step", partner="nn.Linear", **found, **work(ours.layer, case.tokens))
