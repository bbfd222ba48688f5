"""SparseLinear's forward and both gradients, without bias and optimiser, against nn.Linear's."""

import pytest

from bench.case import HEADLINES, SMOKE, Case, Sizes, float32_cases, main_cases, size_cases
from bench.training import dense_training, sparse_training, work

CASES = {"smoke": SMOKE, "quick": HEADLINES[:1], "full": HEADLINES}


def gpu_cases(sizes: Sizes) -> list[Case]:
    return [*main_cases(sizes), *float32_cases(sizes), *size_cases(sizes)]


@pytest.mark.clocks("graph", "host")
def bench_gradients(compare, record, case):
    ours, dense = sparse_training(case, bias=False), dense_training(case, bias=False)
    found = compare(ours.both_gradients, dense.both_gradients, calls=ours.calls)
    record("forward + backward", partner="nn.Linear", **found, **work(ours.layer, case.tokens))
