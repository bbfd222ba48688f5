"""The products of training, y = x Wᵀ, dx = dy W and dW = dyᵀx, against the dense ones; on a GPU by every path."""

import pytest
import torch

from bench import contenders
from bench.case import BLOCK_SIZES, HEADLINES, SMOKE, SQUARE, Case, Sizes, float32_cases, grid, main_cases, size_cases
from bench.contenders import STEP
from bench.problem import PRODUCTS
from sparsekern.backends import cuda

CASES = {
    "smoke": SMOKE,
    "quick": HEADLINES[:3],
    "full": [
        *HEADLINES,
        *(case for case in grid([SQUARE], [2048], [0.5, 0.1, 0.02], BLOCK_SIZES) if case not in HEADLINES),
    ],
}


def gpu_cases(sizes: Sizes) -> list[Case]:
    return [*main_cases(sizes), *float32_cases(sizes), *size_cases(sizes)]


def work(problem, product: str) -> dict[str, float]:
    """Operations and bytes of live weights that the product cannot do without."""
    case, live = problem.case, problem.layer.topology.num_live * problem.case.block_size**2
    activations, products = case.tokens * (case.out_features + case.in_features), 3 if product == STEP else 1
    elements = 3 * live + 2 * activations if product == STEP else live + activations
    return {"flop": 2 * products * case.tokens * live, "bytes": case.dtype.itemsize * elements}


def measured(compare, record, problem, backend: str, product: str, build=None) -> None:
    ours = contenders.right(problem, build or contenders.OURS[backend], product)
    dense = contenders.right(problem, contenders.dense, product)
    found = compare(*(lambda f=f: f(*problem.next_set()) for f in (ours, dense)), calls=problem.calls)
    record(product, backend=backend, partner="dense", **found, **work(problem, product))


@torch.no_grad()
@pytest.mark.device("cpu")
@pytest.mark.parametrize("product", PRODUCTS)
def bench_product(compare, record, problem, product):
    measured(compare, record, problem, "chosen", product)


@torch.no_grad()
@pytest.mark.device("cuda")
@pytest.mark.parametrize("product", (*PRODUCTS, STEP))
@pytest.mark.parametrize("backend", contenders.OURS)
def bench_path(compare, record, problem, backend, product):
    measured(compare, record, problem, backend, product)


@torch.no_grad()
@pytest.mark.skipif(bool(cuda.unavailable()), reason=f"backend 'cuda': {cuda.unavailable()}")
@pytest.mark.device("cuda")
@pytest.mark.parametrize("product", (*PRODUCTS, STEP))
def bench_kernels_of_cuda(compare, record, problem, product):
    if takes := cuda.refusal(problem.first[0], problem.layout):
        pytest.skip(f"backend 'cuda' takes {takes}")
    measured(compare, record, problem, "cuda", product, contenders.by_cuda)
