"""What a call costs the host where there is next to nothing to compute, against nn.Linear."""

import pytest

from bench.case import Case, Sizes, on_gpu
from bench.contenders import chosen
from bench.problem import Problem
from bench.training import dense_training, sparse_training

_ALL = [Case(32, 32, 1, 0.5, block_size, 1) for block_size in (1, 16)]
CASES = {"smoke": _ALL, "quick": _ALL, "full": _ALL}
CALLS = 100


def gpu_cases(sizes: Sizes) -> list[Case]:
    return [on_gpu(128, 32, 0.5, block_size, sizes.half) for block_size in sorted(sizes.block_sizes)[::2]]


def measured(compare, record, case, name: str, call: str) -> None:
    ours, dense = sparse_training(case), dense_training(case)
    record(name, partner="nn.Linear", **compare(getattr(ours, call), getattr(dense, call), CALLS))


@pytest.mark.clocks("launch")
def bench_forward(compare, record, case):
    measured(compare, record, case, "forward", "forward")


@pytest.mark.device("cuda")
@pytest.mark.clocks("launch")
def bench_forward_with_gradients(compare, record, case):
    measured(compare, record, case, "forward with gradients", "forward_with_gradients")


@pytest.mark.clocks("launch")
def bench_forward_backward(compare, record, case):
    measured(compare, record, case, "forward + backward", "forward_backward")


@pytest.mark.device("cuda")
@pytest.mark.clocks("launch")
def bench_launch(compare, record, case):
    """The bare product, without checks and autograd."""
    problem, dense = Problem(case, 2**12), dense_training(case, bias=False)
    product = chosen(problem)["dds transposed"]
    found = compare(lambda: product(*problem.first), dense.forward, CALLS)
    record("bare product", partner="nn.Linear", **found)
