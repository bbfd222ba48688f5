"""A captured forward and backward still gives the right results after a rewire, and nothing synchronises."""

import pytest
import torch

import sparsekern as sk
from bench import clock
from bench.case import Case, Sizes, wide_cases
from bench.training import Training, sparse_layer


def gpu_cases(sizes: Sizes) -> list[Case]:
    return wide_cases(sizes)


@pytest.mark.device("cuda")
def bench_captured_step(record, case):
    ours = Training(sparse_layer(case, bias=False), case)
    layer, rule = ours.layer, sk.SET(ours.layer, ours.optimizer, update_every=1)
    ours.step()  # so that there is optimiser state to reset
    x, dy = next(ours.inputs).detach().requires_grad_(), next(ours.gradients)
    results = []

    def step():
        y = layer(x)
        results[:] = [y, *torch.autograd.grad(y, (x, layer.weight), dy)]

    replay = clock.captured(step)
    if clock.ON_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        rule.step()
        replay()
    finally:
        if clock.ON_GPU:
            torch.cuda.set_sync_debug_mode("default")
    with sk.use("reference"):
        y = layer(x)
        truth = [y, *torch.autograd.grad(y, (x, layer.weight), dy)]
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(results, truth, strict=True)]
    error = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    record("step replayed after a rewire", error=error)
    assert error < 1e-2, f"relative error {error:.1e}"
