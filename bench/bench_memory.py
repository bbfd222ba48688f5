"""Bytes of a layer in training, against nn.Linear: what it keeps between steps, and the most that its steps take."""

import ctypes
import multiprocessing
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import sparsekern as sk
from bench.case import BLOCK_SIZES, SQUARE, TINY, Case, Sizes, grid, wide_cases

CASES = {
    "smoke": grid([TINY], [16], [0.5], [1, 16]),
    "quick": grid([SQUARE], [2048], [0.1], [1, 16]),
    "full": grid([SQUARE], [2048], [0.1, 0.05], BLOCK_SIZES),
}


def gpu_cases(sizes: Sizes) -> list[Case]:
    return wide_cases(sizes)


def made(case: Case, sparse: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    sizes, options = (case.in_features, case.out_features), {"device": case.device, "dtype": case.dtype}
    if sparse:
        options |= {"density": float(case.density), "block_size": case.block_size}
        layer = sk.SparseLinear(*sizes, bias=False, **options)
    else:
        layer = nn.Linear(*sizes, bias=False, **options)
    return layer, torch.optim.Adam(layer.parameters(), fused=True)


def data(case: Case) -> tuple[Tensor, Tensor]:
    """x and dy: other layers'."""
    x, dy = (
        torch.randn(case.tokens, features, dtype=case.dtype, device=case.device)
        for features in (case.in_features, case.out_features)
    )
    return x.requires_grad_(), dy


def step(layer: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, dy: Tensor) -> None:
    """A training step that leaves its gradient, and begins without."""
    optimizer.zero_grad()
    layer(x).backward(dy)
    x.grad = None
    optimizer.step()


def kept(case: Case, sparse: bool) -> tuple[nn.Module, int]:
    """The layer, and the bytes of weight, gradient, Adam's state and index, as torch's allocator counts them."""
    x, dy = data(case)
    if case.device == "cuda":
        before = torch.cuda.memory_allocated()
        layer, optimizer = made(case, sparse)
        step(layer, optimizer, x, dy)
        return layer, torch.cuda.memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        layer, optimizer = made(case, sparse)
        step(layer, optimizer, x, dy)
    return layer, sum(event.self_cpu_memory_usage for event in profiler.key_averages())


def most(case: Case, sparse: bool) -> int:
    """Bytes that a step takes at most, the layer's included; to be called in a process that has done nothing else.

    torch's allocator would not tell: it knows neither the kernels' scratch memory nor MKL's.
    """
    torch.set_num_threads(case.threads)
    trim = ctypes.CDLL(None).malloc_trim  # what is free must not look as if it were in use
    small = replace(case, out_features=256, in_features=256, tokens=256)
    for each in (small, case):  # the first brings code into memory
        x, dy = data(each)
        trim(0)
        before = resident("VmRSS")
        layer, optimizer = made(each, sparse)
        step(layer, optimizer, x, dy)
    trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of making the layer, is forgotten
    step(layer, optimizer, x, dy)
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes of this process: VmRSS are now in memory, VmHWM at most."""
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])


@lru_cache
def peak(case: Case, sparse: bool) -> dict[str, int | str]:
    key = "ours_peak_bytes" if sparse else "dense_peak_bytes"
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(*made(case, sparse), *data(case))
        return {key: torch.cuda.max_memory_allocated() - before}
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch", "sparsekern"])
    try:
        with processes.Pool(1) as fresh:
            return {key: fresh.apply(most, (case, sparse))}
    except (OSError, AttributeError) as failure:
        return {"reason": f"only Linux with glibc tells the peak: {failure}"}


def bench_memory(record, case):
    layer, ours = kept(case, sparse=True)
    _, dense = kept(case, sparse=False)
    index = layer.topology.nbytes
    assert ours - index <= 1.05 * dense * layer.density
    found = {"ours_bytes": ours, "dense_bytes": dense, "index_bytes": index}
    found |= peak(case, sparse=True) | peak(replace(case, density=1, block_size=1), sparse=False)
    record("training", partner="nn.Linear", **found, index_per_weight=index / layer.weight.numel())
