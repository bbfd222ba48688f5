"""What the device allows, in place of the model's constants: L2 and memory bandwidth, launches, the vendor's GEMM."""

import torch

from bench.gpu import clock
from bench.gpu.clock import DEVICE, REHEARSAL
from bench.gpu.problem import DTYPE

ARITHMETICS = ("half", "ieee") if REHEARSAL else ("half", "tf32", "ieee")
PEAK_SIZE = 64 if REHEARSAL else 8192
GEMM_SIZES = (64,) if REHEARSAL else (4096, 1024, 8192)
GEMM_TOKENS = (32,) if REHEARSAL else (16384, 4096, 256)


def l2_bandwidth() -> float:
    """Bytes per second from L2 to all multiprocessors, which read 24 MB again and again, each beginning elsewhere."""
    import triton

    from bench.gpu.l2_kernel import read_kernel

    programs, turns, block = (2, 2, 1024) if REHEARSAL else (132 * 8, 64, 8192)
    buffer = torch.randn((2**14 if REHEARSAL else 24 * 2**20) // 4, device=DEVICE)
    sums = torch.empty(programs, device=DEVICE)
    blocks = triton.cdiv(buffer.numel(), block)

    def read():
        read_kernel[(programs,)](buffer, sums, blocks, turns, BLOCK=block, num_warps=8)

    return programs * turns * block * 4 / (clock.replayed(read, 4).median / 1e6)


def hbm_bandwidth() -> float:
    """Bytes per second, read and written, of a copy far larger than the caches."""
    source = torch.randn(2**14 if REHEARSAL else 2**28, device=DEVICE)
    target = torch.empty_like(source)
    return 8 * source.numel() / (clock.replayed(lambda: target.copy_(source)).median / 1e6)


def launch_seconds() -> float:
    """From one tiny kernel to the next inside a graph."""
    x = torch.zeros(1, device=DEVICE)
    return clock.replayed(lambda: x.add_(1), 5 if REHEARSAL else 200).median / 1e6


def gemm_microseconds(arithmetic: str, m: int, n: int, k: int) -> float:
    torch.set_float32_matmul_precision("highest" if arithmetic == "ieee" else "high")
    x, w = (torch.randn(size, k, device=DEVICE, dtype=DTYPE[arithmetic]) for size in (m, n))
    return clock.replayed(lambda: torch.nn.functional.linear(x, w), 2).median


def gemm_flops(arithmetic: str) -> float:
    n = PEAK_SIZE
    return 2 * n**3 / (gemm_microseconds(arithmetic, n, n, n) / 1e6)


def constants() -> dict:
    """The fields of a device's file that are no table, as measured here."""
    found = {
        "l2_bytes_per_s": l2_bandwidth(),
        "hbm_bytes_per_s": hbm_bandwidth(),
        "launch_s": launch_seconds(),
        "gemm_flops": {name: float(f"{gemm_flops(name):.4g}") for name in ARITHMETICS},
    }
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in found.items()}


def records():
    """The constants, and the vendor's GEMM for the shapes of the model."""
    yield {"suite": "limits", **constants()}
    for arithmetic in ARITHMETICS:
        for n in GEMM_SIZES:
            for tokens in GEMM_TOKENS:
                for name, shape in (("forward", (tokens, n, n)), ("weight gradient", (n, n, tokens))):
                    row = {"suite": "gemm", "product": name, "arithmetic": arithmetic, "n": n, "tokens": tokens}
                    yield row | {"graph_us": gemm_microseconds(arithmetic, *shape)}
