"""What a device can do at most.

A CPU: floating-point operations in registers and bytes to and from memory, a second. A bound must be out of reach, and
a GEMM is not: on an AMD our kernels overtake MKL's, and oneDNN's overtake both. A GPU: the constants of the chooser's
model (sparsekern/devices/README.md).
"""

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from bench.case import GPU, Case, Sizes
from bench.clock import ON_GPU
from bench.measure import microseconds, timed

SOURCE = Path(__file__).with_suffix(".c")
TURNS = 1_000_000
STREAMED = 2**26  # bytes of one array, several times the last cache


def least_seconds(call: Callable[[], object], times: int) -> float:
    """Whatever else the machine does can only add time."""
    return min(timed(call) for _ in range(times))


@lru_cache
def flops_of_a_core() -> float:
    """float32 operations a second of one core, a multiply-add being two.

    Raises:
        RuntimeError: no C compiler works here.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "limits.so")
        command = ["cc", "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", SOURCE, "-o", library]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as failure:
            raise RuntimeError(f"bench/limits.c cannot be compiled: {failure}") from failure
        native = ctypes.CDLL(str(library))
    native.multiply_add.argtypes, native.multiply_add.restype = [ctypes.c_long], ctypes.c_float
    native.flop.argtypes, native.flop.restype = [ctypes.c_long], ctypes.c_long
    return native.flop(TURNS) / least_seconds(lambda: native.multiply_add(TURNS), times=40)


def flops(threads: int) -> float:
    """As many times a core's: what others do on the other cores must not lower a bound."""
    return threads * flops_of_a_core()


@lru_cache
def bytes_per_second(threads: int) -> float:
    """Of a += b, which reads two arrays and writes one: the fastest way through memory on the CPUs that were tried.

    Not less than one thread's, as it may be where others use the machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    a, b = torch.zeros(STREAMED // 4), torch.zeros(STREAMED // 4)
    found = 3 * STREAMED / least_seconds(lambda: a.add_(b), times=40)
    torch.set_num_threads(before)
    return found if threads == 1 else max(found, bytes_per_second(1))


def roofline(case: Case, time_us: float, flop: float, bytes: float) -> dict[str, float]:
    """Share of a CPU's roofline bound that a measurement reached, at most 1; nothing where no bound is known.

    float32 only: how fast a CPU multiplies bfloat16 depends on units that C has no word for.
    """
    if case.device != "cpu" or case.arithmetic != "float32":
        return {}
    try:
        bound = max(flop / flops(case.threads), bytes / bytes_per_second(case.threads))
    except RuntimeError:  # bench_limits reports it
        return {}
    return {"roofline": 1e6 * bound / time_us}


def l2_bandwidth(sizes: Sizes) -> float:
    """Bytes per second from L2 to all multiprocessors, which read 24 MB again and again, each beginning elsewhere."""
    import triton

    from bench.limits_kernels import read_kernel

    programs, turns, block = (132 * 8, 64, 8192) if ON_GPU else (2, 2, 1024)
    buffer = torch.randn(min(24 * 2**20 // 4, sizes.elements), device=GPU)
    sums = torch.empty(programs, device=GPU)
    blocks = triton.cdiv(buffer.numel(), block)

    def read():
        read_kernel[(programs,)](buffer, sums, blocks, turns, BLOCK=block, num_warps=8)

    return programs * turns * block * 4 / (microseconds(read, 4) / 1e6)


def hbm_bandwidth(sizes: Sizes) -> float:
    """Bytes per second, read and written, of a copy far larger than the caches."""
    from bench.limits_kernels import copy_kernel

    source = torch.randn(sizes.elements, device=GPU)
    target, block = torch.empty_like(source), 4096
    programs = sizes.elements // block  # a power of two

    def copy():
        copy_kernel[(programs,)](source, target, BLOCK=block, num_warps=8)

    found = 8 * source.numel() / (microseconds(copy) / 1e6)
    assert torch.equal(source, target), "limits: the copy in device memory is wrong"
    return found


def launch_seconds() -> float:
    """From one tiny kernel to the next inside a graph."""
    x = torch.zeros(1, device=GPU)
    return microseconds(lambda: x.add_(1), 200 if ON_GPU else 5) / 1e6


def gemm_microseconds(arithmetic: str, m: int, n: int, k: int) -> float:
    """The vendor's [m, k] @ [k, n]."""
    torch.set_float32_matmul_precision("high" if arithmetic == "tf32" else "highest")
    dtype = torch.float32 if arithmetic == "tf32" else getattr(torch, arithmetic)
    x, w = (torch.randn(size, k, device=GPU, dtype=dtype) for size in (m, n))
    return microseconds(lambda: torch.nn.functional.linear(x, w), 2)


def arithmetics(sizes: Sizes) -> dict[str, str]:
    """Those that are measured, by their names in `sparsekern.choose.cost`."""
    names = [sizes.half, *dict.fromkeys(name for name, _, _ in sizes.single)]
    return {Case(1, 1, 1, 1.0, 1, 1, arithmetic=name).kind: name for name in names}


def constants(sizes: Sizes) -> dict:
    """The fields of a device's file that are no table, as measured here."""
    n = sizes.gemm
    found = {
        "l2_bytes_per_s": l2_bandwidth(sizes),
        "hbm_bytes_per_s": hbm_bandwidth(sizes),
        "launch_s": launch_seconds(),
        "gemm_flops": {
            kind: float(f"{2 * n**3 / (gemm_microseconds(name, n, n, n) / 1e6):.4g}")
            for kind, name in arithmetics(sizes).items()
        },
    }
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in found.items()}
