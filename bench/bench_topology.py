"""Whether time depends on where the live blocks are: training steps on other topologies against a random one."""

import pytest
import torch
from torch import nn

import sparsekern as sk
from bench.case import SMOKE, SQUARE, Case, grid
from bench.training import Training, check, work
from sparsekern import Topology

CASES = {
    "smoke": SMOKE,
    "quick": grid([SQUARE], [256], [0.1], [16]),
    "full": grid([SQUARE], [2048], [0.1], [1, 4, 16, 64]),
}
REWIRES = 100


def row_balanced(case: Case) -> Topology:
    """As many live blocks in every block row."""
    rows, cols = -(-case.out_features // case.block_size), -(-case.in_features // case.block_size)
    count = max(1, round(case.density * cols))
    places = torch.rand(rows, cols).argsort(dim=1)[:, :count].flatten()
    shape = case.out_features, case.in_features
    return Topology(torch.arange(rows).repeat_interleave(count), places, shape, case.block_size)


def trained(case: Case) -> Topology:
    """Left by SET in a first layer whose later inputs are ever rarer, half of them zero, as at an image's border."""
    layer = sk.SparseLinear(case.in_features, case.out_features, density=case.density, block_size=case.block_size)
    network = nn.Sequential(layer, nn.ReLU(), nn.Linear(case.out_features, 8))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, fused=True)
    rule = sk.SET(layer, optimizer, drop_fraction=0.3, update_every=10)
    lit = torch.linspace(1, -1, case.in_features)
    teacher = torch.randn(case.in_features, 8) / case.in_features**0.5
    for _ in range(10 * REWIRES):
        x = torch.randn(64, case.in_features) * (torch.rand(64, case.in_features) < lit)
        nn.functional.mse_loss(network(x), (x @ teacher).sin()).backward()
        optimizer.step()
        optimizer.zero_grad()
        rule.step()
    return layer.topology


def fullest(topology: Topology) -> dict[str, float]:
    """Live blocks of the fullest block row and block column, relative to the mean."""
    counts = {"row": topology.mask()[0].sum(1).float(), "column": topology.mask()[0].sum(0).float()}
    return {f"fullest_{name}": float(count.max() / count.mean()) for name, count in counts.items()}


@pytest.mark.parametrize("make", [row_balanced, trained], ids=lambda make: make.__name__)
def bench_step(timer, record, case, make):
    topology = make(case)
    random = Topology.random(topology.shape, topology.num_live, case.block_size)
    ours, theirs = (sk.SparseLinear(case.in_features, case.out_features, topology=each) for each in (topology, random))
    check(ours, case.tokens)
    found = timer(Training(ours, case).step, Training(theirs, case).step)
    name = make.__name__.replace("_", "-")
    record(name, partner="random", **found, **work(case, products=3), **fullest(topology))
