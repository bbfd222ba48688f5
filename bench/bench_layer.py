"""SparseLinear against nn.Linear: a whole training step (forward, backward, Adam)."""

from bench.case import BLOCK_SIZES, HEAD, HEADLINES, SMOKE, SQUARE, THREADS, grid
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


def bench_step(timer, record, case):
    ours, dense = sparse_training(case), dense_training(case)
    record("step", partner="nn.Linear", **timer(ours.step, dense.step), **work(ours.layer, case.tokens))
