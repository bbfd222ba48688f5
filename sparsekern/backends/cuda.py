"""The kernels of csrc/cuda, compiled to fatbin/*.fatbin when sparsekern was built, and launched through CUDA's driver.

They rewire and prune (sparsekern/rewire/on_device.py), and multiply nothing. They are chosen on a device whose table
says so, and `sparsekern.use("cuda")` forces them.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparsekern.topology import Layout

OPERATIONS = ()
FATBIN = Path(__file__).parent.parent / "fatbin"
KERNELS = {"rewire": ("score", "count", "scatter", "rank", "assign", "index")}
"""Source files of csrc/cuda, and the kernels in each, without the file's name."""
ARCHITECTURES = ("sm_80", "sm_90a", "compute_80")
"""What setup.py compiles them for; the last is PTX, which the driver compiles for other devices."""


def built() -> str | None:
    """Which of the files were compiled when sparsekern was built, and for what; None where none was."""
    files = [name for name in KERNELS if (FATBIN / f"{name}.fatbin").exists()]
    return f"{', '.join(files)} for {', '.join(ARCHITECTURES)}" if files else None


def unavailable() -> str | None:
    """Why these kernels cannot run here, in a sentence; None when they can."""
    missing = [f"{name}.fatbin" for name in KERNELS if not (FATBIN / f"{name}.fatbin").exists()]
    if missing:
        return (
            f"sparsekern was built without {', '.join(missing)}; install it again with nvcc on the PATH "
            "(SPARSEKERN_CUDA=1 says what is missing)."
        )
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU."
    if torch.cuda.get_device_capability() < (8, 0):
        name, capability = torch.cuda.get_device_name(), ".".join(map(str, torch.cuda.get_device_capability()))
        return f"the kernels need compute capability 8.0, and {name} has {capability}."
    return None


def refusal(x: Tensor, layout: Layout) -> str:
    return "no operands of products: it only rewires"


def launch(file: str, kernel: str, blocks: int, threads: int, addresses: Sequence[int], device: torch.device) -> None:
    """Launch a kernel whose parameters are all addresses, on torch's current stream of the device."""
    with torch.cuda.device(device):
        function = _function(file, f"{file}_{kernel}", torch.cuda.current_device())
        values = [ctypes.c_void_p(address) for address in addresses]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = _driver().cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, pointers, None)
    _check(status, f"{file}_{kernel}: launch of {blocks} blocks of {threads} threads")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _function(file: str, kernel: str, device: int) -> ctypes.c_void_p:
    torch.cuda.current_stream().synchronize()  # the device's context exists from here on
    function = ctypes.c_void_p()
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), _module(file, device), kernel.encode()), kernel)
    return function


@functools.cache
def _module(file: str, device: int) -> ctypes.c_void_p:
    module = ctypes.c_void_p()
    image = (FATBIN / f"{file}.fatbin").read_bytes()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), image), f"{file}.fatbin")
    return module


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"backend 'cuda', {what}: error {status} ({(text.value or b'unknown').decode()})")
