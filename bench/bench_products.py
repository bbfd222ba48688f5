"""The three products of training alone, each against the dense one: y = x Wᵀ, dx = dy W and dW = dyᵀx."""

import pytest
import torch

import sparsekern as sk
from bench.case import BLOCK_SIZES, HEADLINES, SMOKE, SQUARE, grid
from bench.measure import rotated
from bench.training import blocks_to_dense, check_elements, live_elements, sparse_layer, work

CASES = {
    "smoke": SMOKE,
    "quick": HEADLINES[:3],
    "full": [
        *HEADLINES,
        *(case for case in grid([SQUARE], [2048], [0.5, 0.1, 0.02], BLOCK_SIZES) if case not in HEADLINES),
    ],
}
# As functions of the layer, its dense matrix, x and dy.
PRODUCTS = {
    "dds transposed": (
        lambda layer, dense, x, dy: sk.dds(x, layer.weight, layer.topology, transpose=True),
        lambda layer, dense, x, dy: x @ dense.t(),
    ),
    "dds": (
        lambda layer, dense, x, dy: sk.dds(dy, layer.weight, layer.topology),
        lambda layer, dense, x, dy: dy @ dense,
    ),
    "sdd": (
        lambda layer, dense, x, dy: sk.sdd(dy, x, layer.topology),
        lambda layer, dense, x, dy: dy.t() @ x,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("product", PRODUCTS)
def bench_product(timer, record, case, product):
    layer = sparse_layer(case)
    dense = layer.to_dense()
    rows, gradients = (rotated(case.tokens, count) for count in (case.in_features, case.out_features))
    ours, theirs = PRODUCTS[product]

    data = layer, dense, next(rows), next(gradients)
    found, expected = ours(*data), theirs(*data)
    if product == "sdd":
        found, expected = blocks_to_dense(layer, found), expected * live_elements(layer)
    check_elements(found, expected)
    found = timer(*(lambda f=f: f(layer, dense, next(rows), next(gradients)) for f in (ours, theirs)))
    record(product, partner="dense", **found, **work(layer, case.tokens, step=False))
