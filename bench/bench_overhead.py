"""What a call costs where there is next to nothing to compute, against nn.Linear."""

from bench.case import Case
from bench.training import dense_training, sparse_training

_ALL = [Case(32, 32, 1, 0.5, block_size, 1) for block_size in (1, 16)]
CASES = {"smoke": _ALL, "quick": _ALL, "full": _ALL}
REPEAT = 100


def bench_forward(timer, record, case):
    ours, dense = sparse_training(case), dense_training(case)
    record("forward", partner="nn.Linear", **timer(ours.forward, dense.forward, REPEAT))


def bench_forward_backward(timer, record, case):
    ours, dense = sparse_training(case), dense_training(case)
    record("forward + backward", partner="nn.Linear", **timer(ours.forward_backward, dense.forward_backward, REPEAT))
