"""The vendor's GEMM on a GPU, in the shapes of the chooser's model: what `sparsekern.choose.cost` is compared with."""

import pytest

from bench import limits
from bench.case import Case, Sizes, on_gpu


def gpu_cases(sizes: Sizes) -> list[Case]:
    return [
        on_gpu(width, tokens, 1.0, 1, arithmetic)
        for arithmetic in limits.arithmetics(sizes).values()
        for width in (sizes.width, *sizes.widths)
        for tokens in sizes.tokens
    ]


@pytest.mark.parametrize("name", ["forward", "weight gradient"])
def bench_gemm(record, case, name):
    n, tokens = case.out_features, case.tokens
    shape = (tokens, n, n) if name == "forward" else (n, n, tokens)
    flop = 2 * tokens * n * n
    record(name, time_us=limits.gemm_microseconds(case.arithmetic, *shape), flop=flop)
