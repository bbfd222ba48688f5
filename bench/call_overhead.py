"""What a call costs the host before a GPU has anything to do: `python -m bench.call_overhead`, without a GPU.

Triton compiles the kernels for an H100 as it would on one; only the driver is a stub, which loads and launches nothing.
The tensors are the CPU's, and the chooser is told that they are a GPU's. Beside it stands nn.Linear, of one token and
eight features on the CPU, so that its arithmetic counts for nothing either.

Then whole events of rewiring by the kernels of csrc/cuda, `rule.step()` of a model of 28 layers. What torch itself asks
of a GPU is missing there: a pinned buffer, its copy, clearing the workspace, and the current stream.
"""

import json
import statistics
import time
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import sparsekern as sk
from sparsekern import _cuda, choose
from sparsekern.backends import cuda, triton

# How many times the host time of nn.Linear a layer may take.
BUDGET = {"no gradient": 1.5, "gradient": 1.7, "forward and backward": 1.5}
CALLS, REPEAT = 20, 400
EVENTS = 400
RULES = {
    "SET": sk.SET,
    "RigL": sk.RigL,
    "GMP, global": partial(sk.GMP, scope="global", final_density=0.05, end_step=1e6, compact=False),
    "GMP, layer": partial(sk.GMP, scope="layer", final_density=0.05, end_step=1e6, compact=False),
}


class Driver:
    """Stands in for Triton's driver of NVIDIA GPUs."""

    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 32, 0, 1024),
        unload_module=lambda *_: None,
        get_device_properties=lambda device: {"max_shared_mem": 232_448, "multiprocessor_count": 132},
    )

    def launcher_cls(self, source, metadata):
        return lambda *_: None

    def get_current_device(self):
        return -1  # what tensors of the CPU say of theirs

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def microseconds(calls: dict) -> dict[str, float]:
    """The least of many short means, of all calls in turn. Other work on the machine only makes calls slower."""
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(REPEAT):
        for name, call in calls.items():
            with torch.set_grad_enabled("no gradient" not in name):
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                least[name] = min(least[name], (time.perf_counter() - start) / CALLS * 1e6)
    return least


def measure() -> dict[str, float]:
    """Microseconds by what was called."""
    torch.set_num_threads(1)
    driver.set_active(Driver())
    # as quick as torch's own, which a torch without CUDA lacks
    torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream = (-1).__int__, {-1: 0}.__getitem__
    _cuda.stand_in_for_driver()
    triton.unavailable = lambda: None
    choose._device_name = lambda device: "a GPU without a file"
    choose.backend_for = lambda operation, x, layout, token_offsets=None: choose._on_gpu(
        operation, x, layout, token_offsets is not None
    )
    choose.is_surely_for_cpu = lambda x, layout: False

    layer = sk.SparseLinear(128, 128, density=0.25, block_size=16, dtype=torch.bfloat16)
    layout, x, dy = layer.topology.layout, torch.randn(32, 128).bfloat16(), torch.randn(32, 128).bfloat16()
    weight, bias = layer.weight.detach(), layer.bias.detach()
    linear, small, small_dy = torch.nn.Linear(8, 8), torch.randn(1, 8), torch.randn(1, 8)
    calls = {
        "choose": lambda: choose.backend_for("dds", x, layout),
        "dds": lambda: triton.dds(x, weight, layout, bias, True),
        "sdd": lambda: triton.sdd(dy, x, layout),
        **_steps(layer, x, dy),
        **{f"nn.Linear, {name}": call for name, call in _steps(linear, small, small_dy).items()},
    }
    found = microseconds(calls)
    return found | {f"{name} / nn.Linear": found[name] / found[f"nn.Linear, {name}"] for name in BUDGET}


def measure_events() -> dict[str, float]:
    """Median microseconds of an event of 28 layers, and of a step between two events; all rules in turn."""
    cuda._loaded = lambda *_: (-1, 1)
    cuda.current = lambda device: nullcontext(0)
    choose.rewires_by_cuda = lambda device: True
    rules = {name: rule_of_28_layers(make) for name, make in RULES.items()}
    times = {}
    for _ in range(EVENTS):
        for name, rule in rules.items():
            for what in ("a step", "an event"):
                start = time.perf_counter()
                rewired = rule.step()
                times.setdefault(f"{name}, {what}", []).append((time.perf_counter() - start) * 1e6)
                assert rewired == (what == "an event")
    return {name: statistics.median(found) for name, found in times.items()}


def rule_of_28_layers(make):
    """A rule after a few events, whose next step is none."""
    model = nn.Sequential(*(sk.SparseLinear(64, 64, density=0.3, block_size=16) for _ in range(28)))
    optimizer = torch.optim.Adam(model.parameters())
    rule = make(model, optimizer, update_every=2)
    for layer in model:  # what a step leaves, without its products
        layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    for _ in range(8):
        rule.step()
    return rule


def _steps(layer, x, dy) -> dict:
    needs_gradient = x.clone().requires_grad_()
    leaves = (needs_gradient, layer.weight, layer.bias)
    return {
        "no gradient": lambda: layer(x),
        "gradient": lambda: layer(needs_gradient),
        "forward and backward": lambda: torch.autograd.grad(layer(needs_gradient), leaves, dy),
    }


if __name__ == "__main__":
    found = {name: round(value, 2) for name, value in (measure() | measure_events()).items()}
    print(json.dumps(found | {"budget": BUDGET, "launches": _cuda.counted_launches()}, indent=1))
