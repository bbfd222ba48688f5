"""What the shares of the roofline bound are relative to, and how near to it dense GEMMs of a large square come."""

import pytest
import torch
from torch.nn import functional as F

from bench import limits
from bench.case import THREADS, Case, Sizes, on_gpu
from bench.problem import BOUND
from bench.training import check_elements


def cases(size: int) -> list[Case]:
    return [Case(size, size, size, 1.0, 1, number) for number in THREADS]


CASES = {"smoke": cases(64), "quick": cases(2048), "full": cases(2048)}


def gpu_cases(sizes: Sizes) -> list[Case]:
    return [on_gpu(sizes.gemm, sizes.gemm, 1.0, 1, sizes.half)]


@pytest.mark.device("cuda")
def bench_constants(record, case, request):
    """The constants of the chooser's model (sparsekern/devices)."""
    found = limits.constants(request.config.sizes)
    record("L2 to multiprocessors", gbytes=found["l2_bytes_per_s"] / 1e9)
    record("copy in device memory", gbytes=found["hbm_bytes_per_s"] / 1e9)
    record("kernel to kernel", time_us=found["launch_s"] * 1e6)
    names = limits.arithmetics(request.config.sizes)
    for kind, flops in found["gemm_flops"].items():
        record(f"GEMM, {names[kind]}", gflops=flops / 1e9)


@pytest.mark.device("cpu")
def bench_multiply_add(record, case):
    try:
        flops = limits.flops(case.threads)
    except RuntimeError as failure:
        record("multiply-add", reason=str(failure))
        pytest.skip(str(failure))
    record("multiply-add", gflops=flops / 1e9)


@pytest.mark.device("cpu")
def bench_memory(record, case):
    record("a += b in memory", gbytes=limits.bytes_per_second(case.threads) / 1e9)


@pytest.mark.device("cpu")
def bench_gemm(compare, record, case):
    """nn.Linear's GEMM is MKL's; torch also brings oneDNN's, for tensors in its own format."""
    x, w = torch.randn(case.tokens, case.in_features), torch.randn(case.out_features, case.in_features)
    packed_x, packed_w = x.to_mkldnn(), w.to_mkldnn()
    check_elements(F.linear(packed_x, packed_w).to_dense(), F.linear(x, w), BOUND["float32"])
    found = compare(lambda: F.linear(packed_x, packed_w), lambda: F.linear(x, w))
    flop = 2 * case.tokens * case.out_features * case.in_features
    for name, time in (("GEMM of oneDNN", "time_us"), ("GEMM of nn.Linear", "partner_us")):
        record(name, time_us=found[time], gflops=flop / found[time] / 1e3, flop=flop, bytes=4 * 3 * case.tokens**2)
