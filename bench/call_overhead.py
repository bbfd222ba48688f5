"""What a call costs the host before a GPU has anything to do: `python -m bench.call_overhead`, without a GPU.

Triton compiles the kernels for an H100 as it would on one; only its driver is a stub, which loads and launches nothing.
The tensors are the CPU's, and the chooser is told that they are a GPU's.
"""

import json
import time
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import sparsekern as sk
from sparsekern import _cuda, choose
from sparsekern.backends import triton

# Microseconds that a forward of SparseLinear may take above the bare launch, without and with gradients.
BUDGET = {"no gradient": 10.0, "gradient": 15.0}
CALLS, REPEAT = 500, 15


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


def microseconds(call) -> float:
    """The least of several means: what disturbs a machine only ever adds."""
    means = []
    for _ in range(REPEAT):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        means.append((time.perf_counter() - start) / CALLS * 1e6)
    return min(means)


def measure() -> dict[str, float]:
    """Microseconds by what was called."""
    torch.set_num_threads(1)
    driver.set_active(Driver())
    # as quick as torch's own, which a torch without CUDA lacks
    torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream = (-1).__int__, {-1: 0}.__getitem__
    _cuda.set_launch_kernel(_cuda.counting_launch_kernel())
    triton.unavailable = lambda: None
    choose._device_name = lambda device: "a GPU without a file"
    choose.backend_for = lambda x, layout, token_offsets=None: choose._on_gpu(x, layout, token_offsets is not None)

    layer = sk.SparseLinear(128, 128, density=0.25, block_size=16, dtype=torch.bfloat16)
    layout, x = layer.topology.layout, torch.randn(32, 128).bfloat16()
    needs_gradient, dy = x.clone().requires_grad_(), torch.randn(32, 128).bfloat16()
    weight, bias = layer.weight.detach(), layer.bias.detach()
    leaves = (needs_gradient, layer.weight, layer.bias)
    calls = {
        "choose": lambda: choose.backend_for(x, layout),
        "dds": lambda: triton.dds(x, weight, layout, bias, True),
        "sdd": lambda: triton.sdd(dy, x, layout),
        "gradient": lambda: layer(needs_gradient),
        "forward and backward": lambda: torch.autograd.grad(layer(needs_gradient), leaves, dy),
    }
    found = {name: microseconds(call) for name, call in calls.items()}
    with torch.no_grad():
        found["no gradient"] = microseconds(lambda: layer(x))
    return found | {f"{name} above the launch": found[name] - found["dds"] for name in BUDGET}


if __name__ == "__main__":
    print(json.dumps({name: round(value, 2) for name, value in measure().items()}, indent=1))
