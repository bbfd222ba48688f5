"""SparseLinear's forward against nn.Linear's, without gradients, on the README's first cases."""

from bench.case import HEADLINES, SMOKE
from bench.training import dense_training, sparse_training, work

CASES = {"smoke": SMOKE, "quick": HEADLINES[:6], "full": HEADLINES}


def bench_forward(compare, record, case):
    ours, dense = sparse_training(case), dense_training(case)
    found = compare(ours.forward, dense.forward)
    record("forward", partner="nn.Linear", **found, **work(ours.layer, case.tokens, step=False))
