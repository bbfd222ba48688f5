"""Whether time depends on where the live blocks are: training steps on other topologies against a random one."""

from functools import lru_cache

import pytest
import torch
from torch import nn

import sparsekern as sk
from bench.case import SMOKE, SQUARE, Case, grid
from bench.training import Training, check, sparse_training, work
from sparsekern import Topology

CASES = {
    "smoke": SMOKE,
    "quick": grid([SQUARE], [256], [0.1], [16]),
    "full": grid([SQUARE], [256, 2048], [0.1], [1, 4, 16, 64]),
}
REWIRES = 100


def row_balanced(case: Case) -> Topology:
    """As many live blocks in every block row."""
    rows, cols = case.out_features // case.block_size, case.in_features // case.block_size
    count = max(1, round(case.density * cols))
    places = torch.rand(rows, cols).argsort(dim=1)[:, :count]
    return Topology(
        torch.arange(rows).repeat_interleave(count),
        places.flatten(),
        (case.out_features, case.in_features),
        case.block_size,
    )


@lru_cache(maxsize=1)
def trained(case: Case) -> Topology:
    """Left by SET in the first layer of a network that learns a smooth function of inputs of unequal spread."""
    layer = sk.SparseLinear(case.in_features, case.out_features, density=case.density, block_size=case.block_size)
    network = nn.Sequential(layer, nn.ReLU(), nn.Linear(case.out_features, 8))
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    rule = sk.SET(layer, optimizer, drop_fraction=0.3, update_every=10)
    spread = torch.arange(1, case.in_features + 1) ** -0.5
    teacher = torch.randn(case.in_features, 8)
    for _ in range(10 * REWIRES):
        x = torch.randn(64, case.in_features) * spread
        nn.functional.mse_loss(network(x), (x @ teacher).sin()).backward()
        optimizer.step()
        optimizer.zero_grad()
        rule.step()
    return layer.topology


def spread_of_rows(topology: Topology) -> float:
    """Live blocks of the fullest row or column, relative to the mean."""
    counts = [topology.mask()[0].sum(dim).float() for dim in (0, 1)]
    return max(float(count.max() / count.mean()) for count in counts)


@pytest.mark.parametrize("make", [row_balanced, trained], ids=lambda make: make.__name__)
def bench_step(timer, record, case, make):
    layer = sk.SparseLinear(case.in_features, case.out_features, block_size=case.block_size, topology=make(case))
    check(layer, case.tokens)
    ours, random = Training(layer, case), sparse_training(case)
    record(
        make.__name__.replace("_", "-"),
        partner="random",
        **timer(ours.step, random.step),
        **work(case, products=3),
        fullest=spread_of_rows(layer.topology),
        fullest_random=spread_of_rows(random.layer.topology),
    )
