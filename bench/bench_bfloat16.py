"""SparseLinear against nn.Linear in bfloat16: forward and training step, on the README's first cases."""

from dataclasses import replace

from bench.bench_forward import bench_forward
from bench.bench_layer import bench_step
from bench.case import HEADLINES, SMOKE

__all__ = ["bench_forward", "bench_step"]
CASES = {
    cases: [replace(case, arithmetic="bfloat16") for case in chosen]
    for cases, chosen in {"smoke": SMOKE, "quick": HEADLINES[:1], "full": HEADLINES}.items()
}
