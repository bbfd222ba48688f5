"""What this machine can do at most: floating-point operations in registers and bytes to and from memory, a second.

A bound must be out of reach, and a GEMM is not: on an AMD our kernels overtake MKL's, and oneDNN's overtake both.
"""

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from bench.case import Case
from bench.measure import timed

SOURCE = Path(__file__).with_suffix(".c")
TURNS = 1_000_000
STREAMED = 2**26  # bytes of one array, several times the last cache


def least_seconds(call: Callable[[], object], times: int) -> float:
    """What else a machine does only ever adds."""
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
    """Share of the roofline bound that a measurement reached, at most 1; nothing where no bound is known.

    float32 only: how fast a CPU multiplies bfloat16 depends on units that C has no word for.
    """
    if case.dtype != "float32":
        return {}
    try:
        bound = max(flop / flops(case.threads), bytes / bytes_per_second(case.threads))
    except RuntimeError:  # bench_limits reports it
        return {}
    return {"roofline": 1e6 * bound / time_us}
