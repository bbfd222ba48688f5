"""Bytes of a layer's weight, gradient, Adam state and index, as the allocator counts them, against nn.Linear."""

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import sparsekern as sk
from bench.case import BLOCK_SIZES, SQUARE, TINY, grid

CASES = {
    "smoke": grid([TINY], [16], [0.5], [1, 16]),
    "quick": grid([SQUARE], [256], [0.1], [1, 16]),
    "full": grid([SQUARE], [256], [0.1, 0.05], BLOCK_SIZES),
}


def allocated(make, tokens: int) -> tuple[nn.Module, int]:
    """A layer after one training step, and the bytes that it and its optimiser hold."""
    x = torch.randn(tokens, make().in_features)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        layer = make()
        optimizer = torch.optim.Adam(layer.parameters())
        layer(x).sum().backward()
        optimizer.step()
    return layer, sum(event.self_cpu_memory_usage for event in profiler.key_averages())


def bench_memory(record, case):
    sizes = case.in_features, case.out_features
    layer, ours = allocated(
        lambda: sk.SparseLinear(*sizes, bias=False, density=case.density, block_size=case.block_size), case.tokens
    )
    _, dense = allocated(lambda: nn.Linear(*sizes, bias=False), case.tokens)
    index = layer.topology.nbytes
    assert ours - index <= 1.05 * dense * layer.density
    found = {"ours_bytes": ours, "dense_bytes": dense, "index_bytes": index}
    record("training", partner="nn.Linear", **found, index_per_weight=index / layer.weight.numel())
