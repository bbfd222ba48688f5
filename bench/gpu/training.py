"""What surrounds the products in training: rewiring, captured steps after a rewire, memory, and the cost of a call."""

from collections.abc import Iterator

import torch
from torch import nn

import sparsekern as sk
from bench.gpu import clock, contenders
from bench.gpu.clock import DEVICE, REHEARSAL
from bench.gpu.problem import DTYPE, Case, Problem
from sparsekern import choose
from sparsekern.backends import triton

WIDTH = 64 if REHEARSAL else 8192
BLOCK_SIZES = (16,) if REHEARSAL else (16, 64, 128)
TOKENS = 32 if REHEARSAL else 4096
DTYPE_OF_WEIGHTS = DTYPE["half"]


def records() -> Iterator[dict]:
    for block_size in BLOCK_SIZES:
        for measured in (rewire, captured_step, memory):
            yield from _reported(measured, block_size)
    for block_size in BLOCK_SIZES[:2]:
        yield from _reported(overhead, block_size)


def rewire(block_size: int) -> dict:
    """An event of SET, as the rule makes it and replayed from a graph, which also shows that nothing synchronises."""
    layer, optimizer = _trained(block_size)
    rule = sk.SET(layer, optimizer, update_every=1)
    row = {"suite": "rewire", "rule": "SET", "host_us": clock.host_microseconds(rule.step, 20)}
    row["eager_us"] = clock.eager(rule.step).median
    try:
        row["graph_us"] = clock.replayed(rule.step).median
    except Exception as error:
        row["reason"] = contenders.reason(error)
    return row


def captured_step(block_size: int) -> dict:
    """A captured forward and backward still gives the right results after a rewire, without a synchronisation."""
    layer, optimizer = _trained(block_size)
    rule = sk.SET(layer, optimizer, update_every=1)
    x, dy = (torch.randn(TOKENS, WIDTH, device=DEVICE, dtype=DTYPE_OF_WEIGHTS) for _ in range(2))
    x.requires_grad_()
    results = []

    def step():
        y = layer(x)
        results[:] = [y, *torch.autograd.grad(y, (x, layer.weight), dy)]

    replay = clock.captured(step)
    if not REHEARSAL:
        torch.cuda.set_sync_debug_mode("error")
    try:
        rule.step()
        replay()
    finally:
        if not REHEARSAL:
            torch.cuda.set_sync_debug_mode("default")
    with sk.use("reference"):
        y = layer(x)
        truth = [y, *torch.autograd.grad(y, (x, layer.weight), dy)]
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(results, truth, strict=True)]
    errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
    return {"suite": "captured step", "error": max(errors), "right": max(errors) < 1e-2}


def memory(block_size: int) -> dict:
    """Bytes that a layer, its gradient and Adam's state keep, and the most that a training step held."""
    row = {"suite": "memory"}
    sparse = lambda: _layer(block_size)  # noqa: E731
    dense = lambda: nn.Linear(WIDTH, WIDTH, bias=False, device=DEVICE, dtype=DTYPE_OF_WEIGHTS)  # noqa: E731
    for name, make in (("ours", sparse), ("dense", dense)):
        if REHEARSAL:
            make()
            row |= {f"{name}_bytes": 0, f"{name}_peak_bytes": 0}
            continue
        x = torch.randn(TOKENS, WIDTH, device=DEVICE, dtype=DTYPE_OF_WEIGHTS)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        layer = make()
        optimizer = torch.optim.Adam(layer.parameters(), fused=True)
        layer(x).sum().backward()
        optimizer.step()
        row[f"{name}_bytes"] = torch.cuda.memory_allocated() - before
        row[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return row


def overhead(block_size: int) -> dict:
    """Host time of a call with next to nothing to compute: the bare launch, the layer, and nn.Linear."""
    problem = Problem(Case(128, 128, 32, 0.5, block_size, "half"))
    x = problem.sets[0][0]
    layer, dense = problem.layer, nn.Linear(128, 128, bias=False, device=DEVICE, dtype=problem.dtype)
    launch = choose.backend_for(x, problem.layout) if triton.unavailable() else triton
    with_gradient = x.clone().requires_grad_()
    row = {"suite": "overhead"}
    row["launch_us"] = clock.host_microseconds(lambda: launch.dds(x, problem.weight, problem.layout, None, True))
    for name, module in (("ours", layer), ("linear", dense)):
        with torch.no_grad():
            row[f"{name}_us"] = clock.host_microseconds(lambda m=module: m(x))
        row[f"{name}_grad_us"] = clock.host_microseconds(lambda m=module: m(with_gradient))
        dy = torch.ones(32, 128, device=DEVICE, dtype=problem.dtype)
        inputs = (with_gradient, module.weight)
        row[f"{name}_step_us"] = clock.host_microseconds(
            lambda m=module, i=inputs, dy=dy: torch.autograd.grad(m(with_gradient), i, dy)
        )
    return row


def _layer(block_size: int) -> sk.SparseLinear:
    options = {"density": 0.25 if REHEARSAL else 0.1, "block_size": block_size, "bias": False}
    return sk.SparseLinear(WIDTH, WIDTH, device=DEVICE, dtype=DTYPE_OF_WEIGHTS, **options)


def _trained(block_size: int) -> tuple[sk.SparseLinear, torch.optim.Optimizer]:
    """After a step, so that there is optimiser state to reset."""
    torch.manual_seed(0)
    layer = _layer(block_size)
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    layer(torch.randn(32, WIDTH, device=DEVICE, dtype=DTYPE_OF_WEIGHTS)).sum().backward()
    optimizer.step()
    return layer, optimizer


def _reported(measure, block_size: int) -> Iterator[dict]:
    row = {"width": WIDTH, "block_size": block_size}
    try:
        yield measure(block_size) | row
    except Exception as error:
        yield {"suite": measure.__name__.replace("_", " ")} | row | {"reason": contenders.reason(error)}
