"""The kernels of csrc/cuda, compiled to fatbin/*.fatbin when sparsekern was built, and launched through CUDA's driver.

They rewire and prune (sparsekern/rewire/on_device.py), and make products of blocks of 16 and 8 (`products`). Both are
chosen where the table of the device says so (sparsekern/devices); `sparsekern.use("cuda")` forces both.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sparsekern.layout import Layout

try:
    from sparsekern import _cuda
except ImportError:
    _cuda = None

OPERATIONS = ("dds", "sdd")
BLOCK_SIZES = (16, 8)
DTYPES = (torch.bfloat16, torch.float16)
NEEDED_SHARED = 160 * 1024  # bytes that a program of a product must be allowed: by A100, H100 and their like
MOST_FEATURES = 65536  # of a group: the lists of dds_pack then fit into these bytes
FATBIN = Path(__file__).parent.parent.parent / "fatbin"
KERNELS = {
    "dds": (
        *(f"{b}_{t}_{n}" for b in BLOCK_SIZES for t in ("bf16", "f16") for n in ("many", "few")),
        *("pack_16", "pack_8"),
    ),
    "rewire": ("score", "count", "scatter", "rank", "assign", "index"),
    "sdd": (
        *(f"{b}_{t}_512x{n}" for b in BLOCK_SIZES for t in ("bf16", "f16") for n in (1024, 512, 256)),
        *("sum_bf16", "sum_f16"),
    ),
}
"""Source files of csrc/cuda, and the kernels in each, without the file's name."""
DEFAULT_SHARED, MAX_DYNAMIC_SHARED = 48 * 1024, 8  # bytes that every kernel may have; the attribute for more
ARCHITECTURES = ("sm_80", "sm_90a", "compute_80")
"""What setup.py compiles them for; the last is PTX, which the driver compiles for other devices."""

UNLOADABLE = (200, 209, 218, 221, 222, 223)
"""What cuModuleLoadData returns where a file is not for the device, or of a newer CUDA than the driver's."""


class UnloadableError(RuntimeError):
    """The driver returned one of UNLOADABLE; it would again."""


def built() -> str | None:
    """Which of the files were compiled when sparsekern was built, and for what; None where none was."""
    files = _files(FATBIN)
    return f"{', '.join(files)} for {', '.join(ARCHITECTURES)}" if files else None


def unavailable(device: torch.device | None = None) -> str | None:
    """Why these kernels cannot run here, in a sentence; None when they can.

    Of a device that is given, the driver is asked too: it loads them there, in a context that they need anyway.
    """
    if missing := [f"{name}.fatbin" for name in KERNELS if name not in _files(FATBIN)]:
        return (
            f"sparsekern was built without {', '.join(missing)}; install it again with nvcc on the PATH "
            "(SPARSEKERN_CUDA=1 says what is missing)."
        )
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU."
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"the kernels need compute capability 8.0, and {name} has {'.'.join(map(str, capability))}."
    if _cuda is None:
        return "sparsekern was built without sparsekern._cuda; install it again where a C++ compiler works."
    if device is not None:
        with torch.cuda.device(device):
            return _unloadable(torch.cuda.current_device())
    return None


@functools.cache
def _files(folder: Path) -> list[str]:
    """Those of KERNELS that are there, looked up once: whether they are is asked at every event of rewiring."""
    return [name for name in KERNELS if (folder / f"{name}.fatbin").exists()]


def refusal(x: Tensor, layout: Layout) -> str | None:
    """What it takes, where it does not take these operands."""
    features = max(layout.num_rows, layout.num_cols) // layout.groups * layout.block_size
    return refuses(x.device, x.dtype, layout.block_size, features)


def refuses(device: torch.device, dtype: torch.dtype, block_size: int, features: int) -> str | None:
    """The same of a layer whose groups have at most so many inputs and outputs."""
    if device.type != "cuda" or dtype not in DTYPES or block_size not in BLOCK_SIZES:
        got = f"{dtype} on {device} in blocks of {block_size}"
        return f"bfloat16 and float16 on an NVIDIA GPU in blocks of 8 and 16, got {got}"
    if features > MOST_FEATURES:
        return f"groups of at most {MOST_FEATURES} features, got {features}"
    if (allowed := shared_bytes(device)) < NEEDED_SHARED:
        name = torch.cuda.get_device_name(device)
        return f"GPUs that allow a kernel {NEEDED_SHARED} bytes of shared memory, and {name} allows {allowed}"
    return None


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """That one program may have; those of Hopper where there is no device."""
    if device.type != "cuda":
        return 232448
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def __getattr__(name: str):
    """Import the launchers of the products when one is first asked for: they need what is below."""
    if name not in OPERATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sparsekern.backends.cuda import products

    return getattr(products, name)


@functools.lru_cache(maxsize=4096)
def prepare(
    file: str,
    kernel: str,
    blocks: int,
    threads: int,
    parameters: tuple[str | int, ...],
    device: torch.device,
    shared: int = 0,
) -> Callable[..., bool]:
    """A launch of a kernel, ready to be made again and again.

    Args:
        parameters: of the kernel, in order, all of 8 bytes. A tensor's name stands for its address, "x_stride" for the
            elements from row to row of x, "num_tokens" for the tokens of a launch, and a number for itself.
        shared: bytes of dynamic shared memory.
    Returns:
        launch(tokens=..., stream=..., and the tensors by name), for inside of `current`.
    """
    name, sources = f"{file}_{kernel}", [source(parameter) for parameter in parameters]
    index, function = _loaded(file, name, device, shared)
    return _cuda.prepare(
        name=name, function=function, device=index, threads=threads, shared=shared, grid=(0, blocks, 1, 1),
        tensors=[value for kind, value in sources if kind == "address"], parameters=sources, specialised=False,
        owner=None,
    )  # fmt: skip


def source(parameter: str | int) -> tuple[str, str | int | None]:
    """Where a launch has a kernel's parameter from, as `_cuda.prepare` takes it."""
    if not isinstance(parameter, str):
        return "number", parameter
    if parameter == "num_tokens":
        return "tokens", None
    if parameter.endswith("_stride"):
        return "stride", parameter.removesuffix("_stride")
    return "address", parameter


def _loaded(file: str, kernel: str, device: torch.device, shared: int) -> tuple[int, int]:
    """The number of the device, and the kernel's handle there."""
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        return index, _function(file, kernel, index, shared).value


class current(torch.cuda.device):
    """Makes a GPU the current device, and gives torch's current stream of it, as prepared launches take it."""

    def __enter__(self) -> int:
        super().__enter__()
        return torch._C._cuda_getCurrentRawStream(self.idx)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


_most_shared: dict[tuple[str, int], int] = {}
"""Bytes of dynamic shared memory that kernels may have by now, by name and device."""


def _bind_context() -> None:
    """Make the current device's context that of this thread, which the driver's functions need."""
    if not torch.cuda.is_current_stream_capturing():  # asking this binds it too, and a capture must not wait
        torch.cuda.current_stream().synchronize()


@functools.cache
def _function(file: str, kernel: str, device: int, shared: int) -> ctypes.c_void_p:
    _bind_context()
    function = ctypes.c_void_p()
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), _module(file, device), kernel.encode()), kernel)
    if shared > _most_shared.get((kernel, device), DEFAULT_SHARED):  # never less: earlier launches come again
        _check(_driver().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, shared), f"{kernel}: {shared} shared bytes")
        _most_shared[kernel, device] = shared
    return function


@functools.cache
def _module(file: str, device: int) -> ctypes.c_void_p:
    module = ctypes.c_void_p()
    image = (FATBIN / f"{file}.fatbin").read_bytes()
    status = _driver().cuModuleLoadData(ctypes.byref(module), image)
    if status in UNLOADABLE:
        version = ctypes.c_int()
        _driver().cuDriverGetVersion(ctypes.byref(version))
        major, minor = version.value // 1000, version.value % 1000 // 10
        raise UnloadableError(
            f"backend 'cuda': the driver, which is for CUDA {major}.{minor}, does not load {file}.fatbin, "
            f"error {status} ({_error_string(status)}); install sparsekern again with nvcc of that version or older."
        )
    _check(status, f"{file}.fatbin")
    return module


@functools.cache
def _unloadable(device: int) -> str | None:
    """Which file the driver will never load on the current device; other errors pass."""
    _bind_context()
    try:
        for name in KERNELS:
            _module(name, device)
    except UnloadableError as error:
        return str(error)
    return None


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"backend 'cuda', {what}: error {status} ({_error_string(status)})")


def _error_string(status: int) -> str:
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(status, ctypes.byref(text))
    return (text.value or b"unknown").decode()
